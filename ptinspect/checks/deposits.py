# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The spare tables that wait beside huge pages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ptinspect.checks.context import Context
from ptinspect.checks.model import Finding, NotApplicableError, Severity, Tally
from ptinspect.checks.registry import invariant, not_verified
from ptinspect.memory import read_blocks
from ptinspect.state.deposits import DepositRing, Deposits, ring_name
from ptinspect.tables.entries import raw_entries

#: Bytes at the start of a spare table that are the list node, where the node is in the table.
_NODE_BYTES = 16


def _deposits(context: Context) -> Deposits:
    story = context.census.stories.deposits
    if not story.supported:
        raise NotApplicableError("this kernel has no transparent huge pages")
    return story


def _ring_finding(context: Context, ring: DepositRing, message: str, **evidence: int) -> Finding:
    space = context.tables.spaces[ring.space]
    table = ring.pmd_tables[0] if ring.pmd_tables else 0
    if ring.ptdesc is None:
        assert space.mm is not None
        kind, address = "mm", space.mm.address
    else:
        kind, address = "ptdesc", ring.ptdesc
    return Finding(
        kind,
        address,
        f"{ring_name(ring, context.tables)}: {message}",
        (("pmd_table", table), *evidence.items()),
        space.name,
        f"show phys:{table:#x}",
    )


def _story_missing(story: Deposits, tally: Tally) -> None:
    # A broken ring is a finding of deposit-ring-sane.
    for what in story.unseen:
        tally.miss(what)


@invariant(
    "deposit-count",
    severity=Severity.CORRUPTION,
    applies="PMD tables of mms on kernels with transparent huge pages",
    source="pgtable_trans_huge_deposit() and _withdraw(); has_deposited_pgtable() in 7.x, "
    "zap_huge_pmd() before (mm/huge_memory.c)",
    false_positives="a fault or a zap in the middle of it (the lock of the PMD table is held)",
    breaks="a huge page split or zapped without its spare table, or one deposited twice",
)
def deposit_count(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A PMD table has as many deposited tables as it maps huge pages that need one.

    With too few, the split of a huge page takes a table that is not there; with too many, the
    rest leaks when the process ends.
    """
    story = _deposits(context)
    _story_missing(story, tally)
    for ring in story.rings:
        if ring.agrees is None:
            continue
        tally.examine(1)
        if ring.agrees:
            continue
        if not context.whole:
            tally.miss(f"{ring_name(ring, context.tables)}: not every page was seen")
            continue
        busy = context.busy(ring.space)
        if busy:
            tally.leave(busy)
            continue
        yield _ring_finding(
            context,
            ring,
            f"{len(ring.tables)} tables deposited, {ring.needed} huge pages need one",
            deposited=len(ring.tables),
            needed=ring.needed,
            may_need=ring.undecided,
        )


@invariant(
    "deposit-ring-sane",
    severity=Severity.CORRUPTION,
    applies="every ring of deposited tables",
    source="pgtable_trans_huge_deposit(): mm/pgtable-generic.c, arch/s390/mm/pgtable.c, "
    "arch/powerpc/mm/book3s64/radix_pgtable.c",
    false_positives="a fault or a zap in the middle of it (the lock of the PMD table is held)",
    breaks="a deposited table freed or used, a write over its first bytes or its descriptor",
)
def deposit_ring_sane(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The deposited tables of a PMD table form a closed ring of page tables that nobody else has.

    A broken ring ends in a list corruption when the next huge page is split.
    """
    story = _deposits(context)
    for ring in story.rings:
        if not ring.known:
            tally.miss(f"{ring_name(ring, context.tables)}: where its ring begins cannot be read")
            continue
        tally.examine(1)
        if ring.problem is None:
            continue
        if not context.whole:
            tally.miss(f"{ring_name(ring, context.tables)}: {ring.problem}")
            continue
        busy = context.busy(ring.space)
        if busy:
            tally.leave(busy)
            continue
        yield _ring_finding(context, ring, ring.problem, seen=len(ring.tables))


@invariant(
    "deposit-empty",
    severity=Severity.CORRUPTION,
    applies="every deposited table",
    source="pte_alloc_one() gives empty tables; __split_huge_pmd_locked() relies on it",
    false_positives="none known",
    breaks="a table deposited while it was in use, a stray write",
)
def deposit_empty(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A deposited table has no entries (but for the list node, where that lies in the table).

    When the huge page is split, whatever is there becomes a mapping.
    """
    story = _deposits(context)
    _story_missing(story, tally)
    paging = context.paging
    level = paging.levels[0]
    spaces = [(table, ring.space) for ring in story.rings for table in ring.tables]
    addresses = np.array([table for table, _ in spaces], np.uint64)
    blocks = read_blocks(context.prog, addresses, level.table_bytes)
    first = _NODE_BYTES // 8 if story.node_in_table else 0
    unread = int(np.count_nonzero(~blocks.readable))
    if unread:
        tally.miss(f"{unread} deposited tables could not be read")
    raw = raw_entries(blocks.data)[:, first:]
    values = paging.values(raw)
    # NONE: what the hardware may set in an empty entry (x86, ppc64) is no entry.
    filled = paging.classify(values, 0) != 0
    tally.examine(np.count_nonzero(blocks.readable))
    for place in np.flatnonzero(filled.any(axis=1) & blocks.readable).tolist():
        slot = int(np.flatnonzero(filled[place])[0])
        table, space = spaces[place]
        yield Finding(
            "table",
            table,
            "a deposited table is not empty",
            (
                ("entry_at", table + 8 * (slot + first)),
                ("entry", int(values[place, slot])),
                ("entries", int(np.count_nonzero(filled[place]))),
            ),
            context.tables.spaces[space].name,
            f"show phys:{table:#x}",
        )


not_verified(
    "hash-deposit-slot",
    "A PMD entry of the hash MMU that maps no huge page has no spare table in the slot behind it.",
    "page tables of ppc64's hash MMU are not walked: drgn translates on the radix MMU only",
)
