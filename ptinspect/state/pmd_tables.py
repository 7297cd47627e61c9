# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The PMD tables of processes with their descriptors: what deposits and sharing both look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from drgn import Program

from ptinspect.kernel.descriptor import ptdesc_dtype
from ptinspect.memory import AddressArray, BoolArray, read_blocks
from ptinspect.tables.memmap import Memmap
from ptinspect.tables.spaces import SpaceKind
from ptinspect.tables.walk import RowState, Tables

#: Index of the level whose entries can map huge pages with deposited tables.
PMD_LEVEL = 1


@dataclass(frozen=True)
class PmdTables:
    """
    Each PMD table that an mm reaches, once; the tables of the kernel's spaces are not among them.

    Several tables can have one descriptor: powerpc with 64K pages has 16 in a page.
    """

    #: intp, shape (n,): of each table the row of the walk at which it was followed.
    rows: npt.NDArray[np.intp]
    #: intp, shape (n,): index of its descriptor in the columns below.
    page: npt.NDArray[np.intp]
    #: uint64, shape (m,): page frame of each descriptor's first page.
    pfns: npt.NDArray[np.uint64]
    #: uint64, shape (m,): addresses of the descriptors.
    ptdescs: AddressArray
    #: Records of :func:`~ptinspect.kernel.descriptor.ptdesc_dtype`, shape (m,).
    descriptors: npt.NDArray[np.void]
    #: bool, shape (m,); False where the descriptor cannot be read.
    readable: BoolArray


def user_rows(tables: Tables, level: int) -> npt.NDArray[np.intp]:
    """Get the rows of a level in the spaces of mms, each time that a table is reached there."""
    user = np.array([space.kind is SpaceKind.USER for space in tables.spaces], np.bool_)
    rows = np.flatnonzero(tables.level == level)
    state = tables.state[rows]
    there = (state != RowState.CYCLE) & (state != RowState.OUTSIDE)
    found: npt.NDArray[np.intp] = rows[user[tables.space[rows]] & there]
    return found


def read_pmd_tables(prog: Program, tables: Tables) -> PmdTables:
    """
    Read the descriptors of all PMD tables of mms.

    :raises PtinspectError: if the memory model is not supported
    """
    rows = user_rows(tables, PMD_LEVEL)
    rows = rows[tables.first[rows] < 0]
    paging = tables.paging
    # The descriptor is that of the page in which the table begins (pmd_pgtable_page() in
    # include/linux/mm.h), which is the first of its pages: tables are aligned to their size.
    size = max(paging.levels[PMD_LEVEL].table_bytes, paging.page_bytes)
    first_byte = tables.address[rows] // np.uint64(size) * np.uint64(size)
    pages, page = np.unique(first_byte, return_inverse=True)
    ptdescs, known = Memmap(prog).pages_of(pages)
    dtype = ptdesc_dtype(prog)
    blocks = read_blocks(prog, ptdescs, dtype.itemsize, physical=False)
    return PmdTables(
        rows=rows,
        page=page.reshape(-1).astype(np.intp),
        pfns=pages // np.uint64(paging.page_bytes),
        ptdescs=ptdescs,
        descriptors=blocks.data.view(dtype).reshape(-1),
        readable=blocks.readable & known,
    )
