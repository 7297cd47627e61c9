# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What the kernel itself says of damage when it comes upon it: the same as ``check`` said before.

Two processes with damage in their page tables end. The kernel tears them down, and complains in its
log; the leak that stays is then of its own making.
"""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from damage import Damage
from real_damage import GuestMemory, ask_check, complaints, run_on
from resting import Busy, Stock, busy_guest

from lab.stub import Stub
from ptinspect.census import take_census
from ptinspect.checks import CheckResults, run_checks
from ptinspect.tables.lookup import walk_address
from ptinspect.target import open_target

pytestmark = pytest.mark.guest

KERNEL = Stock("trixie", "x86_64", "6.12")


def test_the_kernel_agrees(tmp_path: Path) -> None:
    with (
        # The third lives on: else the last mm that the CPU had stays, and is not looked at.
        busy_guest(KERNEL, "lab_quiet=1 lab_mortal=3", cpus=1, text="@@begun") as running,
        open_target(running.watched) as target,
        ExitStack() as stack,
    ):
        prog, guest = target.prog, running.guest
        guest.stop()
        assert run_checks(prog).findings == ()
        d = Damage(GuestMemory(prog, guest), take_census(prog), stack)
        counted, leaking = d.space("mortal-0"), d.space("mortal-1")
        size = d.paging.levels[0].table_bytes
        counter = d.context.mm(counted).pgtables_bytes.counter  # type: ignore[union-attr]
        d.write_object(counter, int(counter) + 2 * size)
        row = table_of(d, leaking, addresses(running)[1] + d.paging.levels[1].entry_span)
        leaked = int(d.census.scan.addresses[d.index(row)])
        d.write_entry(d.entry_address(row), d.paging.levels[1].empty)
        assert found(run_checks(prog)) == {
            ("mm-pgtables-bytes", d.tables.spaces[counted].mm.address),  # type: ignore[union-attr]
            ("mm-pgtables-bytes", d.tables.spaces[leaking].mm.address),  # type: ignore[union-attr]
            ("typed-reachability", leaked),
        }
        assert complaints(prog) == []

        for space, address in zip((counted, leaking), addresses(running)):
            root = d.tables.spaces[space].root
            physical = walk_address(prog, d.paging, root, address).physical
            assert physical is not None
            with Stub(guest.stub_socket) as stub:
                stub.write(physical, b"\0")
        said = wait_for_complaints(running, d, 2)
        # check_mm() in kernel/fork.c, once for each of them.
        left = re.findall(r"non-zero pgtables_bytes on freeing mm: (-?\d+)", said)
        assert sorted(map(int, left)) == [size, 2 * size]
        # The page that the lost table maps is lost, too.
        assert re.findall(r"Bad rss-counter state .*:(\w+) val:(-?\d+)", said) == [
            ("MM_ANONPAGES", "1")
        ]

        # Now nothing is left of those processes, but the table that nobody will free.
        expected = {("typed-reachability", leaked)}
        assert found(run_checks(prog)) == expected
        core = tmp_path / "core"
        guest.dump(core)
        assert ask_check("-c", core, "-s", running.kernel.vmlinux) == expected
        guest.cont()
        assert found(run_checks(prog, racing=True)) == expected
        guest.stop()


def addresses(running: Busy) -> list[int]:
    """Where the processes have their tables, in their order."""
    said = re.findall(r"@@mortal (0x[0-9a-f]+)\n", running.guest.console())
    return [int(word, 16) for word in said]


def table_of(d: Damage, space: int, va: int) -> int:
    """Get the row of the PTE table that begins at an address of a process."""
    rows = np.array(d.rows(0, space=space))
    (row,) = rows[d.tables.va[rows] == np.uint64(va)]
    return int(row)


def found(results: CheckResults) -> set[tuple[str, int]]:
    return {(finding.invariant, finding.address) for finding in results.findings}


def wait_for_complaints(running: Busy, d: Damage, number: int) -> str:
    """Let the guest run until the kernel has complained as often about counts, and stop it."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        run_on(running.guest)
        said = "\n".join(complaints(d.prog))
        if said.count("pgtables_bytes") >= number:
            return said
    raise AssertionError(f"the kernel did not complain: {said}")
