# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Typed pages against reached tables, on a handful of both."""

from __future__ import annotations

import numpy as np
from drgn import Program

from ptinspect.census import UNKNOWN_LEVEL, Holder, HolderCount, LevelCount, join
from ptinspect.kernel.paging import EntryClass, Paging, Root, ppc64, s390x, x86_64
from ptinspect.reached import reached_summary
from ptinspect.tables.scan import MemmapScan
from ptinspect.tables.spaces import Space, SpaceKind, SpaceList
from ptinspect.tables.walk import RowState, Tables

X86 = x86_64.make_paging(five_levels=False)
SPACES = (
    Space(SpaceKind.KERNEL, Root(0x1000, 3, ((0, 512),))),
    Space(SpaceKind.USER, Root(0x2000, 3, ((0, 256),))),
)


def scan_of(pages: dict[int, int]) -> MemmapScan:
    """A scan that found descriptors: page frame to order."""
    pfns = np.array(sorted(pages), np.uint64)
    return MemmapScan(
        pfns=pfns,
        addresses=pfns * np.uint64(64),
        descriptors=np.zeros(len(pfns), np.dtype([("pt_flags", "<u8")])),
        orders=np.array([pages[int(pfn)] for pfn in pfns], np.uint8),
        order_known=np.ones(len(pfns), np.bool_),
        scanned_pages=1000,
        unreadable_pages=0,
    )


def tables_of(
    rows: list[tuple[int, int, int, int]],
    paging: Paging = X86,
    states: dict[int, RowState] | None = None,
) -> Tables:
    """Rows of (space, level, address, parent row)."""
    count = len(rows)
    state = np.zeros(count, np.uint8)
    first = np.full(count, -1, np.int32)
    counts = np.zeros((count, len(EntryClass)), np.uint16)
    counts[:, EntryClass.LEAF] = 3
    for row, value in (states or {}).items():
        state[row] = value
        if value == RowState.SHARED:
            first[row] = next(r for r in range(row) if rows[r][2] == rows[row][2])
    return Tables(
        paging=paging,
        spaces=SPACES,
        space=np.array([row[0] for row in rows], np.uint32),
        level=np.array([row[1] for row in rows], np.uint8),
        state=state,
        address=np.array([row[2] for row in rows], np.uint64),
        va=np.zeros(count, np.uint64),
        parent=np.array([row[3] for row in rows], np.int32),
        index=np.zeros(count, np.uint16),
        permissions=np.zeros(count, np.uint8),
        first=first,
        counts=counts,
    )


SPACE_LIST = SpaceList(SPACES, ())


def test_each_descriptor_once_with_what_reaches_it() -> None:
    tables = tables_of([(0, 3, 0x1000, -1), (1, 3, 0x2000, -1), (1, 2, 0x3000, 1)])
    census = join(Program(), SPACE_LIST, tables, scan_of({2: 0, 3: 0, 9: 0}))
    assert census.descriptor.tolist() == [-1, 0, 1]
    assert census.level.tolist() == [3, 2, UNKNOWN_LEVEL]
    assert census.holder.tolist() == [Holder.TREE, Holder.TREE, Holder.UNEXPLAINED]
    assert census.unexplained().tolist() == [2]
    assert census.untyped_rows().tolist() == [0]
    assert census.levels() == [
        LevelCount(2, False, 1, 0),
        LevelCount(3, False, 1, 0),
        LevelCount(3, True, 0, 1),
    ]
    assert census.first_spaces().tolist() == [1, 1, -1]
    assert census.reached_counts().tolist() == [1, 1, 0]
    (owner,) = census.owners_of(1)
    assert owner.entry_address == 0x2000
    assert census.index_of_pfn(9) == 2
    assert census.index_of_pfn(8) is None
    assert census.complete


def test_shared_table_is_one_descriptor_with_two_spaces() -> None:
    tables = tables_of(
        [(0, 3, 0x1000, -1), (1, 3, 0x2000, -1), (0, 2, 0x3000, 0), (1, 2, 0x3000, 1)],
        states={3: RowState.SHARED},
    )
    census = join(Program(), SPACE_LIST, tables, scan_of({3: 0}))
    assert census.reached_counts().tolist() == [2]
    assert [space.kind for space in census.spaces_of(0)] == [SpaceKind.KERNEL, SpaceKind.USER]
    assert census.entry_counts()[0, EntryClass.LEAF] == 3
    assert {owner.entry_address for owner in census.owners_of(0)} == {0x1000, 0x2000}


