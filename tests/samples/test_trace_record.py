# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``--trace FILE`` of list, show and check: a real dump beside a record that is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import MOVING, opened

from ptinspect.census import take_census
from ptinspect.checks import Finding, Severity, Verdict, run_checks
from ptinspect.checks.model import Invariant
from ptinspect.checks.model import Result as CheckResult
from ptinspect.checks.run import CheckResults, excused
from ptinspect.cli.main import cli
from ptinspect.cli.traced import Traced
from ptinspect.errors import UsageError
from ptinspect.target import sample_names
from ptinspect.trace.recorded import read_record

SECOND = 1_000_000_000
#: It has an orphan: a table that a CPU is about to put into its batch.
(NAME,) = [name for name in sample_names() if name.endswith(MOVING)]


@pytest.fixture(scope="module")
def orphan() -> tuple[int, str, str]:
    """The orphan's descriptor, the kernel's release, and its boot."""
    with opened(NAME) as found:
        census = take_census(found.prog, leaf_counts=False)
        (index,) = census.unexplained()
        release = found.prog["init_uts_ns"].name.release.string_().decode()
        return int(census.scan.addresses[index]), release, NAME


def record(path: Path, release: str, tables: dict[str, Any], **begin: Any) -> Path:
    first = {
        "kind": "begin",
        "nsecs": SECOND,
        "release": release,
        "boot_id": None,
        "events": False,
        "filtered": False,
        "young_ns": SECOND,
        **begin,
    }
    last = {"kind": "tables", "nsecs": 20 * SECOND, "pending": [], "live": [], **tables}
    summary = {"kind": "summary", "missing": ["up to 3 events were missed"]}
    path.write_text("".join(json.dumps(line) + "\n" for line in (first, last, summary)))
    return path


def waiting(page: int, age: int = 9) -> dict[str, Any]:
    row = {"page": hex(page), "level": "PTE", "way": "gather+RCU", "age_ns": age * SECOND}
    return {"pending": [{**row, "pid": 42, "comm": "odd\x1b[2J"}]}


def living(page: int, age: int, ended: int | None) -> dict[str, Any]:
    row = {"page": hex(page), "level": "PTE", "age_ns": age * SECOND, "mm": "0x40"}
    end = None if ended is None else ended * SECOND
    more = {"mm_ended_ns": end, "pid": 42, "comm": "sh", "stack": ["pte_alloc_one+9", "fault+1"]}
    return {"live": [{**row, **more}]}


def answer(*words: str) -> Result:
    return CliRunner().invoke(cli, ["--sample", NAME, *words], catch_exceptions=False)


def explained(tmp_path: Path, orphan: tuple[int, str, str], tables: dict[str, Any]) -> Any:
    path = record(tmp_path / "record", orphan[1], tables)
    done = answer("list", "--orphan", "--format", "json", "--trace", str(path))
    document = json.loads(done.stdout)
    assert "the trace: up to 3 events were missed" in document["missing"]
    assert any("20.0" not in note and "The trace began 1.0 s" in note for note in document["notes"])
    rows = [r for r in document["tables"]["explained"] if r["page"] == hex(orphan[0])]
    (row,) = rows
    return row


@pytest.mark.parametrize(
    ("what", "explanation", "age"),
    [
        ("waiting", "waiting for its release", 9000),
        ("old", "suspect: its mm has ended", 9000),
        ("lost", "suspect: its mm lives and does not reach it", 9000),
        ("young", "just made", 0),
        ("nothing", "not known to the trace", None),
    ],
)
def test_list_explains_its_orphan(
    tmp_path: Path, orphan: tuple[int, str, str], what: str, explanation: str, age: int | None
) -> None:
    page = orphan[0]
    tables: dict[str, dict[str, Any]] = {
        "waiting": waiting(page),
        "old": living(page, 9, 5),
        "lost": living(page, 9, None),
        "young": living(page, 0, None),
        "nothing": {},
    }
    row = explained(tmp_path, orphan, tables[what])
    assert row["explanation"].startswith(explanation)
    assert row["age ms"] == age
    assert (row["stack"] is not None) == (what in ("old", "lost", "young"))


def test_show_tells_of_one_table(tmp_path: Path, orphan: tuple[int, str, str]) -> None:
    path = record(tmp_path / "record", orphan[1], living(orphan[0], 9, 5))
    done = answer("show", f"ptdesc:{orphan[0]:#x}", "--trace", str(path))
    assert "suspect: its mm has ended" in done.stdout
    assert "pte_alloc_one < fault" in done.stdout
    text = record(tmp_path / "record", orphan[1], waiting(orphan[0]))
    done = answer("show", f"ptdesc:{orphan[0]:#x}", "--trace", str(text))
    assert "waiting for its release" in done.stdout
    assert "\x1b" not in done.stdout


def test_of_another_kernel_or_boot(tmp_path: Path, orphan: tuple[int, str, str]) -> None:
    path = record(tmp_path / "record", "5.4.0", {})
    with pytest.raises(UsageError, match=r"is a trace of Linux 5\.4\.0, not of"):
        answer("list", "--orphan", "--trace", str(path))
    with pytest.raises(UsageError, match="needs --orphan"):
        answer("list", "--trace", str(path))


def finding(address: int, kind: str = "ptdesc", severity: Severity = Severity.LEAK) -> Finding:
    return Finding(kind, address, "nothing holds this table", (), severity=severity)


def test_check_sets_aside_what_the_trace_explains(
    tmp_path: Path, orphan: tuple[int, str, str]
) -> None:
    page, release, _ = orphan
    with opened(NAME) as found:
        only = run_checks(found.prog, only=["typed-reachability"])
    (real,) = only.results
    suspects = (finding(page), finding(page + 64), finding(page, "table"))
    results = CheckResults((with_findings(real, suspects),), (), (0.0,))
    for tables, left in (
        (waiting(page), 2),
        (waiting(page, 61), 3),
        (living(page, 0, None), 2),
        (living(page, 9, 5), 3),
        ({}, 3),
    ):
        recorded = read_record(record(tmp_path / "record", release, tables))
        (judged,) = excused(results, Traced(recorded, now=False).excuse).results
        assert len(judged.findings) == left
        assert judged.verdict is Verdict.FINDINGS
        aside = [why for why, _ in judged.set_aside if why.startswith("the trace says: ")]
        assert len(aside) == 3 - left
    worse = finding(page, severity=Severity.CORRUPTION)
    recorded = read_record(record(tmp_path / "record", release, waiting(page)))
    assert Traced(recorded, now=False).excuse(worse) is None
    alone = CheckResults((with_findings(real, (finding(page),)),), (), (0.0,))
    (judged,) = excused(alone, Traced(recorded, now=False).excuse).results
    assert judged.verdict is not Verdict.FINDINGS


def with_findings(result: CheckResult, findings: tuple[Finding, ...]) -> CheckResult:
    invariant: Invariant = result.invariant
    assert invariant.severity is Severity.LEAK
    return CheckResult(invariant, Verdict.FINDINGS, result.examined, findings)
