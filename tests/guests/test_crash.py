# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The same x86_64 dump looked at by crash: its vtop, and its count of page-table pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from resting import Running

from lab.archive import ArchiveUnreachableError
from lab.crash import ask_crash
from ptinspect import scan_memmap
from ptinspect.kernel.paging import EntryClass, paging_of
from ptinspect.tables.lookup import walk_address
from ptinspect.tables.physical import physical_ranges
from ptinspect.tables.ranges import map_space
from ptinspect.tables.spaces import SpaceKind, find_spaces
from ptinspect.target import TargetOptions, open_target

pytestmark = pytest.mark.guest

#: Addresses asked for in each space.
MOST_ADDRESSES = 40

#: Where crash does not look at page tables. Between the CPU entry areas and the kernel's text (with
#: the ESPFIX stacks and the EFI services) it takes every address for one of the direct map, and
#: the fixmap, behind the modules, for kernel text.
NOT_WALKED = (
    range(0xFFFFFE0000000000, 0xFFFFFFFF80000000),
    range(0xFFFFFFFFFF000000, 1 << 64),
)

_VTOP = re.compile(r"^VIRTUAL +PHYSICAL *\n([0-9a-f]+) +([0-9a-f]+|\(not mapped\))", re.M)


def test_crash_agrees(running: Running, tmp_path: Path) -> None:
    if running.kernel.arch.name != "x86_64":
        pytest.skip("crash here is a program for x86_64 dumps")
    core = tmp_path / "vmcore"
    running.guest.stop()
    try:
        running.guest.dump(core)
    finally:
        running.guest.cont()
    asked: list[tuple[int, int]] = []
    commands = []
    symbols = (running.kernel.vmlinux,)
    with open_target(TargetOptions(core=core, symbols=symbols)) as target:
        prog = target.prog
        paging = paging_of(prog)
        memory = physical_ranges(prog)
        typed = len(scan_memmap(prog).pfns)
        spaces = find_spaces(prog)
        for space in spaces.spaces:
            if space.kind not in (SpaceKind.USER, SpaceKind.KERNEL):
                continue
            if space.kind is SpaceKind.USER and not space.tasks:
                continue
            ranges = map_space(prog, paging, space, kinds=[EntryClass.LEAF], memory=memory).ranges
            if space.tasks:
                commands.append(f"set {space.tasks[0].pid}")
            step = max(1, len(ranges) // MOST_ADDRESSES)
            for area in ranges[::step]:
                if space.kernel and any(area.start in unknown for unknown in NOT_WALKED):
                    continue
                for address in {area.start, area.end - 1}:
                    found = walk_address(
                        prog, paging, space.root, address, memory=memory, kernel=space.kernel
                    )
                    assert found.physical is not None
                    asked.append((address, found.physical))
                    commands.append(f"vtop {'-k' if space.kernel else '-u'} {address:x}")
    try:
        answer = ask_crash(core, running.kernel.vmlinux, [*commands, "kmem -m page_type"])
    except ArchiveUnreachableError as error:
        pytest.skip(str(error))
    told = [(int(a, 16), b) for a, b in _VTOP.findall(answer)]
    assert [a for a, _ in told] == [a for a, _ in asked]
    assert [(hex(a), b) for a, b in told] == [(hex(a), f"{p:x}") for a, p in asked]
    assert len(asked) > 500
    types = re.findall(r"^[0-9a-f]{16} +([0-9]+) *$", answer, re.M)
    assert types.count(str(0xF2000000)) == typed
