# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
``trace`` inside a guest with a stock kernel, beside VmPTE, vmstat and what each load says.

The guest's userland is Debian's, with bpftrace, in an initramfs. ``PTINSPECT_TRACE`` names other
kernels than the usual one, and how many tables the large load holds: ``bookworm x86_64 6.1 20000``,
more with commas.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lab.kernels import debian_kernel
from lab.trace import run_loads

USUAL = "trixie x86_64 6.12 20000"
KERNELS = [words.split() for words in os.environ.get("PTINSPECT_TRACE", USUAL).split(",")]

VM_PTE = ("PTE", "PMD", "PUD")


class Said:
    """What one guest said."""

    def __init__(self, kernel: list[str], document: dict[str, Any]) -> None:
        self.suite, self.arch, self.series, tables = kernel
        self.tables = int(tables)
        self.document = document
        assert "summary" in document, document.get("errors")
        self.summary = document["summary"]["tables"]
        self.footer = self.summary["footer"]

    def load(self, name: str) -> dict[str, Any]:
        """What a load says of itself; where it could not run, the test is skipped."""
        found: dict[str, Any] = self.document["loads"].get(name, {})
        if not found:
            pytest.skip(
                f"{name} needs a module, which is only compiled for this machine's own kind"
            )
        assert "failure" not in found, found
        if found.get("failed"):
            pytest.skip(f"this machine gives no huge pages (madvise: {found['failed']})")
        return found

    def about(self, tables: int) -> Any:
        """So many tables, up to the calls that the trace says it has missed."""
        return pytest.approx(tables, abs=self.footer["missed_calls"] or 0)

    def row(self, load: str) -> dict[str, int]:
        """The trace's row of a load's process, from when it took its name."""
        pid, name = self.load(load)["pid"], f"w-{load}"
        rows = [r for r in self.summary["processes"] if (r["pid"], r["name"]) == (pid, name)]
        (found,) = rows
        return found

    def stacks(self, what: str, cause: str, level: str = "PTE") -> int:
        """How many tables were made or unlinked for that cause."""
        return sum(
            row["tables"]
            for row in self.summary["stacks"]
            if (row["what"], row["cause"], row["level"]) == (what, cause, level)
        )

    def waited(self, way: str) -> int:
        """
        How many tables waited for seconds: until the end of the trace, or until their release.

        A CPU that is busy inside the kernel may delay the end (where the kernel is not preempted,
        the trace cannot fold the kernel's counter): RCU then goes on before the trace ends.
        """
        pending = self.summary.get("pending", [])
        still = sum(row["way"] == way and row["age ms"] >= 3000 for row in pending)
        waits = self.summary["waits"]
        slow = [row for row in waits if row["way"] == way and row["from us"] >= 3_000_000]
        return still + sum(row["tables"] for row in slow)

    @property
    def gathered(self) -> str:
        """The way of ordinary tables: 6.x frees without RCU on x86_64, outside KVM."""
        ways = {row["way"]: row["PTE"] for row in self.summary["ways"]}
        return max(("gather", "gather+RCU"), key=lambda way: ways.get(way, 0))


@pytest.fixture(scope="module", params=KERNELS, ids="-".join)
def said(request: pytest.FixtureRequest) -> Said:
    kernel = request.param
    document = run_loads(kernel[0], debian_kernel(*kernel[:3]), int(kernel[3]))
    keep = os.environ.get("PTINSPECT_TRACE_KEEP")
    if keep:
        Path(keep, f"{'-'.join(kernel)}.json").write_text(json.dumps(document, indent=1))
    return Said(kernel, document)


def test_agrees_with_the_kernels_counter(said: Said) -> None:
    footer = said.footer
    assert said.document["left"] == "", "bpftrace is left behind"
    # To the page; what was not seen says why not.
    off = footer["net_pages"] - footer["nr_page_table_pages_changed_by"]
    assert off == footer["destructors_unseen"]
    if footer["missed_calls"] == 0 and footer["dropped"] == 0 and off == 0:
        assert footer["exact"] is True
        assert said.document["status"] == 0
    else:
        assert footer["exact"] is False
        assert said.document["status"] == 4


def test_agrees_with_vmpte(said: Said) -> None:
    """VmPTE has PTE, PMD and PUD tables, of the sizes that the architecture gives them."""
    large = said.document["large"]
    # On s390x the root may be a PUD table: it is not counted by 6.12, and not in VmPTE.
    kib = {"PTE": 2, "PMD": 16, "PUD": 16} if said.arch == "s390x" else dict.fromkeys(VM_PTE, 4)
    held = sum(kib[level] * row["live"][level] for row in large["rows"] for level in kib)
    made = sum(row["made"]["PTE"] for row in large["rows"])
    assert made >= said.tables
    uncounted = large["vm_pte_kib"] - held
    levels = {row["level"] for row in said.summary["levels"]}
    if said.arch == "x86_64" and "PUD" not in levels:
        # 6.1 does not count PUD tables, so the trace cannot: the process has a few, and no more.
        assert 4 <= uncounted <= 6 * 4
    elif not said.footer["missed_calls"]:
        assert uncounted == 0


