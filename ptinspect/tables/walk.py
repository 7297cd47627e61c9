# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
All tables of address spaces, level by level, many spaces at once.

The tables of one level are read in order of their addresses, adjacent ones together, in batches of
bounded size. What cannot be followed is recorded in the row of the table and ends there: memory
that cannot be read, entries that point outside memory, a table that is its own ancestor, a table
that was reached before. As each table is followed only once per level, the walk ends on any
input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from drgn import Program

from ptinspect.kernel.paging.model import (
    ALL_PERMISSIONS,
    EntryArray,
    EntryClass,
    Paging,
    PermissionArray,
)
from ptinspect.memory import CHUNK_BYTES, AddressArray, BoolArray, iter_blocks
from ptinspect.tables.entries import (
    CLASSES,
    CountArray,
    Entries,
    LeafTableCounter,
    Lines,
    entries_of_lines,
    filled_entries,
    raw_entries,
    tally,
)
from ptinspect.tables.physical import PhysicalRanges
from ptinspect.tables.spaces import Space

RowArray = npt.NDArray[np.int32]

#: Classes that a non-present entry of a kernel space cannot mean: kernel memory is not swapped.
_SWAP_LIKE = np.array(
    [EntryClass.SWAP, EntryClass.MIGRATION, EntryClass.MARKER, EntryClass.SPECIAL], np.intp
)

#: Lines of eight entries that are shown to a visitor together.
_SHOWN_LINES = 1 << 14

#: Called now and then with (tables read, tables known so far).
Progress = Callable[[int, int], None]

#: Called with rows of tables and their filled entries, whose ``row`` counts within those rows.
Visitor = Callable[[RowArray, Entries], None]


class RowState(IntEnum):
    """How far the walk went at one table."""

    #: Its entries were read and counted.
    READ = 0
    #: A table of the lowest level, whose entries were not asked for.
    NOT_READ = 1
    #: Its memory is not in the dump, or went away.
    UNREADABLE = 2
    #: It lies outside the target's memory.
    OUTSIDE = 3
    #: The same table was reached before at this level; what is below it belongs to that row.
    SHARED = 4
    #: It is one of its own ancestors.
    CYCLE = 5


@dataclass(frozen=True)
class Tables:
    """
    The tables that a walk reached: NumPy columns, one row for each time a table is reached.

    Rows are in order of level, from the roots down, then of space, then of virtual address.
    """

    paging: Paging
    spaces: tuple[Space, ...]
    #: uint32, index into :attr:`spaces`.
    space: npt.NDArray[np.uint32]
    #: uint8, index into the levels of :attr:`paging`.
    level: npt.NDArray[np.uint8]
    #: uint8, :class:`RowState`.
    state: npt.NDArray[np.uint8]
    #: uint64, physical address of the table.
    address: AddressArray
    #: uint64, first virtual address that the table translates.
    va: AddressArray
    #: int32, row of the table that points here, or -1 for a root.
    parent: RowArray
    #: uint16, index of the entry in the parent that points here.
    index: npt.NDArray[np.uint16]
    #: uint8, :class:`~ptinspect.kernel.paging.Permission` of the path down to this table.
    permissions: PermissionArray
    #: int32, for SHARED rows the row that was followed instead, else -1.
    first: RowArray
    #: uint16, shape (n, classes): entries by :class:`~ptinspect.kernel.paging.EntryClass`.
    #: SHARED rows repeat the counts of the row that was read. Roots count their own part only.
    counts: CountArray

    def __len__(self) -> int:
        return len(self.space)

    @property
    def entry_address(self) -> AddressArray:
        """uint64, physical address of the entry that points to each table; 0 for roots."""
        known = self.parent >= 0
        above = self.address[np.where(known, self.parent, 0)]
        entries: AddressArray = above + self.index.astype(np.uint64) * np.uint64(8)
        entries[~known] = 0
        return entries

    @property
    def table_bytes(self) -> npt.NDArray[np.int64]:
        """int64, size of each table."""
        sizes = np.array([level.table_bytes for level in self.paging.levels], np.int64)
        each: npt.NDArray[np.int64] = sizes[self.level]
        return each

    @property
    def counted(self) -> BoolArray:
        """bool, whether the counts of each row tell anything."""
        seen: BoolArray = self.state == RowState.READ
        shared = self.first >= 0
        seen[shared] = self.state[self.first[shared]] == RowState.READ
        return seen

    @property
    def complete(self) -> bool:
        """Whether every table that an entry points to was read or was not asked for."""
        return not np.isin(self.state, (RowState.UNREADABLE, RowState.OUTSIDE)).any()

    @property
    def leaves_unread(self) -> bool:
        """Whether tables of the lowest level are there that were not asked for."""
        return bool((self.state == RowState.NOT_READ).any())

    def rows_of_space(self, space: int) -> npt.NDArray[np.intp]:
        """Get the rows of one space, from the root down."""
        return np.flatnonzero(self.space == space)

    def unread(self) -> Tables:
        """Get the same as they were before the tables of the lowest level were read."""
        state, counts = self.state.copy(), self.counts.copy()
        lowest = self.level == 0
        state[lowest & (state == RowState.READ)] = RowState.NOT_READ
        counts[lowest] = 0
        return replace(self, state=state, counts=counts)

    def nbytes(self) -> int:
        """Bytes that the columns take."""
        columns = (c for c in vars(self).values() if isinstance(c, np.ndarray))
        return sum(column.nbytes for column in columns)


