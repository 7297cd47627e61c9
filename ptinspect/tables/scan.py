# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every page that is marked as a page table, found in the memory map (the array of struct page)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from drgn import FaultError, ObjectNotFoundError, Program, sizeof
from drgn.helpers.linux.mm import for_each_valid_page_range

from ptinspect.errors import IncompleteError, TargetError
from ptinspect.kernel.descriptor import (
    compound_order_field,
    flags_bit,
    page_type_dtype,
    page_type_test,
    ptdesc_dtype,
    ptdesc_is_native,
)
from ptinspect.memory import (
    AddressArray,
    BoolArray,
    ByteArray,
    read_blocks,
    read_range,
)

#: Called now and then with (pages done, pages in all).
Progress = Callable[[int, int], None]

#: Is shown struct pages that follow each other: address of the first, uint8 rows.
MemmapVisitor = Callable[[int, ByteArray], None]

#: Bytes of the memory map in one read: less work for each read than with the usual chunks counts
#: here for more than their fitting into a smaller cache (scripts/bench scan).
READ_BYTES = 2 << 20

#: The largest order that the page allocator of any kernel hands out (MAX_ORDER with 64K pages).
_LARGEST_ORDER = 13


@dataclass(frozen=True)
class PageRange:
    """Page frames [start_pfn, end_pfn) whose struct pages lie one after the other at *memmap*."""

    start_pfn: int
    end_pfn: int
    #: Address of the struct page of *start_pfn*.
    memmap: int


@dataclass(frozen=True)
class MemmapScan:
    """All descriptors of one target; arrays of the same length, in order of the page frame."""

    #: uint64, head pages.
    pfns: npt.NDArray[np.uint64]
    #: uint64, addresses of the descriptors.
    addresses: AddressArray
    #: Records of :func:`~ptinspect.kernel.descriptor.ptdesc_dtype`.
    descriptors: npt.NDArray[np.void]
    #: uint8, allocation order where the page is compound, else 0.
    orders: npt.NDArray[np.uint8]
    #: bool, False where the order could not be read or is impossible (then it is given as 0).
    order_known: BoolArray
    #: Struct pages that were looked at.
    scanned_pages: int
    #: Struct pages that could not be read, in and beside the ones looked at.
    unreadable_pages: int

    @property
    def complete(self) -> bool:
        """Whether every struct page of the target was seen."""
        return not self.unreadable_pages and bool(self.order_known.all())


def memmap_ranges(prog: Program) -> list[PageRange]:
    """
    Get the runs of valid page frames of any memory model that drgn knows.

    :raises TargetError: if drgn does not support the memory model (SPARSEMEM without VMEMMAP)
    :raises IncompleteError: if the section tables are not in the dump
    """
    size = sizeof(prog.type("struct page"))
    ranges = []
    try:
        for start, end, memmap in for_each_valid_page_range(prog):
            ranges.append(PageRange(start, end, memmap.value_() + start * size))
    except FaultError as error:
        raise IncompleteError(f"the memory sections cannot be read: {error}") from error
    except ObjectNotFoundError as error:
        raise TargetError(f"this kernel's memory model is not supported: {error}") from error
    return ranges


def scan_memmap(
    prog: Program, progress: Progress | None = None, visitor: MemmapVisitor | None = None
) -> MemmapScan:
    """
    Find every typed page, reading the memory map in large pieces.

    :param prog: The kernel.
    :param progress: Called now and then with how much is done and how much there is.
    :param visitor: Is shown the whole memory map, piece after piece, for what else is looked for
        in it; struct pages that could not be read are zero.
    :return: The page frames and their raw descriptors as arrays, in order of the page frames.
    :raises TargetError: if the kernel does not mark its page tables, or has an unknown memory model
    :raises IncompleteError: if the section tables are not in the dump
    """
    dtype = ptdesc_dtype(prog)
    ranges = memmap_ranges(prog)
    total = sum(r.end_pfn - r.start_pfn for r in ranges)
    matcher = _TypeMatcher(prog)
    pfns: list[npt.NDArray[np.uint64]] = []
    addresses: list[AddressArray] = []
    raw: list[ByteArray] = []
    scanned = unreadable = 0
    for pages in ranges:
        for first_pfn, address, rows, missing in read_memmap(prog, pages, dtype.itemsize):
            if visitor is not None:
                visitor(address, rows)
            found = matcher.find(rows)
            if len(found):
                pfns.append(found.astype(np.uint64) + np.uint64(first_pfn))
                addresses.append(
                    found.astype(np.uint64) * np.uint64(dtype.itemsize) + np.uint64(address)
                )
                raw.append(np.take(rows, found, axis=0))
            scanned += len(rows) - missing
            unreadable += missing
            if progress is not None:
                progress(scanned + unreadable, total)
            # Freed before the next read, which then gets the same memory, still in the cache.
            del rows
    all_addresses = np.concatenate(addresses) if addresses else np.empty(0, np.uint64)
    all_raw = np.concatenate(raw) if raw else np.empty((0, dtype.itemsize), np.uint8)
    descriptors = np.ascontiguousarray(all_raw).view(dtype).reshape(len(all_raw))
    orders, order_known = compound_orders(prog, all_addresses, descriptors)
    return MemmapScan(
        pfns=np.concatenate(pfns) if pfns else np.empty(0, np.uint64),
        addresses=all_addresses,
        descriptors=descriptors,
        orders=orders,
        order_known=order_known,
        scanned_pages=scanned,
        unreadable_pages=unreadable,
    )


