# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counting and listing the entries of many tables at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ptinspect.kernel.paging.model import ClassArray, EntryArray, EntryClass, IndexArray, Paging
from ptinspect.memory import BoolArray, ByteArray

#: Columns of a table of counts, one for each :class:`EntryClass`.
CLASSES = len(EntryClass)

CountArray = npt.NDArray[np.uint16]

#: Entries of which the booleans fill one word.
_LINE = 8

_NO_FLAGS = np.uint64(0)

#: How many words of booleans are added, byte by byte, into one.
_WORDS_PER_SUM = 128


class Entries(NamedTuple):
    """The filled entries of some tables, by table and then by index; arrays of one length."""

    #: int64, row of the table in the batch.
    row: IndexArray
    #: int64, index in the table.
    slot: IndexArray
    #: uint64, value of the entry.
    value: EntryArray
    #: uint8, :class:`EntryClass`.
    kind: ClassArray


def raw_entries(data: ByteArray) -> EntryArray:
    """View tables, uint8 of shape (n, bytes), as raw entries of shape (n, entries)."""
    return data.view(np.uint64)


def filled_entries(paging: Paging, raw: EntryArray, level: int) -> Entries:
    """
    Get every entry that is not literally empty.

    :param raw: uint64, shape (n, entries).
    """
    filled = np.not_equal(raw, paging.raw_constant(paging.levels[level].empty))
    places = np.flatnonzero(filled)
    values = paging.values(raw.reshape(-1)[places])
    # Two steps are quicker than divmod().
    row = places // raw.shape[1]
    slot = row * raw.shape[1]
    np.subtract(places, slot, out=slot)
    return Entries(row, slot, values, paging.classify(values, level))


def tally(entries: Entries, tables: int, per_table: int) -> CountArray:
    """
    Count entries by class.

    :param entries: All filled entries of the tables; what they lack is empty.
    :param tables: Number of tables.
    :param per_table: Entries in a table that are to be accounted for.
    :return: uint16, shape (tables, classes).
    """
    slots = entries.row * CLASSES + entries.kind
    counts = np.bincount(slots, minlength=tables * CLASSES).reshape(tables, CLASSES)
    counts[:, EntryClass.NONE] += per_table - counts.sum(axis=1)
    return counts.astype(np.uint16)


class Lines(NamedTuple):
    """The lines of eight entries of some tables in which anything is filled."""

    #: int64, which line each is, counted from the first line of table 0.
    number: IndexArray
    #: uint64, shape (n, 8), raw entries.
    entries: EntryArray


