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
_SPARSE = 32

#: Bytes of a word of booleans overflow when more than 255 words are added.
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
    return _entries_at(paging, raw, level, np.flatnonzero(filled))


def _entries_at(
    paging: Paging, raw: EntryArray, level: int, places: npt.NDArray[np.intp]
) -> Entries:
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


def count_entries(paging: Paging, raw: EntryArray, level: int) -> CountArray:
    """
    Count the entries of many tables by class.

    The usual case is decided for whole tables at a time. Only if the tables are nearly empty, or
    where something is neither empty nor a plain leaf, single entries are looked at.

    :param raw: uint64, shape (n, entries).
    :return: uint16, shape (n, classes).
    """
    shape = paging.levels[level]
    tables, per_table = raw.shape
    filled = np.not_equal(raw, paging.raw_constant(shape.empty))
    filled_counts = sum_rows(filled)
    total = int(filled_counts.sum())
    if shape.usual_leaf is None or total * _SPARSE < raw.size:
        entries = _entries_at(paging, raw, level, np.flatnonzero(filled))
        return tally(entries, tables, per_table)
    mask, value = shape.usual_leaf
    leaves = np.equal(
        np.bitwise_and(raw, paging.raw_constant(mask)), paging.raw_constant(value), out=filled
    )
    leaf_counts = sum_rows(leaves)
    counts = np.zeros((tables, CLASSES), np.uint16)
    counts[:, EntryClass.LEAF] = leaf_counts
    counts[:, EntryClass.NONE] = per_table - filled_counts
    mixed = np.flatnonzero(filled_counts != leaf_counts)
    if len(mixed):
        counts[mixed] = tally(filled_entries(paging, raw[mixed], level), len(mixed), per_table)
    return counts


def sum_rows(flags: BoolArray) -> IndexArray:
    """
    Count the true values in each row, eight at a time.

    :param flags: bool, shape (n, m), C-contiguous; m a multiple of 8.
    :return: int64, shape (n,).
    """
    words = flags.view(np.uint64)
    result = np.zeros(len(words), np.uint64)
    for first in range(0, words.shape[1], _WORDS_PER_SUM):
        lanes = words[:, first : first + _WORDS_PER_SUM].sum(axis=1)
        # Each byte of a lane holds up to 128; pair them so that the total cannot overflow.
        pairs = (lanes & np.uint64(0x00FF00FF00FF00FF)) + (
            (lanes >> np.uint64(8)) & np.uint64(0x00FF00FF00FF00FF)
        )
        result += (pairs * np.uint64(0x0001000100010001)) >> np.uint64(48)
    return result.astype(np.int64)