class _Frontier(NamedTuple):
    """Tables of one level that are to be looked at."""

    space: npt.NDArray[np.uint32]
    address: AddressArray
    va: AddressArray
    parent: RowArray
    slot: npt.NDArray[np.uint16]
    permissions: PermissionArray


class _Children(NamedTuple):
    """What the TABLE entries of one batch point to, table after table."""

    #: Rows of the tables within their level.
    parents: npt.NDArray[np.intp]
    #: How many children each of them has.
    numbers: npt.NDArray[np.intp]
    slot: npt.NDArray[np.uint16]
    address: AddressArray
    #: What the entries permit by themselves.
    permissions: PermissionArray


def walk_spaces(
    prog: Program,
    paging: Paging,
    spaces: Sequence[Space],
    *,
    leaf_counts: bool = True,
    memory: PhysicalRanges | None = None,
    progress: Progress | None = None,
    visitor: Visitor | None = None,
    batch_bytes: int = CHUNK_BYTES,
) -> Tables:
    """
    Walk all tables of all spaces.

    A table that several spaces reach is followed for the first of them, so the kernel's space
    should come before those that share its tables.

    :param prog: The kernel.
    :param paging: What :func:`paging_of` says of it.
    :param spaces: Those of :func:`find_spaces`, or some of them.
    :param leaf_counts: Whether to read the tables of the lowest level, which are most of all.
    :param memory: Where the target has memory; entries that point elsewhere are marked.
    :param progress: Called now and then with how many tables are walked, of how many known.
    :param visitor: Is shown the filled entries of each table that is read at the lowest level.
    :param batch_bytes: How much is held at a time.
    :return: One row for each table and way to it, as arrays.
    """
    walker = _Walker(prog, paging, spaces, memory, progress, batch_bytes)
    tables = walker.walk()
    if leaf_counts:
        _read_leaf_tables(prog, tables, walker.leaf_rows, progress, visitor, batch_bytes)
    return tables


def read_leaf_tables(prog: Program, tables: Tables, *, visitor: Visitor | None = None) -> None:
    """
    Read the tables of the lowest level that a walk left unread, and enter their counts and states.

    :param tables: Of a walk without leaf counts; its columns are changed in place.
    :param visitor: Is shown the filled entries of each of them.
    """
    rows = np.flatnonzero(tables.state == RowState.NOT_READ)
    # Quick on what is partly in order, as most of them are.
    rows = rows[np.argsort(tables.address[rows], kind="stable")]
    _read_leaf_tables(prog, tables, rows, None, visitor, CHUNK_BYTES)


