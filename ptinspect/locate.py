# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""From what a person types (a pfn, a physical or virtual address) to a descriptor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from drgn import FaultError, Object, Program, sizeof
from drgn.helpers.linux.mm import (
    compound_head,
    page_to_phys,
    pfn_to_page,
)

from ptinspect.errors import IncompleteError, UsageError
from ptinspect.kernel.descriptor import page_ptdesc
from ptinspect.kernel.direct_map import virtual_to_physical
from ptinspect.tables.scan import PageRange, memmap_ranges


class AddressKind(Enum):
    """What a number that a person typed can be."""

    PFN = "pfn"
    PHYSICAL = "phys"
    PTDESC = "ptdesc"
    VIRTUAL = "virt"


@dataclass(frozen=True)
class Located:
    """The descriptor that an address belongs to."""

    #: ``struct ptdesc *`` of the head page.
    ptdesc: Object
    kind: AddressKind
    #: The page that was named is a tail page of the descriptor's.
    is_tail: bool


def parse_address(text: str) -> tuple[AddressKind | None, int]:
    """
    Split ``phys:0x1000``, ``pfn:12``, ``page:0xffff...``, ``ptdesc:...``, ``virt:...`` or a number.

    :return: The kind if it was given, and the number (decimal, or hexadecimal after ``0x``).
    :raises UsageError: if it is no number
    """
    prefix, colon, number = text.rpartition(":")
    kind = None
    if colon:
        try:
            kind = AddressKind("ptdesc" if prefix == "page" else prefix)
        except ValueError:
            raise UsageError(
                f"unknown kind of address {prefix!r}: use pfn, phys, page, ptdesc or virt"
            ) from None
    try:
        value = int(number, 0)
    except ValueError:
        # crash and drgn print addresses without 0x: take those that can be nothing else.
        try:
            value = int(number, 16)
        except ValueError:
            raise UsageError(
                f"{text!r} is neither an address nor a page frame number: give a number or "
                "pfn:N, phys:ADDR, virt:ADDR, page:ADDR or ptdesc:ADDR"
            ) from None
    if not 0 <= value < 1 << 64:
        raise UsageError(f"{text!r} does not fit in 64 bits")
    return kind, value


def locate_ptdesc(prog: Program, text: str) -> Located:
    """
    Find the descriptor that an address belongs to.

    A bare number is a descriptor if it lies in the memory map, else a direct-map address, else a
    page frame number if there is such a page frame, else a physical address.

    :param prog: The kernel.
    :param text: Such a number, or pfn:N, phys:ADDR, page:ADDR, ptdesc:ADDR, virt:ADDR.
    :return: The descriptor (``struct ptdesc *``) of the head page, and how the text was taken.
    :raises UsageError: if there is no struct page for it
    :raises IncompleteError: if the struct page is not in the dump
    """
    kind, value = parse_address(text)
    ranges = memmap_ranges(prog)
    if kind is None:
        kind = _guess_kind(prog, ranges, value)
    page = _page_at(prog, ranges, kind, value)
    if page is None:
        raise UsageError(f"{value:#x} is no {_DESCRIPTIONS[kind]} of this target's memory")
    try:
        head = compound_head(page).read_()
    except FaultError as error:
        raise IncompleteError(f"the struct page of {value:#x} cannot be read: {error}") from error
    return Located(page_ptdesc(head), kind, head.value_() != page.value_())


def locate_physical(prog: Program, text: str) -> tuple[int, int]:
    """
    Get the physical memory that an address means, with the same rules as :func:`locate_ptdesc`.

    :param prog: The kernel.
    :param text: A number, or pfn:N, phys:ADDR, page:ADDR, ptdesc:ADDR, virt:ADDR.
    :return: Physical address, and the bytes that are meant: a page for a page frame number or a
        descriptor, one byte for an address.
    :raises UsageError: if there is no such memory
    """
    kind, value = parse_address(text)
    ranges = memmap_ranges(prog)
    if kind is None:
        kind = _guess_kind(prog, ranges, value)
    page = _page_at(prog, ranges, kind, value)
    if page is None:
        raise UsageError(f"{value:#x} is no {_DESCRIPTIONS[kind]} of this target's memory")
    start = int(page_to_phys(page).value_())
    page_bytes = int(prog["PAGE_SIZE"].value_())
    if kind in (AddressKind.PFN, AddressKind.PTDESC):
        return start, page_bytes
    return start + value % page_bytes, 1


_DESCRIPTIONS = {
    AddressKind.PFN: "page frame number",
    AddressKind.PHYSICAL: "physical address",
    AddressKind.PTDESC: "address of a struct page",
    AddressKind.VIRTUAL: "direct-map address",
}


def _guess_kind(prog: Program, ranges: list[PageRange], value: int) -> AddressKind:
    if _pfn_of_page(prog, ranges, value) is not None:
        return AddressKind.PTDESC
    if _has_pfn(ranges, value):
        return AddressKind.PFN
    if value >> 63 or _has_pfn(ranges, _direct_map_pfn(prog, value)):
        return AddressKind.VIRTUAL
    return AddressKind.PHYSICAL


def _page_at(
    prog: Program, ranges: list[PageRange], kind: AddressKind, value: int
) -> Object | None:
    if kind is AddressKind.PTDESC:
        pfn = _pfn_of_page(prog, ranges, value)
    elif kind is AddressKind.VIRTUAL:
        pfn = _direct_map_pfn(prog, value)
    elif kind is AddressKind.PHYSICAL:
        pfn = value >> int(prog["PAGE_SHIFT"].value_())
    else:
        pfn = value
    return pfn_to_page(prog, pfn) if pfn is not None and _has_pfn(ranges, pfn) else None


def _has_pfn(ranges: list[PageRange], pfn: int) -> bool:
    return any(r.start_pfn <= pfn < r.end_pfn for r in ranges)


def _pfn_of_page(prog: Program, ranges: list[PageRange], address: int) -> int | None:
    size = int(sizeof(prog.type("struct page")))
    for pages in ranges:
        # An address inside a struct page, such as that of its list node, means that page.
        index = (address - pages.memmap) // size
        if 0 <= index < pages.end_pfn - pages.start_pfn:
            return pages.start_pfn + index
    return None


def _direct_map_pfn(prog: Program, address: int) -> int:
    """Page frame of a direct-map address; for other addresses one that does not exist."""
    try:
        physical = virtual_to_physical(prog, address)
    except (LookupError, FaultError, ValueError):
        return -1
    return physical >> int(prog["PAGE_SHIFT"].value_())