def read_memmap(
    prog: Program, pages: PageRange, page_struct_bytes: int
) -> Iterator[tuple[int, int, ByteArray, int]]:
    """
    Read the struct pages of a range: (first pfn, its address, uint8 rows, how many are missing).

    Rows that cannot be read are zero, and no page type is zero. Let go of the rows before the next
    are read: they then come in the same memory, which is still in the cache.
    """
    per_read = READ_BYTES // page_struct_bytes
    for first in range(pages.start_pfn, pages.end_pfn, per_read):
        count = min(per_read, pages.end_pfn - first)
        address = pages.memmap + (first - pages.start_pfn) * page_struct_bytes
        size = count * page_struct_bytes
        missing = 0
        try:
            data = np.frombuffer(prog.read(address, size), np.uint8)
        except FaultError:
            data, readable = _read_with_holes(prog, address, size)
            whole = readable.reshape(count, page_struct_bytes).all(axis=1)
            missing = count - int(np.count_nonzero(whole))
            data.reshape(count, page_struct_bytes)[~whole] = 0
        rows = data.reshape(count, page_struct_bytes)
        del data
        yield first, address, rows, missing
        del rows


def _read_with_holes(prog: Program, address: int, size: int) -> tuple[ByteArray, BoolArray]:
    data = np.zeros(size, np.uint8)
    readable = np.zeros(size, np.bool_)
    for chunk in read_range(prog, address, size):
        if chunk.data is not None:
            span = slice(chunk.address - address, chunk.address - address + chunk.size)
            data[span] = np.frombuffer(chunk.data, np.uint8)
            readable[span] = True
    return data, readable


class _TypeMatcher:
    """Finds the rows of a piece of the memory map that carry the page-table page type."""

    def __init__(self, prog: Program) -> None:
        test = page_type_test(prog)
        dtype, offset = page_type_dtype(prog)
        self._mask: int = test.mask
        self._match: int = test.match
        self._dtype = dtype
        self._offset = offset
        if test.mask == 0xFF000000:
            # One byte decides: looking at it alone is several times faster than at the whole word.
            most_significant = 3 if dtype.newbyteorder("<") == dtype else 0
            self._offset += most_significant
            self._dtype = np.dtype(np.uint8)  # type: ignore[assignment]
            self._mask, self._match = 0xFF, test.match >> 24

    def find(self, rows: ByteArray) -> npt.NDArray[np.intp]:
        if self._dtype.itemsize == 1:
            return np.flatnonzero(rows[:, self._offset] == self._match)
        words = np.ndarray(
            len(rows), self._dtype, rows, offset=self._offset, strides=(rows.strides[0],)
        )
        return np.flatnonzero((words & self._mask) == self._match)


def descriptor_indices(scan: MemmapScan, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """
    Get the index of the descriptor that covers each page, or -1 if it is not typed.

    :param pfns: uint64, shape (n,); the tails of a compound page are covered by its head.
    """
    result = np.full(len(pfns), -1, np.int32)
    if not len(scan.pfns):
        return result
    place = np.searchsorted(scan.pfns, pfns, side="right") - 1
    head = np.maximum(place, 0)
    pages = np.left_shift(np.uint64(1), scan.orders[head].astype(np.uint64))
    covered = (place >= 0) & (pfns - scan.pfns[head] < pages)
    result[covered] = place[covered]
    return result


def compound_orders(
    prog: Program, addresses: AddressArray, descriptors: npt.NDArray[np.void]
) -> tuple[npt.NDArray[np.uint8], BoolArray]:
    """
    Get the allocation order of descriptors whose pages are compound, 0 for the others.

    :param addresses: uint64, shape (n,), of the descriptors.
    :return: uint8 orders, and bool whether each could be read and is possible.
    """
    orders = np.zeros(len(descriptors), np.uint8)
    known = np.ones(len(descriptors), np.bool_)
    head_bit = flags_bit(prog, "PG_head")
    if head_bit is None or not len(descriptors):
        return orders, known
    heads = np.flatnonzero(descriptors["pt_flags"] & np.uint64(head_bit))
    field = compound_order_field(prog)
    blocks = read_blocks(
        prog, addresses[heads] + np.uint64(field.offset), field.dtype.itemsize, physical=False
    )
    values = blocks.data.reshape(-1).view(field.dtype) & field.dtype.type(0xFF)
    plausible = blocks.readable & (values <= _LARGEST_ORDER)
    orders[heads] = np.where(plausible, values, 0)
    known[heads] = plausible
    return orders, known


def counted_pages(prog: Program, scan: MemmapScan) -> npt.NDArray[np.int64]:
    """
    Get the number of pages that each descriptor adds to NR_PAGETABLE.

    Kernels with ``struct ptdesc`` count all pages of the folio (``lruvec_stat_add_folio`` in the
    constructors of include/linux/mm.h); older ones count every table as one page
    (``inc_lruvec_page_state``), of whatever order it is.
    """
    if not ptdesc_is_native(prog):
        return np.ones(len(scan.orders), np.int64)
    pages: npt.NDArray[np.int64] = np.left_shift(np.int64(1), scan.orders.astype(np.int64))
    return pages
