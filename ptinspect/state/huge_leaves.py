# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The entries of PMD tables that map huge pages, and what kind of page each of them maps."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Object, Program, offsetof, sizeof
from drgn.helpers.linux.mm import compound_head

from ptinspect.kernel.descriptor import byte_order
from ptinspect.kernel.paging import EntryClass
from ptinspect.kernel.paging.model import object_or_none
from ptinspect.memory import AddressArray, BoolArray, iter_blocks, read_blocks
from ptinspect.state.mappings import Mappings, is_dax, is_hugetlb
from ptinspect.state.pmd_tables import PMD_LEVEL, PmdTables
from ptinspect.tables.entries import filled_entries, raw_entries
from ptinspect.tables.memmap import Memmap
from ptinspect.tables.walk import RowState, Tables

#: Bit 0 of ``mapping``: an anonymous page (include/linux/page-flags.h).
_MAPPING_ANON = np.uint64(1)

#: Entries that stand for a huge page; the last two name it as the offset of a swap entry.
_PRESENT = (EntryClass.LEAF, EntryClass.PROT_NONE)
_MOVING = (EntryClass.MIGRATION, EntryClass.SPECIAL)


class HugePage(IntEnum):
    """What a PMD entry maps, as far as it matters for deposits."""

    #: A transparent huge page of anonymous memory: one table is deposited for it.
    ANONYMOUS = 0
    #: The huge zero page: as anonymous ones, but not in a DAX mapping.
    ZERO = 1
    #: Files, hugetlb, device memory, frame buffers: no table is deposited.
    OTHER = 2
    #: Cannot be told: it is being moved, or what tells it cannot be read.
    UNDECIDED = 3


class HugeLeaves(NamedTuple):
    """Arrays of one length."""

    #: intp, index into :attr:`PmdTables.rows`.
    table: npt.NDArray[np.intp]
    #: uint8 of :class:`HugePage`.
    kind: npt.NDArray[np.uint8]
    #: Tables whose entries could not be read.
    unreadable_tables: int


def read_huge_leaves(prog: Program, tables: Tables, pmds: PmdTables) -> HugeLeaves:
    """
    Find every huge entry of PMD tables and what it maps.

    Source: has_deposited_pgtable() in mm/huge_memory.c (7.x), zap_huge_pmd() there (before).
    """
    found = _entries(prog, tables, pmds)
    kind = np.full(len(found.table), HugePage.UNDECIDED, np.uint8)
    present = np.isin(found.entry_class, _PRESENT)
    zero = present & (found.pfn == np.uint64(_huge_zero_pfn(prog)))
    kind[zero] = HugePage.ZERO
    others = np.flatnonzero(present & ~zero)
    kind[others] = _page_kinds(prog, found.pfn[others], HugePage.OTHER)
    # What is being moved, device memory, a broken page of hugetlb: the swap entry names the page.
    moving = np.flatnonzero(~present & found.known)
    kind[moving] = _page_kinds(prog, found.pfn[moving], HugePage.UNDECIDED)
    mappings = Mappings(prog)
    rows = pmds.rows[found.table]
    for place in np.flatnonzero(zero).tolist():
        vma = mappings.at(tables.spaces[tables.space[rows[place]]], int(found.va[place]))
        dax = None if vma is None else is_dax(vma)
        if dax is not False:
            kind[place] = HugePage.UNDECIDED if dax is None else HugePage.OTHER
    if not _types_hugetlb(prog):
        for place in np.flatnonzero(kind == HugePage.ANONYMOUS).tolist():
            vma = mappings.at(tables.spaces[tables.space[rows[place]]], int(found.va[place]))
            hugetlb = None if vma is None else is_hugetlb(vma)
            if hugetlb is not False:
                kind[place] = HugePage.UNDECIDED if hugetlb is None else HugePage.OTHER
    return HugeLeaves(found.table, kind, found.unreadable_tables)


class _Entries(NamedTuple):
    table: npt.NDArray[np.intp]
    va: AddressArray
    #: Page frame, where *known*.
    pfn: npt.NDArray[np.uint64]
    known: BoolArray
    entry_class: npt.NDArray[np.uint8]
    unreadable_tables: int


