# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objects of a slab cache, found in the memory map without visiting every page one by one."""

from __future__ import annotations

import numpy as np
from drgn import FaultError, Object, Program, cast, offsetof, sizeof
from drgn.helpers.linux.mm import PageSlab, page_to_phys

from ptinspect.kernel.descriptor import byte_order
from ptinspect.kernel.direct_map import physical_to_virtual
from ptinspect.memory import AddressArray, ByteArray
from ptinspect.tables.scan import memmap_ranges, read_memmap


class SlabPages:
    """
    The pages of one slab cache, gathered while the memory map is read.

    :param cache: ``struct kmem_cache *``
    :raises FaultError: if the pointer cannot be read
    """

    def __init__(self, prog: Program, cache: Object) -> None:
        self._prog = prog
        self._cache = cache.read_()
        self._wanted = self._cache.value_()
        self._page_size = sizeof(prog.type("struct page"))
        self._offset = offsetof(prog.type("struct slab"), "slab_cache")
        self._word = np.dtype(f"{byte_order(prog)}u8")
        #: Addresses of struct pages whose ``slab_cache`` is the cache: slabs, and what looks so.
        self._pages: list[int] = []

    def look(self, address: int, rows: ByteArray) -> None:
        """
        Look at struct pages that follow each other.

        :param address: Of the first.
        :param rows: uint8, shape (n, bytes); zeros where they cannot be read.
        """
        if not self._wanted:
            # No cache yet: every empty struct page would look like one of its.
            return
        words = np.ndarray(
            len(rows), self._word, rows, offset=self._offset, strides=(rows.strides[0],)
        )
        for row in np.flatnonzero(words == self._wanted).tolist():
            self._pages.append(address + row * self._page_size)

    def objects(self) -> AddressArray:
        """
        Get the addresses of all objects in the pages seen so far, the free ones among them.

        The caller tells the free ones by what is in them: freelists lie in several places that
        differ between kernels, and cost a search for each object.

        :return: uint64, shape (n,).
        :raises FaultError: if the cache cannot be read
        """
        page_pointer = self._prog.type("struct page *")
        slab_type = self._prog.type("struct slab *")
        size = self._cache.size.value_()
        try:
            padding = self._cache.red_left_pad.value_()
        except AttributeError:
            # Only with CONFIG_SLUB_DEBUG.
            padding = 0
        parts = []
        for address in self._pages:
            page = Object(self._prog, page_pointer, address)
            try:
                if not PageSlab(page):
                    continue
                count = cast(slab_type, page).objects.value_()
                first = physical_to_virtual(self._prog, int(page_to_phys(page).value_()))
            except FaultError:
                continue
            each = np.arange(count, dtype=np.uint64) * np.uint64(size)
            parts.append(np.uint64(first + padding) + each)
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def slab_objects(prog: Program, cache: Object) -> AddressArray:
    """
    Get the addresses of all objects of a cache, reading the whole memory map for it.

    :param cache: ``struct kmem_cache *``
    :return: See :meth:`SlabPages.objects`.
    :raises PtinspectError: see :func:`~ptinspect.tables.scan.memmap_ranges`
    """
    pages = SlabPages(prog, cache)
    page_size = sizeof(prog.type("struct page"))
    for run in memmap_ranges(prog):
        for _, address, rows, _ in read_memmap(prog, run, page_size):
            pages.look(address, rows)
            del rows
    return pages.objects()
