# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
As root on /proc/kcore, inside of guests with stock kernels and Debian's own Python, drgn and NumPy.

The kernel's debug file is where its debug package puts it, and ptinspect comes as a wheel.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from resting import Stock

from lab.archive import ArchiveUnreachableError
from lab.errors import MissingToolError
from lab.kernels import debian_kernel
from lab.live import LiveAnswers, look_inside

pytestmark = pytest.mark.guest

KERNELS = (
    Stock("trixie", "x86_64", "6.12"),
    Stock("bookworm-backports", "s390x", "6.12"),
)

#: In one session of drgn's shell, by way of its plugin.
LINES = (
    "ptps --format json",
    "ptwalk {sparse.pid} {sparse.start} --format json",
    "ptwalk {dense.pid} {dense.start} --format json",
    "ptlist --space {sparse.pid} --format json",
    "ptcheck --format json",
    "ptpending --format json",
    "ptlocks --format json",
)

SUMMARY = ("python3", "-m", "ptinspect", "summary", "--format", "json")


@pytest.fixture(scope="module", params=KERNELS, ids=str)
def live(request: pytest.FixtureRequest) -> LiveAnswers:
    stock = request.param
    try:
        kernel = debian_kernel(stock.suite, stock.architecture, stock.series)
        answers = look_inside(stock.suite, kernel, [SUMMARY, ("drgn", *LINES)])
    except (MissingToolError, ArchiveUnreachableError) as error:
        pytest.skip(str(error))
    assert answers.document["release"] == kernel.release
    return answers


def session(live: LiveAnswers) -> dict[str, Any]:
    """What each line of the session answered, by its command and how often that came."""
    names: dict[str, int] = {}
    found = {}
    for line, answer in live.session(1):
        name = line.split()[0]
        names[name] = names.get(name, 0) + 1
        found[f"{name}{names[name]}"] = answer
    return found


def process(live: LiveAnswers, name: str) -> dict[str, Any]:
    (found,) = (p for p in live.document["processes"] if p["name"] == name)
    assert isinstance(found, dict)
    return found


def test_summary_against_vmstat(live: LiveAnswers) -> None:
    """A counter that moves while it is read: the program that reads has page tables itself."""
    asked = live.document["answers"][0]
    answer = json.loads(live.outputs[0][0])
    # A table that went away while it was read makes the answer incomplete: that is told.
    assert asked["status"] == (4 if answer["missing"] else 0), live.outputs[0][1]
    assert answer["tables"]["seen"]["struct_pages_unreadable"] == 0
    assert answer["target"] == "/proc/kcore"
    tables = answer["tables"]
    typed = tables["accounting"]["typed_pages_as_counted"]
    exact = tables["accounting"]["nr_pagetable_exact"]
    assert abs(typed - exact) <= 64
    # Before and after it the program itself was not there, which has some hundred tables.
    told = asked["before"]["nr_page_table_pages"]
    assert told == pytest.approx(asked["after"]["nr_page_table_pages"], abs=64)
    assert told < typed <= asked["most_page_table_pages"] + 64


def test_tables_of_resting_processes(live: LiveAnswers) -> None:
    """Of a process that rests, all is exact: VmPTE, pgtables_bytes, and the tables walked."""
    rows = {row["pid"]: row for row in session(live)["ptps1"]["tables"]["spaces"]}
    for name in ("sparse", "dense"):
        pid = process(live, name)["pid"]
        asked = live.document["answers"][1]
        told = {int(asked[when]["status"][str(pid)]["VmPTE"]) for when in ("before", "after")}
        row = rows[pid]
        assert row["space"] == f"{name}/{pid}"
        assert {row["pgtables_KiB"]} == told
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
    # A page may hold two tables (s390).
    assert levels.count("PTE") >= 150
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
