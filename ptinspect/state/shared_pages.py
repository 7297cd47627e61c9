# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What pages with several tables in them have in common: powerpc's fragments and s390's halves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from drgn import Program

from ptinspect.kernel.descriptor import ptdesc_dtype
from ptinspect.memory import AddressArray, BoolArray, read_blocks
from ptinspect.tables.memmap import Memmap
from ptinspect.tables.scan import MemmapScan, descriptor_indices
from ptinspect.tables.walk import Tables


def mm_numbers(tables: Tables) -> npt.NDArray[np.int64]:
    """
    Get, by space, the index of the space that stands for its mm: a number for each mm.

    fork() starts with a plain copy of the parent's mm (dup_mm()), root and caches and all; as long
    as it has the parent's root, it counts as the parent.
    """
    of_root: dict[int, int] = {}
    for number, space in enumerate(tables.spaces):
        known = of_root.setdefault(space.root.address, number)
        if space.tasks and not tables.spaces[known].tasks:
            of_root[space.root.address] = number
    of_mm: dict[int, int] = {}
    numbers = []
    for space in tables.spaces:
        same = of_root[space.root.address]
        # The second root of page-table isolation comes after the first.
        numbers.append(same if space.mm is None else of_mm.setdefault(space.mm.address, same))
    return np.array(numbers, np.int64)


def lowest_by_page(
    count: int, place: npt.NDArray[np.intp], values: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], BoolArray]:
    """
    Get the lowest of the values that belong to each page, and whether they differ.

    :param count: Number of pages.
    :param place: By value, the page that it belongs to.
    :param values: int64, not negative.
    :return: int64, -1 for a page without a value; bool.
    """
    lowest = np.full(count, np.iinfo(np.int64).max, np.int64)
    highest = np.full(count, -1, np.int64)
    np.minimum.at(lowest, place, values)
    np.maximum.at(highest, place, values)
    return np.where(highest < 0, -1, lowest), (highest >= 0) & (lowest != highest)


def read_descriptors(
    prog: Program, scan: MemmapScan, memmap: Memmap, pfns: AddressArray
) -> tuple[npt.NDArray[np.void], BoolArray]:
    """
    Get the descriptors of page frames: from the scan if they are typed, else from memory.

    :return: Records of :func:`~ptinspect.kernel.descriptor.ptdesc_dtype`, and bool whether each
        could be read.
    """
    dtype = ptdesc_dtype(prog)
    index = descriptor_indices(scan, pfns)
    readable = index >= 0
    descriptors = np.zeros(len(pfns), dtype)
    descriptors[readable] = scan.descriptors[index[readable]]
    rest = np.flatnonzero(~readable)
    addresses, known = memmap.addresses(pfns[rest])
    rest, addresses = rest[known], addresses[known]
    blocks = read_blocks(prog, addresses, dtype.itemsize, physical=False)
    descriptors[rest] = blocks.data.view(dtype).reshape(-1)
    readable[rest] = blocks.readable
    return descriptors, readable
