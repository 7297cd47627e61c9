# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objects of a slab cache, found in the memory map without visiting every page one by one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from drgn import FaultError, Object, Program, cast, offsetof, sizeof
from drgn.helpers.linux.mm import PageSlab, page_to_phys

from ptinspect.kernel.descriptor import byte_order
from ptinspect.kernel.direct_map import physical_to_virtual
from ptinspect.memory import CHUNK_BYTES, AddressArray, ByteArray, read_blocks
from ptinspect.tables.scan import PageRange, memmap_ranges


def slab_objects(prog: Program, cache: Object) -> AddressArray:
    """
    Get the addresses of all objects of a cache, the free ones among them.

    The caller tells the free ones by what is in them: freelists lie in several places that differ
    between kernels, and cost a search for each object.

    :param cache: ``struct kmem_cache *``
    :return: uint64, shape (n,).
    :raises PtinspectError: see :func:`~ptinspect.tables.scan.memmap_ranges`
    """
    slab_type = prog.type("struct slab *")
    size = cache.size.value_()
    try:
        padding = cache.red_left_pad.value_()
    except AttributeError:
        # Only with CONFIG_SLUB_DEBUG.
        padding = 0
    parts = []
    for page in _pages_of_cache(prog, cache.value_()):
        try:
            if not PageSlab(page):
                continue
            count = cast(slab_type, page).objects.value_()
            first = physical_to_virtual(prog, int(page_to_phys(page).value_())) + padding
        except FaultError:
            continue
        parts.append(np.uint64(first) + np.arange(count, dtype=np.uint64) * np.uint64(size))
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def _pages_of_cache(prog: Program, cache: int) -> Iterator[Object]:
    """Find the struct pages whose ``slab_cache`` is a cache: slabs, and what looks like them."""
    page_pointer = prog.type("struct page *")
    page_size = sizeof(prog.type("struct page"))
    offset = offsetof(prog.type("struct slab"), "slab_cache")
    word = np.dtype(f"{byte_order(prog)}u8")
    for pages in memmap_ranges(prog):
        for address, rows in _read_memmap(prog, pages, page_size):
            words = np.ndarray(len(rows), word, rows, offset=offset, strides=(rows.strides[0],))
            for row in np.flatnonzero(words == cache).tolist():
                yield Object(prog, page_pointer, address + row * page_size)


def _read_memmap(
    prog: Program, pages: PageRange, page_size: int
) -> Iterator[tuple[int, ByteArray]]:
    """Read struct pages: address of the first, uint8 rows. Unreadable rows are zero."""
    per_read = CHUNK_BYTES // page_size
    for first in range(pages.start_pfn, pages.end_pfn, per_read):
        count = min(per_read, pages.end_pfn - first)
        address = pages.memmap + (first - pages.start_pfn) * page_size
        try:
            data = np.frombuffer(prog.read(address, count * page_size), np.uint8)
            rows = data.reshape(count, page_size)
        except FaultError:
            each = address + np.arange(count, dtype=np.uint64) * np.uint64(page_size)
            rows = read_blocks(prog, each, page_size, physical=False).data
        yield address, rows