def entries_of_lines(paging: Paging, parts: Sequence[Lines], first: int) -> Entries:
    """
    Get the filled entries of the lowest level out of lines.

    :param parts: One after the other.
    :param first: Number of the table from which ``row`` counts.
    """
    numbers = np.concatenate([part.number for part in parts])
    raw = np.concatenate([part.entries for part in parts]).reshape(-1)
    level = paging.levels[0]
    places = np.flatnonzero(raw != paging.raw_constant(level.empty))
    values = paging.values(raw[places])
    index = numbers[places // _LINE] * _LINE
    index += places % _LINE
    row = index // level.entries
    slot = index - row * level.entries
    return Entries(row - first, slot, values, paging.classify(values, 0))


class _Flags(NamedTuple):
    """Room for one boolean for each entry of some tables, seen in several ways."""

    #: bool, one after the other: whether each entry is filled.
    filled: BoolArray
    #: uint64, shape (n * lanes, m): the same, eight of them a word.
    lanes: npt.NDArray[np.uint64]
    #: uint64, the same words one after the other.
    lines: npt.NDArray[np.uint64]
    #: bool: whether anything is set in each word.
    used: BoolArray


class LeafTableCounter:
    """
    Counts the entries of many tables of the lowest level, batch by batch.

    One pass over all entries tells which are filled. Most tables are nearly empty or all full, and
    hold nothing but plain leaves; so only the lines of eight entries in which anything is are
    looked at once more, and single entries only where they are something else.
    """

    def __init__(self, paging: Paging, tables: int) -> None:
        level = paging.levels[0]
        assert level.usual_leaf is not None
        self._paging = paging
        self._entries = level.entries
        self._empty = paging.raw_constant(level.empty)
        self._mask = paging.raw_constant(level.usual_leaf.mask)
        self._value = paging.raw_constant(level.usual_leaf.value)
        self._lines = level.entries // _LINE
        # A byte must not overflow: at most 128 words are added to one.
        self._lanes = max(1, self._lines // _WORDS_PER_SUM)
        #: By table and lane: filled entries, summed eight at a time in the bytes of a word.
        self._filled = np.zeros(tables * self._lanes, np.uint64)
        self._known = np.ones(tables, np.bool_)
        #: Numbers of tables, and by class the entries in them that are not plain leaves.
        self._others: list[tuple[npt.NDArray[np.intp], CountArray]] = []
        self._flags = self._make_flags(0)

    def _make_flags(self, tables: int) -> _Flags:
        filled = np.empty(tables * self._entries, np.bool_)
        lines = filled.view(np.uint64)
        lanes = lines.reshape(tables * self._lanes, self._lines // self._lanes)
        return _Flags(filled, lanes, lines, np.empty(len(lines), np.bool_))

    def add(self, first: int, raw: EntryArray, readable: BoolArray | None) -> Lines:
        """
        Count some tables.

        :param first: Number of the first of them.
        :param raw: uint64, shape (n, entries), contiguous.
        :param readable: bool, shape (n,); tables for which it is False are not counted.
        :return: Their lines in which anything is filled; they can share the memory of *raw*.
        """
        count = len(raw)
        if len(self._flags.filled) != raw.size:
            self._flags = self._make_flags(count)
        filled, lanes, lines, used = self._flags
        np.not_equal(raw.reshape(-1), self._empty, out=filled)
        here = slice(first * self._lanes, (first + count) * self._lanes)
        np.add.reduce(lanes, axis=1, out=self._filled[here])
        np.not_equal(lines, _NO_FLAGS, out=used)
        if readable is not None:
            self._known[first : first + count] = readable
            used.reshape(count, -1)[~readable] = False
        (place,) = used.nonzero()
        entries = raw.reshape(-1, _LINE)
        if len(place) < len(lines):
            lines, entries = lines.take(place), entries.take(place, axis=0)
        elif self._value == self._mask == np.bitwise_and.reduce(raw, axis=None) & self._mask:
            # All full of plain leaves.
            return Lines(place + first * self._lines, entries)
        leaves = ((entries & self._mask) == self._value).reshape(-1)
        # A plain leaf is filled, so that the two differ only in entries that are something else.
        if lines.tobytes() != leaves.tobytes():
            (other,) = (lines.view(np.bool_) ^ leaves).nonzero()
            table = place[other // _LINE] // self._lines
            self._add_others(first, count, table, entries.reshape(-1)[other])
        return Lines(place + first * self._lines, entries)

    def _add_others(self, first: int, count: int, table: IndexArray, raw: EntryArray) -> None:
        """Look at single entries that are filled, but no plain leaves."""
        kinds = self._paging.classify(self._paging.values(raw), 0)
        counts = np.bincount(table * CLASSES + kinds, minlength=count * CLASSES)
        counts = counts.reshape(count, CLASSES)
        there = np.flatnonzero(counts.any(axis=1))
        self._others.append((first + there, counts[there].astype(np.uint16)))

    def store(self, counts: CountArray, rows: npt.NDArray[np.intp]) -> None:
        """
        Write the counts of all tables that were readable; the others' are left as they are.

        :param counts: uint16, shape (m, classes), of zeros.
        :param rows: Row of each table in it.
        """
        filled = _fold(self._filled.reshape(-1, self._lanes))
        known = self._known
        where = rows
        if not known.all():
            where, filled = rows[known], filled[known]
        counts[where, EntryClass.LEAF] = filled
        counts[where, EntryClass.NONE] = np.uint16(self._entries) - filled
        for tables, others in self._others:
            where = rows[tables]
            counts[where] += others
            counts[where, EntryClass.LEAF] -= others.sum(axis=1, dtype=np.uint16)


def _fold(lanes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint16]:
    """Add up the bytes of each word, and the words of each row."""
    # Each byte holds up to 128; pair them so that the total cannot overflow.
    even = np.uint64(0x00FF00FF00FF00FF)
    pairs = lanes & even
    lanes = lanes >> np.uint64(8)
    lanes &= even
    pairs += lanes
    # A table has fewer than 1 << 16 entries, so no pair overflows here either.
    total: npt.NDArray[np.uint64] = pairs.sum(axis=1) if pairs.shape[1] > 1 else pairs[:, 0]
    total *= np.uint64(0x0001000100010001)
    total >>= np.uint64(48)
    return total.astype(np.uint16)
