# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counting and listing the entries of many tables at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ptinspect.kernel.paging.model import ClassArray, EntryArray, EntryClass, IndexArray, Paging
from ptinspect.memory import BoolArray, ByteArray

#: Columns of a table of counts, one for each :class:`EntryClass`.
CLASSES = len(EntryClass)

CountArray = npt.NDArray[np.uint16]

#: A batch in which fewer than one entry in this many is filled is looked at entry by entry.
_SPARSE = 16

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
    row, slot = np.divmod(places, raw.shape[1])
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


class LeafTableCounter:
    """
    Counts the entries of many tables of the lowest level, batch by batch.

    The usual case is decided for whole tables at a time: how many entries are not empty, and how
    many are plain leaves. Only where the two differ, single entries are looked at. Both numbers
    are summed eight at a time in the bytes of a word, and put together once at the end.
    """

    def __init__(self, paging: Paging, tables: int) -> None:
        level = paging.levels[0]
        assert level.usual_leaf is not None
        self._paging = paging
        self._entries = level.entries
        self._empty = paging.raw_constant(level.empty)
        self._mask = paging.raw_constant(level.usual_leaf.mask)
        self._value = paging.raw_constant(level.usual_leaf.value)
        # A byte must not overflow: at most 128 words are added to one.
        words = level.entries // 8
        self._sums = (max(1, words // _WORDS_PER_SUM), min(words, _WORDS_PER_SUM))
        self._filled = np.zeros((tables, self._sums[0]), np.uint64)
        self._leaves = np.zeros((tables, self._sums[0]), np.uint64)
        self._known = np.zeros(tables, np.bool_)
        self._mixed: list[tuple[npt.NDArray[np.intp], CountArray]] = []
        self._flags = np.empty((0, 0), np.bool_)
        self._masked = np.empty((0, 0), np.uint64)

    def add(self, first: int, raw: EntryArray, readable: BoolArray | None) -> None:
        """
        Count some tables.

        :param first: Number of the first of them.
        :param raw: uint64, shape (n, entries).
        :param readable: bool, shape (n,); tables for which it is False are not counted.
        """
        count = len(raw)
        if len(self._flags) < count:
            self._flags = np.empty(raw.shape, np.bool_)
            self._masked = np.empty(raw.shape, np.uint64)
        flags, masked = self._flags[:count], self._masked[:count]
        here = slice(first, first + count)
        words = flags.view(np.uint64).reshape(count, *self._sums)
        filled, leaves = self._filled[here], self._leaves[here]
        np.not_equal(raw, self._empty, out=flags)
        np.add.reduce(words, axis=2, out=filled)
        self._known[here] = True if readable is None else readable
        if self._only_leaves(raw, flags):
            leaves[:] = filled
            return
        np.bitwise_and(raw, self._mask, out=masked)
        np.equal(masked, self._value, out=flags)
        np.add.reduce(words, axis=2, out=leaves)
        if filled.tobytes() != leaves.tobytes():
            mixed = np.flatnonzero((filled != leaves).any(axis=1))
            entries = filled_entries(self._paging, raw[mixed], 0)
            self._mixed.append((first + mixed, tally(entries, len(mixed), self._entries)))

    def _only_leaves(self, raw: EntryArray, filled: BoolArray) -> bool:
        """
        Tell, where that is quick, whether whatever is filled is a plain leaf.

        It is in tables that are nearly empty, or all full; most are one or the other.
        """
        total = np.count_nonzero(filled)
        if total * _SPARSE <= filled.size:
            values = raw.reshape(-1)[np.flatnonzero(filled)]
            return bool(((values & self._mask) == self._value).all())
        if total == filled.size and self._value == self._mask:
            return bool(np.bitwise_and.reduce(raw.reshape(-1)) & self._mask == self._value)
        return False

    def counts(self) -> CountArray:
        """Get the counts of all tables, uint16 of shape (tables, classes)."""
        counts = np.zeros((len(self._known), CLASSES), np.uint16)
        counts[:, EntryClass.LEAF] = _fold(self._leaves)
        counts[:, EntryClass.NONE] = self._entries - _fold(self._filled)
        for rows, mixed in self._mixed:
            counts[rows] = mixed
        counts[~self._known] = 0
        return counts


def _fold(lanes: npt.NDArray[np.uint64]) -> IndexArray:
    """Add up the bytes of each word, and the words of each row."""
    # Each byte holds up to 128; pair them so that the total cannot overflow.
    even = np.uint64(0x00FF00FF00FF00FF)
    pairs = (lanes & even) + ((lanes >> np.uint64(8)) & even)
    sums = (pairs * np.uint64(0x0001000100010001)) >> np.uint64(48)
    total: IndexArray = sums.sum(axis=1).astype(np.int64)
    return total
