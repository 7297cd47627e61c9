# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the struct page of any page frame says it is, many pages at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from drgn import Program

from ptinspect.kernel.descriptor import flags_bit, page_type_test, ptdesc_dtype
from ptinspect.memory import AddressArray, BoolArray, ByteArray, read_blocks
from ptinspect.tables.memmap import Memmap
from ptinspect.tables.scan import MemmapScan, descriptor_indices

#: PG_buddy of the kernels whose page types are macros (include/linux/page-flags.h, up to 6.10).
_MACRO_BUDDY = 0x80
_NO_TYPE = 0xFFFFFFFF


@dataclass(frozen=True)
class Pages:
    """The struct pages of some page frames, in the order in which they were asked for."""

    pfns: npt.NDArray[np.uint64]
    #: Records of :func:`~ptinspect.kernel.descriptor.ptdesc_dtype`; zeros if not readable.
    records: npt.NDArray[np.void]
    #: bool: there is such a page, and its struct page is in the target's memory.
    readable: BoolArray
    #: bool: the kernel has no struct page for it.
    outside: BoolArray
    typed: BoolArray
    slab: BoolArray
    #: In the buddy allocator.
    buddy: BoolArray
    #: Another page type than these, or mapped by processes (the count lies over the type).
    foreign: BoolArray
    lru: BoolArray
    #: Not the first page of a compound page.
    tail: BoolArray

    @property
    def refcounts(self) -> npt.NDArray[np.int64]:
        """int64, ``_refcount``."""
        counts: npt.NDArray[np.int64] = self.records["__page_refcount"].astype(np.int64)
        return counts

    def word(self, row: int) -> int:
        """Get ``page_type`` of a page."""
        return int(self.records["__page_type"][row])


class _Unscanned(NamedTuple):
    """Struct pages that the scan did not keep."""

    #: uint8, shape (n, bytes); zeros if not readable.
    data: ByteArray
    readable: BoolArray
    #: Whether the kernel has such a struct page.
    known: BoolArray


class PageReader:
    """Reads struct pages by page frame."""

    def __init__(self, prog: Program, scan: MemmapScan) -> None:
        """
        :param scan: What it found is not read again.
        """
        self._prog = prog
        self._scan = scan
        self._memmap = Memmap(prog)
        self._dtype = ptdesc_dtype(prog)
        self._names = _type_names(prog)

    def pfns(self, addresses: AddressArray) -> tuple[npt.NDArray[np.uint64], BoolArray]:
        """Get the page frames of addresses that may be struct pages, and whether they are."""
        return self._memmap.pfns(addresses)

    def read(
        self, pfns: npt.NDArray[np.uint64], descriptor: npt.NDArray[np.int32] | None = None
    ) -> Pages:
        """
        Read the struct pages of page frames.

        :param pfns: uint64, shape (n,), any numbers, repeats allowed.
        :param descriptor: What :func:`descriptor_indices` says of them, if that is known.
        """
        scan = self._scan
        if descriptor is None:
            descriptor = descriptor_indices(scan, pfns)
        scanned = descriptor >= 0
        # The other pages of a compound page have struct pages of their own.
        scanned[scanned] = scan.pfns[descriptor[scanned]] == pfns[scanned]
        rest, back = np.unique(pfns[~scanned], return_inverse=True)
        more = self._read(rest)
        # Of each page the place among those of the scan and the others.
        place = descriptor.astype(np.intp)
        place[~scanned] = len(scan.pfns) + back
        # As bytes, which NumPy moves ten times as fast as records.
        found = scan.descriptors.view(np.uint8).reshape(-1, self._dtype.itemsize)
        data = np.concatenate((found, more.data)).take(place, axis=0)
        records = data.view(self._dtype).reshape(-1)
        there = np.ones(len(found), np.bool_)
        readable = np.concatenate((there, more.readable)).take(place)
        outside = ~np.concatenate((there, more.known)).take(place)
        types = records["__page_type"].astype(np.uint32)
        typed, slab, buddy, typeless = self._kinds(types, records["pt_flags"].astype(np.uint64))
        lru_bit = flags_bit(self._prog, "PG_lru") or 0
        columns = {
            "typed": typed,
            "slab": slab,
            "buddy": buddy & ~slab,
            "foreign": ~(typed | slab | buddy | typeless),
            # The word of compound_head (compound_info since 7.1) is odd in tail pages.
            "tail": (records["_pt_pad_1"] & np.uint64(1)) != 0,
            "lru": (records["pt_flags"] & np.uint64(lru_bit)) != 0,
        }
        return Pages(
            pfns,
            records,
            readable,
            outside,
            **{name: column & readable for name, column in columns.items()},
        )

    def _read(self, pfns: npt.NDArray[np.uint64]) -> _Unscanned:
        addresses, known = self._memmap.addresses(pfns)
        blocks = read_blocks(self._prog, addresses[known], self._dtype.itemsize, physical=False)
        data = np.zeros((len(pfns), self._dtype.itemsize), np.uint8)
        data[known] = blocks.data
        readable = known.copy()
        readable[known] = blocks.readable
        return _Unscanned(data, readable, known)

    def _kinds(
        self, types: npt.NDArray[np.uint32], flags: npt.NDArray[np.uint64]
    ) -> tuple[BoolArray, BoolArray, BoolArray, BoolArray]:
        """Tell typed, slab, buddy and typeless pages."""
        prog = self._prog
        test = page_type_test(prog)
        none: BoolArray = types == _NO_TYPE
        typed: BoolArray = (types & np.uint32(test.mask)) == np.uint32(test.match)
        if test.mask == 0xFF000000:
            high = types >> np.uint32(24)
            buddy: BoolArray = high == _constant(prog, "PGTY_buddy", 0xF0)
            slab: BoolArray = high == _constant(prog, "PGTY_slab", 0xF5)
            return typed, slab, buddy, none
        # Inverted bits. Slabs have a flag of their own (before 6.11), and use the word themselves.
        slab_bit = flags_bit(prog, "PG_slab")
        slab = (flags & np.uint64(slab_bit or 0)) != 0
        bit = _constant(prog, "PG_buddy", _MACRO_BUDDY)
        base = np.uint32(test.match)
        buddy = (types & (base | np.uint32(bit))) == base
        return typed & ~slab, slab, buddy, none

    def name(self, word: int) -> str:
        """Say what a ``page_type`` means."""
        if word == _NO_TYPE:
            return "no type"
        name = self._names.get(word >> 24)
        return f"type {name}" if name else f"type word {word:#x}"


def _constant(prog: Program, name: str, otherwise: int) -> int:
    try:
        return int(prog.constant(name).value_())
    except LookupError:
        return otherwise


def _type_names(prog: Program) -> dict[int, str]:
    """Get the names of the page types of kernels that have one type a page (6.12 and later)."""
    try:
        enumerators = prog.type("enum pagetype").enumerators or ()
    except LookupError:
        return {}
    return {
        int(value): name.partition("_")[2]
        for name, value in enumerators
        if name.startswith("PGTY_") and value < 256
    }