class _Walker:
    def __init__(
        self,
        prog: Program,
        paging: Paging,
        spaces: Sequence[Space],
        memory: PhysicalRanges | None,
        progress: Progress | None,
        batch_bytes: int,
    ) -> None:
        self._prog = prog
        self._paging = paging
        self._spaces = tuple(spaces)
        self._memory = memory
        self._progress = progress
        self._batch_bytes = batch_bytes
        self._is_kernel = np.array([space.kernel for space in spaces], np.bool_)
        self._is_kvm = np.array([space.kvm_owned for space in spaces], np.bool_)
        self._done = 0
        self._first_row = 0
        #: Columns of finished levels, from the top.
        self._levels: list[dict[str, npt.NDArray[Any]]] = []
        #: Rows of the tables of the lowest level that are there, in order of address.
        self.leaf_rows: npt.NDArray[np.intp] = np.empty(0, np.intp)

    def walk(self) -> Tables:
        frontier: _Frontier | None = None
        for level in reversed(range(len(self._paging.levels))):
            frontier = self._with_roots(frontier, level)
            frontier = self._walk_level(frontier, level)
        # The parts of each column are let go before the next is put together.
        columns = {
            name: np.concatenate([part.pop(name) for part in self._levels])
            for name in list(self._levels[0])
        }
        self._levels.clear()
        return Tables(self._paging, self._spaces, **columns)

    def _with_roots(self, frontier: _Frontier | None, level: int) -> _Frontier:
        numbers = [n for n, space in enumerate(self._spaces) if space.root.level == level]
        roots = _Frontier(
            space=np.array(numbers, np.uint32),
            address=np.array([self._spaces[n].root.address for n in numbers], np.uint64),
            va=np.array([self._spaces[n].root.base for n in numbers], np.uint64),
            parent=np.full(len(numbers), -1, np.int32),
            slot=np.zeros(len(numbers), np.uint16),
            permissions=np.full(len(numbers), int(ALL_PERMISSIONS), np.uint8),
        )
        if frontier is None or not len(frontier.space):
            return roots
        if not len(numbers):
            return frontier
        order = np.argsort(np.concatenate((frontier.space, roots.space)), kind="stable")
        columns = (
            np.concatenate((getattr(frontier, name), getattr(roots, name)))[order]
            for name in _Frontier._fields
        )
        return _Frontier(*columns)

    def _walk_level(self, frontier: _Frontier, level: int) -> _Frontier:
        count = len(frontier.space)
        state = np.full(count, RowState.READ, np.uint8)
        first = np.full(count, -1, np.int32)
        counts = np.zeros((count, CLASSES), np.uint16)
        order, ordered = _in_order(frontier.address)
        self._mark_cycles(frontier, ordered, state)
        if self._memory is not None:
            size = self._paging.levels[level].table_bytes
            inside = self._memory.contain_ascending(ordered, size)
            if not inside.all():
                state[order[~inside]] = RowState.OUTSIDE
        rows = self._mark_shared(order, ordered, state, first)
        children: list[_Children] = []
        if level:
            children = self._read_tables(frontier, level, rows, state, counts)
        else:
            state[rows] = RowState.NOT_READ
            self.leaf_rows = rows + self._first_row
        _show_kvm_pages(counts, np.flatnonzero(self._is_kvm[frontier.space]))
        shared = np.flatnonzero(first >= 0)
        counts[shared] = counts[first[shared]]
        first[shared] += self._first_row
        self._levels.append(
            {
                "space": frontier.space,
                "level": np.full(count, level, np.uint8),
                "state": state,
                "address": frontier.address,
                "va": frontier.va,
                "parent": frontier.parent,
                "index": frontier.slot,
                "permissions": frontier.permissions,
                "first": first,
                "counts": counts,
            }
        )
        below = self._collect(frontier, level, children)
        self._first_row += count
        return below

    def _mark_cycles(
        self, frontier: _Frontier, ordered: AddressArray, state: npt.NDArray[np.uint8]
    ) -> None:
        """
        Mark the tables that are among their own ancestors.

        :param ordered: Their addresses in ascending order.
        """
        if not self._levels or not len(ordered):
            return
        # Seldom is a table reached at two levels at all, and there are few above.
        upper = np.concatenate([columns["address"] for columns in self._levels])
        place = np.minimum(np.searchsorted(ordered, upper), len(ordered) - 1)
        if not (ordered[place] == upper).any():
            return
        above = frontier.parent
        base = self._first_row
        for columns in reversed(self._levels):
            base -= len(columns["address"])
            known = above >= base
            here = np.where(known, above - base, 0)
            if not known.any():
                # Roots only; those of a lower level have nothing above them.
                continue
            state[known & (columns["address"][here] == frontier.address)] = RowState.CYCLE
            above = np.where(known, columns["parent"][here], above)

    def _mark_shared(
        self,
        order: npt.NDArray[np.intp],
        ordered: AddressArray,
        state: npt.NDArray[np.uint8],
        first: RowArray,
    ) -> npt.NDArray[np.intp]:
        """
        Mark tables that were reached before, and get the rows to read, in order of address.

        :param order: All rows in order of address.
        :param ordered: Their addresses.
        """
        usable = state == RowState.READ
        if not usable.all():
            keep = usable[order]
            order, ordered = order[keep], ordered[keep]
        new = np.ones(len(ordered), np.bool_)
        np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
        if new.all():
            return order
        # Of each group the row that comes first is followed.
        leaders = np.minimum.reduceat(order, np.flatnonzero(new))
        leader = leaders[np.cumsum(new) - 1]
        again = leader != order
        state[order[again]] = RowState.SHARED
        first[order[again]] = leader[again]
        return leaders

    def _read_tables(
        self,
        frontier: _Frontier,
        level: int,
        rows: npt.NDArray[np.intp],
        state: npt.NDArray[np.uint8],
        counts: CountArray,
    ) -> list[_Children]:
        children = []
        size = self._paging.levels[level].table_bytes
        roots = frontier.parent[rows] < 0
        kernel = self._is_kernel[frontier.space[rows]]
        for batch in iter_blocks(
            self._prog, frontier.address[rows], size, batch_bytes=self._batch_bytes
        ):
            place = slice(batch.first, batch.first + len(batch.data))
            here = rows[place]
            raw = raw_entries(batch.data)
            if batch.readable is not None:
                state[here[~batch.readable]] = RowState.UNREADABLE
                here, raw = here[batch.readable], raw[batch.readable]
            foreign: npt.NDArray[np.int64] | None = None
            if roots[place].any():
                raw, foreign = self._only_own_entries(frontier, level, here, raw)
            entries = filled_entries(self._paging, raw, level)
            counts[here] = tally(entries, len(here), raw.shape[1])
            children.append(self._children(level, here, entries))
            if foreign is not None:
                counts[here, EntryClass.NONE] -= foreign.astype(np.uint16)
            if kernel[place].any():
                in_kernel = self._is_kernel[frontier.space[here]]
                _hide_swap(counts, here[in_kernel])
                number = _hidden_leaves(self._paging, raw[in_kernel], level)
                counts[here[in_kernel], EntryClass.LEAF] -= number
                counts[here[in_kernel], EntryClass.PROT_NONE] += number
            self._report(len(batch.data), frontier)
        return children

    def _report(self, done: int, frontier: _Frontier) -> None:
        self._done += done
        if self._progress is not None:
            self._progress(self._done, self._first_row + len(frontier.space))

    def _only_own_entries(
        self, frontier: _Frontier, level: int, rows: npt.NDArray[np.intp], raw: EntryArray
    ) -> tuple[EntryArray, npt.NDArray[np.int64]]:
        """Blank the entries of roots that belong to another space, and tell how many they are."""
        raw = raw.copy()
        blanked = np.zeros(len(raw), np.int64)
        entries = raw.shape[1]
        by_ranges: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for place in np.flatnonzero(frontier.parent[rows] < 0).tolist():
            own = self._spaces[int(frontier.space[rows[place]])].root.entries
            by_ranges.setdefault(own, []).append(place)
        for ranges, places in by_ranges.items():
            foreign = np.ones(entries, np.bool_)
            for begin, end in ranges:
                foreign[begin:end] = False
            if foreign.any():
                empty = self._paging.raw_constant(self._paging.levels[level].empty)
                raw[np.ix_(np.array(places), np.flatnonzero(foreign))] = empty
                blanked[places] = np.count_nonzero(foreign)
        return raw, blanked

    def _children(self, level: int, rows: npt.NDArray[np.intp], entries: Entries) -> _Children:
        table = entries.kind == EntryClass.TABLE
        row, slot, values = entries.row, entries.slot, entries.value
        if not table.all():
            row, slot, values = row[table], slot[table], values[table]
        return _Children(
            parents=rows,
            numbers=np.bincount(row, minlength=len(rows)),
            slot=slot.astype(np.uint16),
            address=self._paging.table_targets(values, level),
            permissions=self._paging.permissions(values, level, leaf=False),
        )

    def _collect(self, frontier: _Frontier, level: int, parts: list[_Children]) -> _Frontier:
        """Put the children of a level into the order of their parents."""
        if not parts:
            none = np.empty(0, np.intp)
            parts = [
                _Children(
                    none,
                    none,
                    np.empty(0, np.uint16),
                    np.empty(0, np.uint64),
                    np.empty(0, np.uint8),
                )
            ]
        parents, numbers, slot, address, permissions = (
            np.concatenate(column) for column in zip(*parts)
        )
        by_row = np.argsort(parents)
        begins = (np.cumsum(numbers) - numbers)[by_row]
        parents, numbers = parents[by_row], numbers[by_row]
        if (by_row[1:] < by_row[:-1]).any():
            moved = np.repeat(begins - (np.cumsum(numbers) - numbers), numbers)
            moved += np.arange(len(moved))
            slot, address, permissions = slot[moved], address[moved], permissions[moved]
        permissions &= np.repeat(frontier.permissions[parents], numbers)
        va = slot.astype(np.uint64)
        va <<= np.uint64(self._paging.levels[level].shift)
        va += np.repeat(frontier.va[parents], numbers)
        return _Frontier(
            space=np.repeat(frontier.space[parents], numbers),
            address=address,
            va=self._paging.canonical(va),
            parent=np.repeat((parents + self._first_row).astype(np.int32), numbers),
            slot=slot,
            permissions=permissions,
        )