def test_compound_page_covers_its_tail_pages() -> None:
    paging = s390x.make_paging(present_bits=False)
    tables = tables_of([(0, 2, 0x14000, -1), (1, 2, 0x1B000, -1)], paging)
    census = join(Program(), SPACE_LIST, tables, scan_of({0x14: 2, 0x18: 2}))
    assert census.descriptor.tolist() == [0, 1]
    assert census.index_of_pfn(0x17) == 0


def test_fragments_share_a_descriptor() -> None:
    paging = ppc64.make_paging(page_shift=16)
    tables = tables_of([(1, 0, 0x20000 + 256 * n, -1) for n in (0, 5, 255)], paging)
    census = join(Program(), SPACE_LIST, tables, scan_of({2: 0, 3: 0}))
    assert census.descriptor.tolist() == [0, 0, 0]
    assert census.rows_of(0).tolist() == [0, 1, 2]
    assert census.rows_of(1).tolist() == []
    assert census.entry_counts()[0, EntryClass.LEAF] == 9


def test_table_at_two_levels_is_a_conflict() -> None:
    tables = tables_of([(0, 3, 0x1000, -1), (0, 2, 0x3000, 0), (0, 1, 0x3000, 1)])
    census = join(Program(), SPACE_LIST, tables, scan_of({1: 0, 3: 0}))
    assert census.level_conflict.tolist() == [False, True]


def test_what_is_no_table_reaches_nothing() -> None:
    tables = tables_of(
        [(0, 3, 0x1000, -1), (0, 2, 0x1000, 0), (0, 2, 0x9000, 0)],
        states={1: RowState.CYCLE, 2: RowState.OUTSIDE},
    )
    census = join(Program(), SPACE_LIST, tables, scan_of({1: 0, 9: 0}))
    assert census.reached_counts().tolist() == [1, 0]
    assert not census.complete
    assert census.levels() == [LevelCount(3, True, 1, 0)]


def test_explaining_what_no_tree_reaches() -> None:
    census = join(
        Program(), SPACE_LIST, tables_of([(0, 3, 0x1000, -1)]), scan_of({1: 0, 5: 0, 6: 0})
    )
    pfns = np.array([1, 5, 77], np.uint64)
    assert census.explain(pfns, Holder.DEPOSIT).tolist() == [1]
    assert census.explain(pfns, Holder.RCU).tolist() == []
    assert census.holder.tolist() == [Holder.TREE, Holder.DEPOSIT, Holder.UNEXPLAINED]


def test_nothing_typed_and_nothing_reached() -> None:
    census = join(Program(), SPACE_LIST, tables_of([(0, 3, 0x1000, -1)]), scan_of({}))
    assert census.descriptor.tolist() == [-1]
    assert census.unexplained().tolist() == []
    assert census.nbytes() > 0


def test_holders_are_counted_in_pages() -> None:
    paging = s390x.make_paging(present_bits=False)
    tables = tables_of([(0, 2, 0x14000, -1)], paging)
    census = join(Program(), SPACE_LIST, tables, scan_of({0x14: 2, 0x18: 2, 0x20: 0, 0x21: 0}))
    census.explain(np.array([0x19, 0x20], np.uint64), Holder.RCU)
    assert census.holder_counts() == [
        HolderCount(Holder.UNEXPLAINED, 1, 1),
        HolderCount(Holder.TREE, 1, 4),
        HolderCount(Holder.RCU, 2, 5),
    ]
    summary = list(
        reached_summary(census, np.zeros(1, np.int64), np.zeros((1, 1), np.uint16)).holders
    )
    assert [(h.holder, h.descriptors, h.pages, h.bytes) for h in summary] == [
        ("rcu", 2, 5, 5 * 4096),
        ("tree", 1, 4, 4 * 4096),
        ("unexplained", 1, 1, 4096),
    ]
