# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands on samples, as a user runs them: whole processes, real pipes."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from typing import Any

import pytest
from opened import Sample

PTINSPECT = [sys.executable, "-m", "ptinspect"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PTINSPECT, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def answer(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--format", "json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert (result["schema"], result["version"]) == ("ptinspect", 1)
    return result


def test_summary(sample: Sample) -> None:
    tables = answer("--sample", sample.name, "summary")["tables"]
    assert tables["accounting"]["difference"] == 0
    exact = sample.truth["nr_page_table_pages"]["exact"]
    assert tables["accounting"]["nr_pagetable_exact"] == exact
    held = sum(row["pages"] for row in tables["holders"])
    assert held == sum(row["pages"] for row in tables["typed"])
    text = run("--sample", sample.name, "summary").stdout
    assert "Typed pages and NR_PAGETABLE agree to the page." in text


def test_list_in_every_format(sample: Sample) -> None:
    rows = answer("--sample", sample.name, "list")["tables"]["descriptors"]
    assert len(rows) == len(sample.scan.pfns)
    done = run("--sample", sample.name, "list", "--format", "csv")
    assert [row["pfn"] for row in csv.DictReader(io.StringIO(done.stdout))] == [
        row["pfn"] for row in rows
    ]
    text = run("--sample", sample.name, "list", "--limit", "2").stdout
    assert rows[0]["ptdesc"] in text


def test_show_by_every_kind_of_address(sample: Sample) -> None:
    row = answer("--sample", sample.name, "list", "--columns", "pfn,ptdesc,phys,address")
    first = row["tables"]["descriptors"][-1]
    seen = []
    for kind, column in (("pfn", "pfn"), ("phys", "phys"), ("page", "ptdesc"), ("virt", "address")):
        shown = answer("--sample", sample.name, "show", f"{kind}:{first[column]}")
        seen.append((shown["tables"]["descriptor"]["pfn"], shown["tables"]["members"]))
    bare = answer("--sample", sample.name, "show", first["ptdesc"])
    assert bare["tables"]["descriptor"]["pfn"] == first["pfn"]
    assert all(entry == seen[0] for entry in seen)
    assert seen[0][0] == first["pfn"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["show", "0xfffffffffffff123"], 2, "is no"),
        (["show", "pfn:0xffffffffff"], 2, "is no page frame number"),
        (["show", "zork"], 2, "is neither an address nor a page"),
        (["show", "foo:1"], 2, "unknown kind of address 'foo'"),
        (["list", "--columns", "pfn,zork"], 2, "no column 'zork'"),
        (["list", "--where", "zork"], 2, "is not COLUMN OP VALUE"),
        (["list", "--sort", "zork"], 2, "no column 'zork'"),
    ],
)
def test_bad_questions(arguments: list[str], status: int, message: str) -> None:
    done = run("--sample", "x86_64-7.3", *arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_pipe_that_closes_early_is_no_error() -> None:
    command = " ".join(
        [*PTINSPECT, "--sample x86_64-7.3 list --columns pfn,ptdesc,flags,pt_list.next"]
    )
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def test_ps_adds_up(sample: Sample) -> None:
    """Walked and deposited tables are what the kernel counts in each mm."""
    rows = answer("--sample", sample.name, "ps")["tables"]["spaces"]
    spare = 0
    for row in rows:
        if row["kind"] == "user":
            # Each is rounded down to KiB; powerpc has tables of 256 bytes.
            lost = row["pgtables_KiB"] - row["walked_KiB"] - row["deposited_KiB"]
            assert lost in ((0, 1) if sample.name.startswith("ppc64le") else (0,))
            spare += row["deposited_KiB"]
    assert (spare > 0) is any(n["text"].startswith("thp 0x") for n in sample.truth["made"])


def test_layout(sample: Sample) -> None:
    tables = answer("--sample", sample.name, "layout")["tables"]
    verdicts = {row["verdict"] for row in tables["table_match"]}
    assert "match" in verdicts
    assert "MISMATCH" not in verdicts
    assert tables["facts"]["ptdesc_fits_page"] is True
    kernel = [row for row in tables["table_match"] if row["asserted_by"] == "kernel"]
    assert all(row["verdict"] == "match" for row in kernel if row["ptdesc_offset"] is not None)


def test_owner_and_show_agree_on_who_reaches_a_page(sample: Sample) -> None:
    """Also for a page that holds several tables, as on powerpc with 64K pages."""
    pfn = f"pfn:{int(sample.scan.pfns[-1]):#x}"
    parents = answer("--sample", sample.name, "show", pfn)["tables"]["parents"]
    owners = answer("--sample", sample.name, "owner", pfn)["tables"]["owners"]
    as_table = sorted((o["va"], o["entry_at"] or "") for o in owners if o["as"] == "table")
    assert as_table == sorted((p["va"], p["entry_at"] or "") for p in parents)
    if sample.name.startswith("ppc64le"):
        assert len({p["table"] for p in parents}) > 1