def _in_order(addresses: AddressArray) -> tuple[npt.NDArray[np.intp], AddressArray]:
    """Sort addresses: their places, and the addresses themselves."""
    if (addresses[1:] >= addresses[:-1]).all():
        return np.arange(len(addresses)), addresses
    order = np.argsort(addresses)
    return order, addresses[order]


def _read_leaf_tables(
    prog: Program,
    tables: Tables,
    rows: npt.NDArray[np.intp],
    progress: Progress | None,
    visitor: Visitor | None,
    batch_bytes: int,
) -> None:
    """
    Read the tables of the lowest level: nearly all there are, so little is done for each.

    No space has its root here.

    :param rows: Those to read, in order of address.
    """
    paging, state, counts = tables.paging, tables.state, tables.counts
    counter = LeafTableCounter(paging, len(rows))
    gatherer = None if visitor is None else _Gatherer(paging, rows, visitor)
    spaces = tables.space[rows]
    kernel = np.array([space.kernel for space in tables.spaces], np.bool_)[spaces]
    hidden = paging.levels[0].kernel_hidden is not None
    unseen: list[tuple[npt.NDArray[np.intp], CountArray]] = []
    state[rows] = RowState.READ
    above = len(tables) - int(np.count_nonzero(tables.level == 0))
    for batch in iter_blocks(
        prog, tables.address[rows], paging.levels[0].table_bytes, batch_bytes=batch_bytes
    ):
        raw = raw_entries(batch.data)
        lines = counter.add(batch.first, raw, batch.readable)
        end = batch.first + len(raw)
        if progress is not None:
            progress(above + end, len(tables))
        if batch.readable is not None:
            state[rows[batch.first : end][~batch.readable]] = RowState.UNREADABLE
        if gatherer is not None:
            gatherer.add(end, lines)
        if hidden:
            in_kernel = kernel[batch.first : end]
            where = rows[batch.first : end][in_kernel]
            unseen.append((where, _hidden_leaves(paging, raw[in_kernel], 0)))
        # Freed before the next read, which then gets the same memory.
        del batch, raw, lines
    if gatherer is not None:
        gatherer.show()
    counter.store(counts, rows)
    _hide_swap(counts, rows[kernel])
    for where, number in unseen:
        counts[where, EntryClass.LEAF] -= number
        counts[where, EntryClass.PROT_NONE] += number
    of_kvm = np.array([space.kvm_owned for space in tables.spaces], np.bool_)
    _show_kvm_pages(counts, rows[of_kvm[spaces]])
    shared = np.flatnonzero((tables.level == 0) & (tables.first >= 0))
    counts[shared] = counts[tables.first[shared]]