def test_faults_and_unmapping(said: Said) -> None:
    load = said.load("fault")
    rows = said.row("fault")
    pte, upper = (2, 16) if said.arch == "s390x" else (4, 4)
    # Where it lies decides whether it needs an upper table too.
    assert load["tables_kib"] == 64 * pte + upper * (rows["made PMD"] + rows["made PUD"])
    assert load["after_kib"] == 0
    assert rows["made PTE"] == said.about(64)
    missed = said.footer["missed_calls"] or 0
    assert rows[said.gathered] >= 64 - missed
    assert said.stacks("unlinked", "munmap") >= 64 - missed


def test_forks_execs_and_exits(said: Said) -> None:
    # 20 children with 32 tables of this load each, and with what the interpreter has.
    assert said.row("fork")["made PTE"] >= 20 * 32 + 32
    assert said.stacks("made", "fork") >= 20 * 32
    assert said.load("execute")["programs"] == 20
    assert said.stacks("made", "exec") >= 20
    rows = said.row("large_exit")
    assert rows["made PTE"] == 5000
    assert rows[said.gathered] >= 5000
    assert said.stacks("unlinked", "exit") >= 5000 + 20 * 32
    assert said.load("move")["moved"]
    assert said.stacks("made", "mremap") == 17


def test_anonymous_huge_pages(said: Said) -> None:
    load = said.load("huge_pages")
    assert (load["huge_kib"], load["after_split_kib"]) == (32 * 2048, 24 * 2048)
    # A spare table for each; a split takes it and makes none.
    rows = said.row("huge_pages")
    assert load["made_kib"] == load["made_with_split_kib"] == 4 * (32 + rows["made PMD"])
    assert rows["made PTE"] == 32
    assert said.stacks("made", "THP fault") >= 32
    # The 24 that were never split go at once, the 8 that were are tables like all others.
    assert rows["immediate"] in (24, 25)  # or 25, with its root, if nobody else dropped that
    load = said.load("collapse")
    assert load["huge_kib"] == 8 * 2048
    assert load["pte_kib"][0] == load["pte_kib"][1]
    rows = said.row("collapse")
    assert rows["made PTE"] == 8
    assert rows["immediate"] in (8, 9)


def test_collapse_of_shared_memory(said: Said) -> None:
    load = said.load("collapse_file")
    before, after = load["pte_kib"]
    assert [a - b for a, b in zip(before, after)] == [8 * 4, 8 * 4]
    way = "immediate" if said.series == "6.1" else "deferred"
    missed = said.footer["missed_calls"] or 0
    assert said.row("collapse_file")[way] >= 16 - missed
    assert said.stacks("unlinked", "THP collapse") >= 16 - missed


def test_hugetlb_sharing(said: Said) -> None:
    load = said.load("hugetlb")
    if not load["pages"]:
        pytest.skip("this machine gives no hugetlb pages")
    # Of the two mappings of each, the processes share one PMD table and have one of their own.
    assert said.stacks("made", "hugetlb", "PMD") == 3


def test_tables_that_are_reclaimed(said: Said) -> None:
    load = said.load("reclaim")
    given_up = load["pte_kib"][0] - load["pte_kib"][1]
    assert said.stacks("unlinked", "madvise") * (2 if said.arch == "s390x" else 4) == given_up


def test_kernel_tables(said: Said) -> None:
    load = said.load("kernel_tables")
    assert load["errors"] == [125, 125]  # ECANCELED: it did its work
    before, small, _ = load["nr_page_table_pages"]
    if small - before < 32:
        # 6.x counts no PTE table of the kernel.
        assert said.stacks("made", "vmalloc") == 0
        return
    assert said.stacks("made", "vmalloc") == 32
    ways = {row["way"]: row for row in said.summary["ways"]}
    assert ways["kernel-async"]["PTE"] == said.stacks("unlinked", "vmalloc") == 32


def test_a_leaked_table_is_found_with_its_stack(said: Said) -> None:
    load = said.load("leak")
    assert load["error"] == 125
    (row,) = [row for row in said.summary["left"] if row["verdict"].startswith("suspect")]
    assert row["made by"] == f"w-leak/{load['pid']}"
    assert row["level"] == "PTE"
    assert "pte_alloc_one < __pte_alloc" in row["stack"]
    assert "handle_mm_fault" in row["stack"]
    assert row["mm ended ms ago"] >= 2000


def test_tables_wait_while_rcu_is_held_up(said: Said) -> None:
    assert said.load("held_file")["failed"] == 0
    if said.series == "6.1":
        return  # nothing that was freed here goes through RCU
    # 16 tables of the load by huge-page code, and with gather+RCU the 64 of the other.
    assert said.waited("deferred") == said.about(16)
    if said.gathered == "gather+RCU":
        assert said.waited("gather+RCU") >= 64
    assert said.footer["waiting"] == len(said.summary.get("pending", []))
    assert not [row for row in said.summary["left"] if "w-fault" in row["made by"]]
