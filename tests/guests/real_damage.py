# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Kernels that run, damaged through QEMU's debug stub, and whether ``check`` sees it.

The damage is that of the samples (tests/samples/corruptions.py), done to live memory; here are some
more that people meet. ``scripts/damage`` does all of it to a kernel of choice.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

from corruptions import CORRUPTIONS, Corruption
from damage import Damage, NotHereError
from drgn import Program
from overlay import Mendable

from lab.guest import Guest
from lab.stub import Stub
from ptinspect.census import take_census
from ptinspect.checks import Verdict, run_checks
from ptinspect.checks.run import persisting
from ptinspect.kernel.direct_map import physical_to_virtual

#: Seconds that a damaged kernel runs on before it is looked at.
RUN_ON = 0.2

#: On the architectures that have such lists (include/linux/poison.h).
_LIST_POISON1 = 0xDEAD000000000100


class GuestMemory(Mendable):
    """The memory of a guest that is stopped whenever it is changed."""

    def __init__(self, prog: Program, guest: Guest) -> None:
        super().__init__(prog)
        self._guest = guest

    def _store(self, physical: int, data: bytes) -> None:
        with Stub(self._guest.stub_socket) as stub:
            stub.write(physical, data)


class Wrong(NamedTuple):
    """Something that goes wrong with page tables in a kernel."""

    name: str
    #: Id of the invariant that has to find it.
    invariant: str
    corruption: Corruption


def cut_a_list(d: Damage) -> int:
    """As if a table had been freed that was on a list: its next pointer is poisoned."""
    for found in d.census.stories.lists.lists:
        if len(found.pfns) > 1:
            d.write_page_member(found.pfns[0], "pt_list.next", _LIST_POISON1)
            return found.head
    raise NotHereError("no descriptor is on a list of this kernel")


def leave_a_deposit(d: Damage) -> int:
    """As if a table had been withdrawn from a ring and used, and pmd_huge_pte still named it."""
    story = d.census.stories.deposits
    if not story.supported or story.in_mm:
        raise NotHereError("PMD tables of this kernel have no deposits")
    kept = {ring.ptdesc for ring in story.rings}
    for row in d.rows(0):
        index = d.index(int(d.tables.parent[row]))
        ptdesc = int(d.census.scan.addresses[index])
        if ptdesc in kept:
            continue
        if story.node_in_table:
            spare = physical_to_virtual(d.prog, int(d.tables.address[row]))
        else:
            spare = int(d.census.scan.addresses[d.index(row)])
        return d.write_member(index, "pmd_huge_pte", spare)
    raise NotHereError("every PMD table has deposits")


#: What is done to kernels that run, in the order in which all of it is done to one at a time.
WRONGS = (
    Wrong("leaked table", "typed-reachability", CORRUPTIONS["typed-reachability"]),
    Wrong("table linked twice", "tree-single-parent", CORRUPTIONS["tree-single-parent"]),
    Wrong("stale pmd_huge_pte", "deposit-ring-sane", leave_a_deposit),
    Wrong("wrong pgtables_bytes", "mm-pgtables-bytes", CORRUPTIONS["mm-pgtables-bytes"]),
    Wrong("wrong pt_frag_refcount", "ppc-frag-refcount", CORRUPTIONS["ppc-frag-refcount"]),
    Wrong("wrong pt_index of a gmap", "gmap-crst-index", CORRUPTIONS["gmap-crst-index"]),
    Wrong("wrong pt_mm", "x86-pgd-mm", CORRUPTIONS["x86-pgd-mm"]),
    Wrong("broken list of tables", "list-integrity", cut_a_list),
)


@dataclass(frozen=True)
class Outcome:
    """What became of one damage."""

    wrong: Wrong
    #: Whether a finding of the invariant has the right address; ``None`` if there is no such thing.
    caught: bool | None
    #: Why there is no such thing, or what was found instead.
    why: str = ""
    #: Other invariants that fire too.
    others: tuple[str, ...] = ()
    #: What was still found when the damage had been undone.
    left: tuple[str, ...] = ()


def run_on(guest: Guest) -> None:
    """Let a stopped guest run for a moment."""
    guest.cont()
    time.sleep(RUN_ON)
    guest.stop()


def strike(guest: Guest, prog: Program, wrong: Wrong) -> Outcome:
    """
    Damage a guest that is stopped, let it run on, see what is found, and mend it.

    As ``ptinspect --pause check`` does, the guest is looked at twice, and runs on in between.
    """
    with ExitStack() as stack:
        try:
            damage = Damage(GuestMemory(prog, guest), take_census(prog), stack)
            expected = wrong.corruption(damage)
        except NotHereError as error:
            return Outcome(wrong, None, str(error))
        run_on(guest)
        first = run_checks(prog)
        fired = {finding.invariant for finding in first.findings}
        results = first
        if fired:
            run_on(guest)
            results = persisting(first, run_checks(prog, only=fired))
    run_on(guest)
    left = tuple(f"{f.invariant}: {f.message}" for f in run_checks(prog).findings)
    found = [finding for finding in results.findings if finding.invariant == wrong.invariant]
    others = tuple(sorted({finding.invariant for finding in results.findings} - {wrong.invariant}))
    failed = [r.invariant.id for r in first.results if r.verdict is Verdict.FAILED]
    if failed:
        return Outcome(wrong, False, f"{failed[0]} failed", others, left)
    places = sorted({finding.address for finding in found})
    if expected in places:
        return Outcome(wrong, True, "", others, left)
    why = f"expected {expected:#x}, found {[hex(place) for place in places]}"
    return Outcome(wrong, False, why, others, left)


def strike_all(guest: Guest, prog: Program, stack: ExitStack) -> list[tuple[Wrong, int]]:
    """
    Do everything to a guest at once, until the stack is closed.

    :return: What could be done, and the address at which it has to be found.
    """
    done = []
    for wrong in WRONGS:
        try:
            damage = Damage(GuestMemory(prog, guest), take_census(prog), stack)
            done.append((wrong, wrong.corruption(damage)))
        except NotHereError:
            continue
    return done
