# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel counts, beside what there is."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
from drgn import FaultError

from ptinspect.checks.context import Context
from ptinspect.checks.model import Finding, Severity, Tally, Value
from ptinspect.checks.registry import invariant, not_verified
from ptinspect.orphans import describe_orphans
from ptinspect.reached import census_missing
from ptinspect.tables.counters import read_nr_pagetable
from ptinspect.tables.scan import counted_pages
from ptinspect.tables.usage import space_usage


@invariant(
    "nr-pagetable-total",
    severity=Severity.ACCOUNTING,
    applies="the whole system",
    source="__pagetable_ctor(), pagetable_dtor() (include/linux/mm.h); mm/vmstat.c",
    false_positives="a CPU between typing and counting a table; 7.3's memory hot-remove frees "
    "without uncounting (free_pagetable() in arch/x86/mm/init_64.c)",
    breaks="a table freed without its destructor, or its page type written over",
)
def nr_pagetable_total(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    NR_PAGETABLE, with what CPUs have not folded in yet, is the number of typed pages.

    Every table is typed and counted by the same function: if the numbers differ, one was freed
    without it, or lost its type.
    """
    scan = context.census.scan
    if scan.unreadable_pages or not scan.order_known.all():
        tally.miss("not every struct page could be read: typed pages cannot be counted")
        return
    typed = int(counted_pages(context.prog, scan).sum())
    counter = read_nr_pagetable(context.prog)
    tally.examine(len(scan.pfns))
    if typed != counter.exact_pages:
        variable = context.prog["vm_node_stat"]
        yield Finding(
            "counter",
            int(variable.address_of_().value_()),
            f"{typed} pages are typed, NR_PAGETABLE is {counter.exact_pages}",
            (("typed_pages", typed), ("nr_pagetable", counter.exact_pages)),
            look="summary",
        )


@invariant(
    "typed-reachability",
    severity=Severity.LEAK,
    applies="every typed page",
    source="a table belongs to a tree, a deposit, a callback or batch that frees it, or a cache",
    false_positives="a table that was allocated and is not linked yet: only a CPU or a sleeping "
    "task's stack knows it (vmf->prealloc_pte, __pte_alloc()); empty ones are left out live",
    breaks="a table unlinked without being freed, an mm lost with all its tables",
)
def typed_reachability(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Each typed page is held by something: an address space, a deposit, or what will free it.

    Nothing will ever free the others.
    """
    census = context.census
    broken = _broken_rings(context)
    missing = [what for what in census_missing(census) if what not in broken]
    if missing:
        tally.miss(f"not everything that may hold a table was seen: {missing[0]}")
        return
    tally.examine(len(census.scan.pfns))
    known = describe_orphans(context.prog, census)
    if known.missing:
        tally.miss(f"a stack that may name a table was not seen: {known.missing[0]}")
    unnamed = [orphan for orphan in known.orphans if not orphan.on_its_way]
    for _ in range(len(known.orphans) - len(unnamed)):
        tally.leave("a kernel stack names it: on its way into a tree or out of one")
    if context.racing:
        # One empty table is like the next: nothing tells that it is the same at the next look.
        filled = [orphan for orphan in unnamed if orphan.filled]
        for _ in range(len(unnamed) - len(filled)):
            tally.leave("an empty table of a kernel that runs: may be a new one each time")
        unnamed = filled
    # What a CPU has just taken may be in its registers only: one table for each that does it.
    if len(unnamed) <= len(known.at_work):
        for _ in unnamed:
            tally.leave("a CPU takes tables out of a tree or frees them just now")
        return
    for orphan in unnamed:
        yield context.descriptor_finding(
            orphan.index,
            "nothing holds this table",
            # On a target that runs, these tell a table that stays from the next one in its page.
            contents=_checksum(context, orphan.pfn * context.paging.page_bytes),
            descriptor=zlib.crc32(census.scan.descriptors[orphan.index].tobytes()),
            last_used="; ".join(f"as {u.level}: {u.used} of {u.entries}" for u in orphan.used_as),
        )


def _broken_rings(context: Context) -> set[str]:
    """
    Get what is said to be missing because a ring of deposited tables is broken.

    Nothing is hidden there if all memory is: what lies behind the break is lost for the kernel too.
    """
    story = context.census.stories.deposits
    broken = [ring.space for ring in story.rings if ring.problem is not None]
    if not context.whole or any(context.busy(space) for space in broken):
        return set()
    return set(story.missing) - set(story.unseen)


def _checksum(context: Context, address: int) -> Value:
    """Get a number that stands for the contents of a page."""
    try:
        return zlib.crc32(context.prog.read(address, context.paging.page_bytes, True))
    except FaultError:
        return "unreadable"


@invariant(
    "mm-pgtables-bytes",
    severity=Severity.ACCOUNTING,
    applies="every mm but init_mm and efi_mm",
    source="mm_inc_nr_ptes() and its like (include/linux/mm.h); check_mm() (kernel/fork.c)",
    false_positives="a fault, fork or exit that has linked a table and not counted it yet",
    breaks="a table freed without being uncounted, or linked by hand",
)
def mm_pgtables_bytes(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    An mm has counted the bytes of the PTE, PMD and PUD tables that it has, deposited ones too.

    The count decides whom the OOM killer takes, and a rest at exit is a table that leaked.
    """
    usage = space_usage(context.tables)
    deposits = context.census.stories.deposits
    spare = np.zeros(len(context.tables.spaces), np.int64)
    unsure = set()
    for ring in deposits.rings:
        if ring.problem is None and ring.known:
            spare[ring.space] += len(ring.tables) * context.paging.levels[0].table_bytes
        else:
            unsure.add(ring.space)
    for number in np.flatnonzero(context.user_space).tolist():
        space = context.tables.spaces[number]
        assert space.mm is not None
        if not usage.complete[number] or number in unsure:
            tally.miss(f"not all tables of {space.name} could be seen")
            continue
        tally.examine(1)
        expected = int(usage.accounted_bytes[number] + spare[number])
        if expected == space.mm.pgtables_bytes:
            continue
        if deposits.unseen:
            tally.miss(f"not all deposits could be seen: {deposits.unseen[0]}")
            continue
        busy = context.busy(number)
        if busy:
            tally.leave(busy)
            continue
        yield context.mm_finding(
            number,
            f"pgtables_bytes is {space.mm.pgtables_bytes}, but there are {expected} bytes",
            pgtables_bytes=space.mm.pgtables_bytes,
            walked_bytes=int(usage.accounted_bytes[number]),
            deposited_bytes=int(spare[number]),
        )


not_verified(
    "memcg-pagetables",
    "A memory cgroup counts the page-table pages that are charged to it (memory.stat, pagetables).",
    "no exact rule holds: pages of a cgroup that is gone are counted off its parent, and each CPU "
    "keeps a part back; nr-pagetable-total checks the sum, memcg-data-sane each charge",
)
not_verified(
    "typed-by-constructor",
    "Kernel tables made by the generic constructors are marked PT_kernel.",
    "tables made in other ways are not marked, and memory does not tell who made one; the reverse "
    "is checked (pt-kernel-agrees)",
)
