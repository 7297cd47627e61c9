# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The matrix goes on where it was interrupted, and its document says only what was tried."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab import matrix
from lab.errors import GuestError, LabError
from lab.live import LiveAnswers
from lab.matrix import Row

ROWS = (
    Row("one", "x86_64", recipe="a", kinds=("qmp", "elf", "crash")),
    Row("two", "s390x", recipe="b", kinds=("qmp", "live")),
    Row("gone", "s390x", recipe="none", kinds=("qmp",)),
)


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Cells that are tried, in order; a second ``elf`` is where the first run ends."""
    seen: list[tuple[str, str]] = []

    def kernel(row: Row) -> Any:
        if row.recipe == "none":
            raise LabError("no such kernel")
        return row

    def resting(row: Row, _: Any, kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
        for kind in kinds:
            seen.append((row.name, kind))
            yield kind, "pass"

    def live(row: Row, _: Any) -> str:
        seen.append((row.name, "live"))
        raise GuestError("no disks\nand more")

    def crash(row: Row, _: Any) -> str:
        seen.append((row.name, "crash"))
        if seen.count((row.name, "crash")) == 1:
            raise KeyboardInterrupt
        return "check: tree-one-level"

    monkeypatch.setenv("PTINSPECT_CACHE", str(tmp_path))
    monkeypatch.setattr(matrix, "ROWS", ROWS)
    monkeypatch.setattr(matrix, "DOCUMENT", tmp_path / "matrix.md")
    monkeypatch.setattr(Row, "kernel", kernel)
    monkeypatch.setattr(matrix, "_run_resting", resting)
    monkeypatch.setattr(matrix, "_run_live", live)
    monkeypatch.setattr(matrix, "_run_crash", crash)
    return seen


def test_goes_on(tried: list[tuple[str, str]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        matrix.run_matrix()
    assert tried == [("one", "qmp"), ("one", "elf"), ("one", "crash")]
    del tried[:2]
    matrix.run_matrix()
    assert tried[1:] == [("one", "crash"), ("two", "qmp"), ("two", "live")]
    matrix.run_matrix()
    assert len(tried) == 4
    matrix.run_matrix(["s390x", "two"], ["qmp"], again=True)
    assert tried[4:] == [("two", "qmp")]


def test_document(tried: list[tuple[str, str]]) -> None:
    matrix.run_matrix(["two"])
    lines = [line for line in matrix.DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["architecture", "kernel", "qmp", "elf", "kdump", "live", "crash", "tests"],
        ["x86_64", "one", "not run", "not run", "-", "-", "not run", "-"],
        ["s390x", "two", "pass", "-", "-", "the guest: no disks", "-", "-"],
        ["s390x", "gone", "not run", "-", "-", "-", "-", "-"],
    ]


def answers(**changed: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {"missing": [], "tables": {}}
    found = {name: {**whole} for name in ("summary", "check", "ps")}
    found["summary"]["tables"] = {"accounting": {"difference": 0}}
    found["check"]["tables"] = {"findings": []}
    found["ps"]["tables"] = {"spaces": [{"pid": 1, "pgtables_KiB": 40}]}
    for name, tables in changed.items():
        found[name] = {"missing": tables.pop("missing", []), "tables": tables}
    return found


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "pass"),
        ({"summary": {"accounting": {"difference": 1}}}, "summary: NR_PAGETABLE differs"),
        ({"summary": {"missing": ["2 tables"]}}, "summary: 2 tables"),
        ({"check": {"findings": [{"invariant": "ptl-legal"}]}}, "check: ptl-legal"),
        ({"ps": {"spaces": []}}, "ps: process 1 has 40 KiB, not None"),
        ({"ps": {"spaces": [{"pid": 1, "pgtables_KiB": 44}]}}, "ps: process 1 has 40 KiB, not 44"),
    ],
)
def test_verdicts(changed: dict[str, Any], verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = answers(**changed)
    monkeypatch.setattr(matrix, "_ask", lambda arguments: (0, found[arguments[-1]], ""))
    # Process 2 is still in the space of process 1, after vfork().
    assert matrix._judge([], {1: 40, 2: 40}, {2: 1}) == verdict


def test_a_command_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_ask", lambda arguments: (3, None, "no such file"))
    assert matrix._judge([], {}, {}) == "summary: no such file"


@pytest.mark.parametrize(
    ("status", "said", "verdict"),
    [
        (0, "12 passed, 3 skipped in 60.00s", "pass"),
        (0, "15 skipped in 1.00s", "tests: 15 skipped in 1.00s"),
        (2, "1 error in 1.00s", "tests: 1 error in 1.00s"),
        (
            1,
            "FAILED tests/guests/test_guest_walk.py::test_pagemap_counts[arm two] - assert 1 == 2\n"
            "1 failed, 3 passed in 60.00s",
            "tests: test_pagemap_counts",
        ),
    ],
)
def test_what_the_tests_of_a_guest_said(
    status: int, said: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["env"]["PTINSPECT_ROW"] == "s390x two"
        return subprocess.CompletedProcess(command, status, f"...\n{said}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    kernel: Any = None
    assert matrix._run_tests(ROWS[1], kernel) == verdict


def live_answers(difference: int, walked: int, findings: Sequence[Any] = ()) -> LiveAnswers:
    answered = {
        "ptsummary": {"accounting": {"difference": difference, "nr_pagetable_exact": 80}},
        "ptcheck": {"findings": list(findings)},
        "ptps": {"spaces": [{"pid": 7, "walked_KiB": walked}]},
    }
    out = "".join(
        f"@@ {name} --format json\n{json.dumps({'tables': tables}, indent=1)}\n"
        for name, tables in answered.items()
    )
    before, after = ({"status": {"7": {"VmPTE": size}}} for size in ("36", "40"))
    told = {"status": 0, "before": before, "after": after}
    return LiveAnswers({"answers": [told]}, ((out, ""),))


def test_live_verdict() -> None:
    finding = {"invariant": "desc-not-tail"}
    assert matrix._live_verdict(live_answers(-3, 40)) == "pass"
    assert matrix._live_verdict(live_answers(0, 36)) == "pass"
    assert matrix._live_verdict(live_answers(14, 40)) == "pass"
    assert matrix._live_verdict(live_answers(15, 40)) == "summary: NR_PAGETABLE differs"
    assert matrix._live_verdict(live_answers(0, 44)) == "ps: process 7 differs"
    assert matrix._live_verdict(live_answers(0, 40, [finding])) == "check: desc-not-tail"
    failed = live_answers(0, 40)
    failed.document["answers"][0]["status"] = 1
    with pytest.raises(LabError, match="shell failed"):
        matrix._live_verdict(failed)
