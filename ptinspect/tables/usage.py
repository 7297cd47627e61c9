# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each address space spends on tables, and how full they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ptinspect.kernel.paging import EntryClass
from ptinspect.memory import BoolArray
from ptinspect.tables.walk import RowState, Tables

#: Tables above this level are not in mm->pgtables_bytes (mm_inc_nr_ptes(), _pmds(), _puds()).
_HIGHEST_COUNTED_LEVEL = 2

IntMatrix = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SpaceUsage:
    """
    Columns by space, in the order of :attr:`Tables.spaces`.

    A table that several spaces share counts in each of them, as the kernel does it.
    """

    #: int64, shape (spaces, levels).
    tables: IntMatrix
    #: int64, shape (spaces, levels): tables without any entry. Roots are never among them.
    empty_tables: IntMatrix
    #: int64, shape (spaces,): bytes of all tables.
    table_bytes: npt.NDArray[np.int64]
    #: int64: bytes of the tables that ``mm->pgtables_bytes`` counts; deposits come on top.
    accounted_bytes: npt.NDArray[np.int64]
    #: int64: bytes of tables without any entry, which could be given back.
    empty_bytes: npt.NDArray[np.int64]
    #: int64, shape (spaces, classes): entries of the tables of the lowest level.
    leaf_entries: IntMatrix
    #: bool: whether all tables of the space could be read.
    complete: BoolArray

    def fill(self) -> npt.NDArray[np.float64]:
        """Get the part of the lowest level's entries that is in use; NaN without such tables."""
        total = self.leaf_entries.sum(axis=1)
        used = total - self.leaf_entries[:, EntryClass.NONE]
        with np.errstate(invalid="ignore"):
            return np.where(total > 0, used / np.maximum(total, 1), np.nan)


def space_usage(tables: Tables) -> SpaceUsage:
    """
    Sum up a walk by space.

    :param tables: What :func:`walk_spaces` found.
    :return: Arrays, one row for each space of the walk, in its order.
    """
    spaces, levels = len(tables.spaces), len(tables.paging.levels)
    there = (tables.state != RowState.CYCLE) & (tables.state != RowState.OUTSIDE)
    root = tables.parent < 0
    slot = tables.space.astype(np.int64) * levels + tables.level

    def count(rows: BoolArray) -> IntMatrix:
        return np.bincount(slot[rows], minlength=spaces * levels).reshape(spaces, levels)

    number = count(there)
    entries = np.array([level.entries for level in tables.paging.levels], np.uint16)
    unused = tables.counts[:, EntryClass.NONE] == entries[tables.level]
    empty = count(there & tables.counted & ~root & unused)
    sizes = np.array([level.table_bytes for level in tables.paging.levels], np.int64)
    accounted = sizes.copy()
    accounted[_HIGHEST_COUNTED_LEVEL + 1 :] = 0
    leaf = np.zeros((spaces, len(EntryClass)), np.int64)
    lowest = np.flatnonzero(tables.level == 0)
    for kind in EntryClass:
        numbers = tables.counts[lowest, kind]
        if numbers.any():
            leaf[:, kind] = np.bincount(tables.space[lowest], numbers, minlength=spaces)
    lost = np.isin(tables.state, (RowState.UNREADABLE, RowState.OUTSIDE, RowState.CYCLE))
    complete = np.bincount(tables.space[lost], minlength=spaces) == 0
    return SpaceUsage(
        tables=number,
        empty_tables=empty,
        table_bytes=number @ sizes,
        accounted_bytes=count(there & ~root) @ accounted,
        empty_bytes=empty @ sizes,
        leaf_entries=leaf,
        complete=complete,
    )