def _entries(prog: Program, tables: Tables, pmds: PmdTables) -> _Entries:
    paging = tables.paging
    level = paging.levels[PMD_LEVEL]
    counts = tables.counts[pmds.rows]
    huge = counts[:, (*_PRESENT, *_MOVING)].any(axis=1)
    lost = ~tables.counted[pmds.rows]
    wanted = np.flatnonzero(huge & ~lost)
    wanted = wanted[np.argsort(tables.address[pmds.rows[wanted]], kind="stable")]
    addresses = tables.address[pmds.rows[wanted]]
    unreadable = int(np.count_nonzero(tables.state[pmds.rows] == RowState.UNREADABLE))
    parts: list[tuple[Any, ...]] = []
    for batch in iter_blocks(prog, addresses, level.table_bytes):
        here = wanted[batch.first : batch.first + len(batch.data)]
        raw = raw_entries(batch.data)
        if batch.readable is not None:
            unreadable += int(np.count_nonzero(~batch.readable))
            here, raw = here[batch.readable], raw[batch.readable]
        entries = filled_entries(paging, raw, PMD_LEVEL)
        keep = np.isin(entries.kind, (*_PRESENT, *_MOVING))
        slot, values = entries.slot[keep], entries.value[keep]
        table = here[entries.row[keep]]
        va = tables.va[pmds.rows[table]] + (slot.astype(np.uint64) << np.uint64(level.shift))
        kind = entries.kind[keep]
        target, known = paging.leaf_targets(values, PMD_LEVEL, slot), np.isin(kind, _PRESENT)
        moved = paging.swap_targets(values, PMD_LEVEL)
        if moved is not None:
            target, known = np.where(known, target, moved), np.ones(len(known), np.bool_)
        pfn = target // np.uint64(paging.page_bytes)
        parts.append((table, paging.canonical(va), pfn, known, kind))
    if not parts:
        nothing = np.empty(0, np.uint64)
        none = np.empty(0, np.bool_)
        parts.append((np.empty(0, np.intp), nothing, nothing, none, np.empty(0, np.uint8)))
    table, va, pfn, known, kind = (np.concatenate(column) for column in zip(*parts))
    # In order of address, so that neighbours are in the same mapping.
    order = np.lexsort((va, tables.space[pmds.rows[table]]))
    return _Entries(table[order], va[order], pfn[order], known[order], kind[order], unreadable)


def _huge_zero_pfn(prog: Program) -> int:
    # ~0UL (or HUGE_ZERO_UNSET_PFN) while there is no such page (mm/huge_memory.c).
    variable = object_or_none(prog, "huge_zero_pfn")
    try:
        return (1 << 64) - 1 if variable is None else int(variable.value_())
    except FaultError:
        return (1 << 64) - 1


def _page_kinds(
    prog: Program, pfns: npt.NDArray[np.uint64], without: HugePage
) -> npt.NDArray[np.uint8]:
    """
    Tell anonymous pages from others: uint8 of :class:`HugePage`.

    :param without: What an entry is whose page has no struct page. A frame buffer has no deposit;
        what is being moved has a page.
    """
    kinds = np.full(len(pfns), without, np.uint8)
    memmap = Memmap(prog)
    addresses, known = memmap.addresses(pfns)
    here = np.flatnonzero(known)
    addresses = addresses[here]
    pages, readable = _struct_pages(prog, addresses)
    # Entries can map the middle of a larger page (hugetlb of contiguous PMDs); tails are marked in
    # bit 0 of compound_info (compound_head before 7.1), the word that lru begins with.
    tails = readable & (pages["compound"] & np.uint64(1) != 0)
    if tails.any():
        places = np.flatnonzero(tails)
        heads, inverse = np.unique(addresses[places], return_inverse=True)
        for number, tail in enumerate(heads.tolist()):
            try:
                page = Object(prog, "struct page *", tail)
                heads[number] = compound_head(page).value_()
            except FaultError:
                heads[number] = 0
        pages[places], readable[places] = _struct_pages(prog, heads[inverse.reshape(-1)])
    anonymous = (pages["mapping"] & _MAPPING_ANON) != 0
    if _types_hugetlb(prog):
        hugetlb = np.uint32(prog.constant("PGTY_hugetlb").value_())
        anonymous &= pages["page_type"] >> np.uint32(24) != hugetlb
    kinds[here] = HugePage.OTHER
    kinds[here[anonymous]] = HugePage.ANONYMOUS
    kinds[here[~readable]] = HugePage.UNDECIDED
    return kinds


def _struct_pages(prog: Program, addresses: AddressArray) -> tuple[npt.NDArray[np.void], BoolArray]:
    # Any pages, not only tables: the members are those of struct page.
    page, order = prog.type("struct page"), byte_order(prog)
    dtype = np.dtype(
        {
            "names": ["compound", "mapping", "page_type"],
            "formats": [f"{order}u8", f"{order}u8", f"{order}u4"],
            "offsets": [offsetof(page, name) for name in ("lru", "mapping", "page_type")],
            "itemsize": sizeof(page),
        }
    )
    blocks = read_blocks(prog, addresses, dtype.itemsize, physical=False)
    return blocks.data.view(dtype).reshape(-1), blocks.readable


def _types_hugetlb(prog: Program) -> bool:
    """Whether hugetlb pages have a page type of their own (6.12 and later)."""
    try:
        prog.constant("PGTY_hugetlb")
    except LookupError:
        return False
    return True
