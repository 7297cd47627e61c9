# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
As root on /proc/kcore, inside of guests with stock kernels and Debian's own Python, drgn and NumPy.

The kernel's debug file is where its debug package puts it, and ptinspect comes as a wheel.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from resting import Stock

from lab.archive import ArchiveUnreachableError
from lab.errors import MissingToolError
from lab.kernels import debian_kernel
from lab.live import LiveAnswers, look_inside
from lab.matrix import moving_pages

pytestmark = pytest.mark.guest

KERNELS = (
    Stock("trixie", "x86_64", "6.12"),
    Stock("bookworm-backports", "s390x", "6.12"),
    Stock("bookworm-backports", "ppc64le", "6.12", flavour="powerpc64le-64k"),
)

#: These take minutes each: loading vmlinux does, on a machine that is emulated.
SLOW_KERNELS = (
    Stock("forky", "aarch64", "7.2"),
    Stock("bookworm-backports", "ppc64le", "6.12"),
    Stock("bookworm", "s390x", "6.1"),
    Stock("bookworm", "x86_64", "6.1"),
    Stock("forky", "x86_64", "7.2"),
)

if os.environ.get("PTINSPECT_LIVE") == "all":
    KERNELS += SLOW_KERNELS

#: In one session of drgn's shell, by way of its plugin.
LINES = (
    "ptsummary --format json",
    "ptps --format json",
    "ptwalk {sparse.pid} {sparse.start} --format json",
    "ptwalk {dense.pid} {dense.start} --format json",
    "ptlist --space {sparse.pid} --format json",
    "ptcheck --format json",
    "ptpending --format json",
    "ptlocks --format json",
)

#: The command itself, which loads vmlinux once more: where that does not take long.
SUMMARY = ("python3", "-m", "ptinspect", "summary", "--format", "json")
COMMAND_KERNELS = KERNELS[:2]


@pytest.fixture(scope="module", params=KERNELS, ids=str)
def live(request: pytest.FixtureRequest) -> LiveAnswers:
    stock = request.param
    try:
        kernel = debian_kernel(stock.suite, stock.architecture, stock.series, stock.flavour)
        questions = [("drgn", *LINES), *([SUMMARY] if stock in COMMAND_KERNELS else [])]
        answers = look_inside(stock.suite, kernel, questions, timeout=3600)
    except (MissingToolError, ArchiveUnreachableError) as error:
        pytest.skip(str(error))
    assert answers.document["release"] == kernel.release
    return answers


def session(live: LiveAnswers) -> dict[str, Any]:
    """What each line of the session answered, by its command and how often that came."""
    names: dict[str, int] = {}
    found = {}
    for line, answer in live.session(0):
        name = line.split()[0]
        names[name] = names.get(name, 0) + 1
        found[f"{name}{names[name]}"] = answer
    return found


def process(live: LiveAnswers, name: str) -> dict[str, Any]:
    (found,) = (p for p in live.document["processes"] if p["name"] == name)
    assert isinstance(found, dict)
    return found


def summaries(live: LiveAnswers) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each answer of summary, with what the kernel said of itself around it."""
    asked = live.document["answers"]
    found = [(session(live)["ptsummary1"], asked[0])]
    for told, (out, err) in zip(asked[1:], live.outputs[1:]):
        answer = json.loads(out)
        # A table that went away while it was read makes the answer incomplete: that is told.
        assert told["status"] == (4 if answer["missing"] else 0), err
        found.append((answer, told))
    return found


def test_summary_against_vmstat(live: LiveAnswers) -> None:
    """A counter that moves while it is read: the program that reads has page tables itself."""
    for answer, told in summaries(live):
        tables = answer["tables"]
        assert answer["target"] == "/proc/kcore"
        assert tables["seen"]["struct_pages_unreadable"] == 0
        typed = tables["accounting"]["typed_pages_as_counted"]
        exact = tables["accounting"]["nr_pagetable_exact"]
        assert abs(typed - exact) <= moving_pages(exact)
        # Before and after it the program itself was not there, which has some hundred tables.
        before, after = (told[when]["nr_page_table_pages"] for when in ("before", "after"))
        assert abs(before - after) <= moving_pages(before)
        assert before < typed <= told["most_page_table_pages"] + moving_pages(before)


def test_tables_of_resting_processes(live: LiveAnswers) -> None:
    """
    Of a process that rests, all is exact: VmPTE, pgtables_bytes, and the tables walked.

    Only khugepaged may take a table away meanwhile, when it makes a huge page of a file's pages.
    """
    rows = {row["pid"]: row for row in session(live)["ptps1"]["tables"]["spaces"]}
    for name in ("sparse", "dense"):
        pid = process(live, name)["pid"]
        asked = live.document["answers"][0]
        told = {int(asked[when]["status"][str(pid)]["VmPTE"]) for when in ("before", "after")}
        row = rows[pid]
        assert row["space"] == f"{name}/{pid}"
        assert row["pgtables_KiB"] in told
        assert row["walked_KiB"] == row["pgtables_KiB"]
    assert rows[process(live, "sparse")["pid"]]["PTE"] >= 300


def test_walk_against_pagemap(live: LiveAnswers) -> None:
    for number, name in enumerate(("sparse", "dense"), 1):
        told = process(live, name)["pagemap"]
        assert told >> 63
        result = session(live)[f"ptwalk{number}"]["tables"]["result"]
        frame = told & (1 << 55) - 1
        assert int(result["physical"], 16) == frame * live.document["page_size"]


def test_list_of_a_space(live: LiveAnswers) -> None:
    rows = session(live)["ptlist1"]["tables"]["descriptors"]
    levels = [row["level"] for row in rows]
    # A page may hold two tables (s390), or 256 (ppc64le with pages of 64K).
    tables = 2 if live.document["page_size"] < 1 << 16 else 256
    assert levels.count("PTE") * tables >= 300
    assert {row["space"] for row in rows if row["level"] == "PTE"} == {
        f"sparse/{process(live, 'sparse')['pid']}"
    }


def test_check_finds_nothing(live: LiveAnswers) -> None:
    answer = session(live)["ptcheck1"]
    assert answer["tables"]["findings"] == []
    verdicts = {row["verdict"] for row in answer["tables"]["invariants"]}
    assert "failed" not in verdicts
    assert "pass" in verdicts


def test_every_line_was_answered(live: LiveAnswers) -> None:
    found = session(live)
    assert len(found) == len(LINES)
    for answer in found.values():
        assert answer["target"] == "/proc/kcore"
        assert answer["complete"] is not bool(answer["missing"])