class _Gatherer:
    """Gathers filled entries until it is worth while to show them to a visitor."""

    def __init__(self, paging: Paging, rows: npt.NDArray[np.intp], visitor: Visitor) -> None:
        self._paging = paging
        self._rows = rows
        self._visitor = visitor
        #: Number of the first table that was not shown, and of the table behind the last.
        self._first = self._end = 0
        self._parts: list[Lines] = []
        self._waiting = 0

    def add(self, end: int, lines: Lines) -> None:
        """Take the lines of some tables, up to the table with the number *end*."""
        self._end = end
        self._parts.append(lines)
        self._waiting += len(lines.number)
        # Most tables are nearly empty: what a visit costs by itself is paid once for many.
        if self._waiting >= _SHOWN_LINES:
            self.show()

    def show(self) -> None:
        """Show what has come together."""
        if self._parts:
            rows = self._rows[self._first : self._end].astype(np.int32)
            self._visitor(rows, entries_of_lines(self._paging, self._parts, self._first))
        self._first, self._parts, self._waiting = self._end, [], 0


def _hidden_leaves(paging: Paging, raw: EntryArray, level: int) -> CountArray:
    """Count, by table, the leaves that are hidden if the table is the kernel's."""
    hidden = paging.levels[level].kernel_hidden
    if hidden is None or not len(raw):
        return np.zeros(len(raw), np.uint16)
    entries = filled_entries(paging, raw, level)
    unseen = (entries.value & np.uint64(hidden.mask)) == np.uint64(hidden.value)
    unseen &= entries.kind == EntryClass.LEAF
    return np.bincount(entries.row[unseen], minlength=len(raw)).astype(np.uint16)


def _show_kvm_pages(counts: CountArray, rows: npt.NDArray[np.intp]) -> None:
    """Count what looks hidden as mapped pages; see :meth:`Paging.kvm_kinds`."""
    if len(rows):
        counts[rows, EntryClass.LEAF] += counts[rows, EntryClass.PROT_NONE]
        counts[rows, EntryClass.PROT_NONE] = 0


def _hide_swap(counts: CountArray, rows: npt.NDArray[np.intp]) -> None:
    """Count what looks swapped as hidden pages; see :meth:`Paging.kernel_kinds`."""
    swap_like = counts[np.ix_(rows, _SWAP_LIKE)]
    if swap_like.any():
        counts[rows, EntryClass.PROT_NONE] += swap_like.sum(axis=1, dtype=np.uint16)
        counts[np.ix_(rows, _SWAP_LIKE)] = 0
