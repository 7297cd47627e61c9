# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A kernel that really crashed: saved by the kernel that took over, filtered by makedumpfile.

What the kernel said of itself right before is the oracle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from drgn import FaultError
from resting import Stock

from lab.archive import ArchiveUnreachableError
from lab.errors import MissingToolError
from lab.kernels import Kernel, debian_kernel
from lab.live import crash, makedumpfile
from ptinspect import (
    find_spaces,
    paging_of,
    space_usage,
    summarise,
    walk_address,
    walk_spaces,
)
from ptinspect.cli.main import run
from ptinspect.tables.scan import scan_memmap
from ptinspect.target import TargetOptions, open_target

pytestmark = pytest.mark.guest

#: How the capture kernel filters: everything but page tables and kernel data, or zero pages only.
FILTERS = {"d31": ["-l", "-d", "31"], "d1": ["-l", "-d", "1"]}

#: Other forms of the same dump, made from it outside.
FORMS = {
    "zlib": ["-c", "-d", "31"],
    "lzo": ["-l", "-d", "31"],
    "snappy": ["-p", "-d", "31"],
    "zstd": ["-z", "-d", "31"],
    "flattened": ["-F", "-l", "-d", "31"],
}


@dataclass(frozen=True)
class Crashed:
    folder: Path
    kernel: Kernel
    truth: dict[str, Any]

    def options(self, name: str) -> TargetOptions:
        return TargetOptions(core=self.folder / name, symbols=(self.kernel.vmlinux,))

    def process(self, name: str) -> dict[str, Any]:
        (found,) = (p for p in self.truth["processes"] if p["name"] == name)
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="module", params=[Stock("trixie", "x86_64", "6.12")], ids=str)
def crashed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crashed]:
    stock = request.param
    folder = tmp_path_factory.mktemp("crashed")
    try:
        kernel = debian_kernel(stock.suite, stock.architecture, stock.series)
        truth = crash(stock.suite, kernel, FILTERS, folder)
    except (MissingToolError, ArchiveUnreachableError) as error:
        pytest.skip(str(error))
    yield Crashed(folder, kernel, truth)
    shutil.rmtree(folder)


def answer(
    crashed: Crashed, name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, Any]]:
    target = ["-c", str(crashed.folder / name), "-s", str(crashed.kernel.vmlinux)]
    status = run([*target, *arguments, "--format", "json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", FILTERS)
def test_counted(crashed: Crashed, name: str) -> None:
    with open_target(crashed.options(name)) as target:
        summary = summarise(target.prog, scan_memmap(target.prog))
    assert summary.counter is not None
    assert summary.complete
    assert summary.difference == 0
    # Written down an instant before; the page tables of what ran in between.
    told = crashed.truth["kernel"]["nr_page_table_pages"]
    assert summary.counter.exact_pages == pytest.approx(told, abs=32)


@pytest.mark.parametrize("name", FILTERS)
def test_resting_processes(crashed: Crashed, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = answer(crashed, name, ["ps"], capsys)
    rows = {row["pid"]: row for row in found["tables"]["spaces"]}
    for process in crashed.truth["processes"]:
        row = rows[process["pid"]]
        told = crashed.truth["kernel"]["status"][str(process["pid"])]["VmPTE"]
        assert row["space"].startswith(process["name"])
        assert row["pgtables_KiB"] == int(told)
        # Tables count where they are reached, whether or not they can be read.
        assert row["walked_KiB"] == row["pgtables_KiB"]


@pytest.mark.parametrize("name", FILTERS)
def test_pagemap(crashed: Crashed, name: str) -> None:
    with open_target(crashed.options(name)) as target:
        paging, spaces = paging_of(target.prog), find_spaces(target.prog)
        for name in ("sparse", "dense"):
            process = crashed.process(name)
            space = spaces.of_pid(process["pid"])
            assert space is not None
            found = walk_address(target.prog, paging, space.root, process["start"])
            assert process["pagemap"] >> 63
            frame = process["pagemap"] & (1 << 55) - 1
            assert found.physical == frame * paging.page_bytes


@pytest.mark.parametrize("name", FILTERS)
def test_nothing_of_page_tables_is_left_out(
    crashed: Crashed, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables without any entry are pages of zeroes: the filter keeps them, as zeroes."""
    status, found = answer(crashed, name, ["summary"], capsys)
    assert (status, found["missing"]) == (0, [])
    process = crashed.process("emptied")
    _, found = answer(crashed, name, ["ps"], capsys)
    (row,) = (r for r in found["tables"]["spaces"] if r["pid"] == process["pid"])
    assert row["empty_tables"] == process["pages"]


def test_what_is_left_out_is_not_zero(crashed: Crashed) -> None:
    """A page of a process is not in the dump: told apart from an empty one."""
    pages = [p["pagemap"] & (1 << 55) - 1 for p in crashed.truth["processes"] if p["pagemap"] >> 63]
    with open_target(crashed.options("d31")) as target:
        assert "filtered dump (makedumpfile -d 31)" in target.notes[0]
        page_bytes = paging_of(target.prog).page_bytes
        for frame in pages:
            with pytest.raises(FaultError, match="Excluded page"):
                target.prog.read(frame * page_bytes, 8, True)
    with open_target(crashed.options("d1")) as target:
        for frame in pages:
            assert target.prog.read(frame * page_bytes, 2, True) == b"\1\0"


def test_check(crashed: Crashed, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is found in a healthy kernel that somebody crashed, and everything could be seen."""
    status, found = answer(crashed, "d31", ["check"], capsys)
    assert (status, found["tables"]["findings"], found["missing"]) == (0, [], [])
    passed = [row for row in found["tables"]["invariants"] if row["verdict"] == "pass"]
    assert len(passed) > 25


@pytest.fixture(scope="module")
def expected(crashed: Crashed) -> list[list[str]]:
    return spaces_of(crashed, "d31")


def spaces_of(crashed: Crashed, name: str) -> list[list[str]]:
    """Whose tables there are, and how many, at each level and in use."""
    with open_target(crashed.options(name)) as target:
        spaces = find_spaces(target.prog).spaces
        tables = walk_spaces(target.prog, paging_of(target.prog), spaces)
        assert tables.complete
        usage = space_usage(tables)
    rows = zip(spaces, usage.tables.tolist(), usage.leaf_entries.tolist())
    return [[space.name, str(counts), str(leaves)] for space, counts, leaves in rows]


@pytest.mark.parametrize("form", FORMS)
def test_forms(crashed: Crashed, form: str, expected: list[list[str]]) -> None:
    """The same answers from each format that makedumpfile writes."""
    source, made = crashed.folder / "d31", crashed.folder / form
    if form == "flattened":
        made.write_bytes(makedumpfile([*FORMS[form], source]))
    else:
        makedumpfile([*FORMS[form], source, made])
    assert spaces_of(crashed, made.name) == expected
    made.unlink()


def test_a_part_of_a_split_dump(
    crashed: Crashed, expected: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """drgn reads one file: the way out is told."""
    parts = [crashed.folder / f"split-{number}" for number in range(2)]
    makedumpfile(["--split", "-l", "-d", "31", crashed.folder / "d31", *parts])
    for part in parts:
        assert run(["-c", str(part), "-s", str(crashed.kernel.vmlinux), "ps"]) == 3
        assert "makedumpfile --reassemble" in capsys.readouterr().err
    whole = crashed.folder / "whole"
    makedumpfile(["--reassemble", *parts, whole])
    assert spaces_of(crashed, "whole") == expected
