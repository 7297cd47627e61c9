# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a number that a person types can mean."""

from __future__ import annotations

import pytest
from mock_kernel import FIRST_PFN, MEMMAP, PAGE_BYTES, PG_HEAD, MockKernel

from ptinspect.errors import IncompleteError, UsageError
from ptinspect.locate import AddressKind, locate_ptdesc, parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0x10", (None, 16)),
        ("10", (None, 10)),
        ("ffffea0000000040", (None, 0xFFFFEA0000000040)),
        ("pfn:0x10", (AddressKind.PFN, 16)),
        ("phys:4096", (AddressKind.PHYSICAL, 4096)),
        ("page:0x40", (AddressKind.PTDESC, 64)),
        ("ptdesc:0x40", (AddressKind.PTDESC, 64)),
        ("virt:0xffff888000001000", (AddressKind.VIRTUAL, 0xFFFF888000001000)),
    ],
)
def test_parse(text: str, expected: tuple[AddressKind | None, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "zork", "zork:1", "pfn:", "0x10000000000000000", "-1"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


def pfn_of(kernel: MockKernel, text: str) -> tuple[int, AddressKind, bool]:
    located = locate_ptdesc(kernel.prog, text)
    pfn = (located.ptdesc.value_() - MEMMAP) // PAGE_BYTES + FIRST_PFN
    return pfn, located.kind, located.is_tail


def test_a_bare_number_is_what_it_can_be() -> None:
    kernel = MockKernel("7.3")
    # An address inside a struct page, like that of its list node, means that page.
    inside = MEMMAP + 3 * PAGE_BYTES + 8
    assert pfn_of(kernel, hex(inside)) == (FIRST_PFN + 3, AddressKind.PTDESC, False)
    assert pfn_of(kernel, hex(FIRST_PFN + 5)) == (FIRST_PFN + 5, AddressKind.PFN, False)
    physical = (FIRST_PFN + 7) * 4096 + 123
    assert pfn_of(kernel, hex(physical)) == (FIRST_PFN + 7, AddressKind.PHYSICAL, False)


def test_a_tail_page_leads_to_its_head() -> None:
    kernel = MockKernel("6.12")
    kernel.put(FIRST_PFN + 8, 0, 1 << PG_HEAD, 8)
    kernel.put(FIRST_PFN + 9, 8, MEMMAP + 8 * PAGE_BYTES + 1, 8)
    assert pfn_of(kernel, f"pfn:{FIRST_PFN + 9:#x}") == (FIRST_PFN + 8, AddressKind.PFN, True)


def test_what_is_not_there() -> None:
    kernel = MockKernel("6.12")
    with pytest.raises(UsageError, match="is no page frame number"):
        locate_ptdesc(kernel.prog, "pfn:1")
    kernel.holes.append((0, 4096))
    with pytest.raises(IncompleteError, match="cannot be read"):
        locate_ptdesc(kernel.prog, hex(FIRST_PFN + 5))
