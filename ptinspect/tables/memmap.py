# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Page frames and their struct pages, many at a time, and only those that the kernel has."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from drgn import Program, sizeof

from ptinspect.memory import AddressArray, BoolArray
from ptinspect.tables.scan import memmap_ranges


class Memmap:
    """
    Where the struct pages of a target are.

    :raises PtinspectError: see :func:`~ptinspect.tables.scan.memmap_ranges`
    """

    def __init__(self, prog: Program) -> None:
        self.page_struct_bytes = sizeof(prog.type("struct page"))
        self._shift = np.uint64(prog["PAGE_SHIFT"].value_())
        ranges = memmap_ranges(prog)
        by_pfn = sorted((r.start_pfn, r.end_pfn, r.memmap) for r in ranges)
        self._begins = np.array([begin for begin, _, _ in by_pfn], np.uint64)
        self._ends = np.array([end for _, end, _ in by_pfn], np.uint64)
        self._maps = np.array([memmap for _, _, memmap in by_pfn], np.uint64)
        self._by_map = np.argsort(self._maps, kind="stable")

    def addresses(self, pfns: npt.NDArray[np.uint64]) -> tuple[AddressArray, BoolArray]:
        """
        Get the addresses of the struct pages of page frames.

        :param pfns: uint64, shape (n,), any numbers.
        :return: uint64 addresses, and bool whether there is such a page.
        """
        if not len(self._begins):
            return np.zeros(len(pfns), np.uint64), np.zeros(len(pfns), np.bool_)
        place = np.searchsorted(self._begins, pfns, side="right").astype(np.intp) - 1
        here = np.maximum(place, 0)
        known = (place >= 0) & (pfns < self._ends[here])
        index = np.where(known, pfns - self._begins[here], 0).astype(np.uint64)
        addresses = self._maps[here] + index * np.uint64(self.page_struct_bytes)
        return np.where(known, addresses, np.uint64(0)), known

    def pfns(self, addresses: AddressArray) -> tuple[npt.NDArray[np.uint64], BoolArray]:
        """
        Get the page frames of addresses that may be those of struct pages.

        :param addresses: uint64, shape (n,), any numbers.
        :return: uint64 page frames, and bool whether a struct page begins just there.
        """
        if not len(self._maps):
            return np.zeros(len(addresses), np.uint64), np.zeros(len(addresses), np.bool_)
        maps = self._maps[self._by_map]
        place = np.searchsorted(maps, addresses, side="right").astype(np.intp) - 1
        here = self._by_map[np.maximum(place, 0)]
        offset = np.where(place >= 0, addresses - self._maps[here], np.uint64(0))
        size = np.uint64(self.page_struct_bytes)
        index = offset // size
        known = (place >= 0) & (offset % size == 0)
        known &= index < self._ends[here] - self._begins[here]
        return np.where(known, self._begins[here] + index, np.uint64(0)), known

    def pages_of(self, physical: AddressArray) -> tuple[AddressArray, BoolArray]:
        """Get the addresses of the struct pages of physical addresses, as :meth:`addresses`."""
        return self.addresses(physical >> self._shift)
