# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a target has physical memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from drgn import Program

from ptinspect.memory import AddressArray, BoolArray
from ptinspect.tables.scan import memmap_ranges


class PhysicalRanges:
    """Half-open ranges of physical addresses."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(ranges):
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        self.ranges = tuple(merged)
        self._begins = np.array([begin for begin, _ in merged], np.uint64)
        self._ends = np.array([end for _, end in merged], np.uint64)

    def contain(self, addresses: AddressArray, size: int) -> BoolArray:
        """
        Tell which blocks lie wholly in memory.

        :param addresses: uint64, shape (n,).
        :param size: Bytes in a block.
        """
        if not len(self._begins):
            return np.zeros(len(addresses), np.bool_)
        place = np.searchsorted(self._begins, addresses, side="right")
        inside = place > 0
        end = self._ends[np.maximum(place, 1) - 1]
        # Not address + size, which could wrap.
        inside &= (addresses < end) & (end - addresses >= np.uint64(size))
        return inside

    def contain_ascending(self, addresses: AddressArray, size: int) -> BoolArray:
        """Tell the same of addresses in ascending order, which is quicker."""
        inside = np.zeros(len(addresses), np.bool_)
        for begin, end in self.ranges:
            if end - begin >= size:
                first = np.searchsorted(addresses, np.uint64(begin))
                last = np.searchsorted(addresses, np.uint64(end - size), side="right")
                inside[first:last] = True
        return inside


def physical_ranges(prog: Program) -> PhysicalRanges:
    """
    Get the memory that the kernel has struct pages for.

    :raises PtinspectError: see :func:`~ptinspect.tables.scan.memmap_ranges`
    """
    page = 1 << prog["PAGE_SHIFT"].value_()
    return PhysicalRanges(
        (pages.start_pfn * page, pages.end_pfn * page) for pages in memmap_ranges(prog)
    )
