# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory-map scan, on struct pages that the test wrote."""

from __future__ import annotations

import numpy as np
import pytest
from mock_kernel import CANONICAL_TYPE, FIRST_PFN, MEMMAP, NO_TYPE, PAGE_BYTES, PG_HEAD, MockKernel

from ptinspect.tables.scan import READ_BYTES, counted_pages, scan_memmap

#: More struct pages than fit one read of the scan.
MANY = 3 * READ_BYTES // PAGE_BYTES + 77

#: Values of page_type that mean something else: another type, a mapped page.
OTHER_TYPES = {
    "7.3": (0xF1000000, 0xF3000000, 0, 0x00F20000),
    "6.12": (0xF1000000, 0xF3000000, 0, 0x00F20000),
    "6.11": (0xDFFFFFFF, 0xBFFFFFFF, 0, 0x6FFFFFFF),
    "6.1": (0xFFFFFEFF, 0xFFFFFF7F, 0, 0x7FFFFDFF),
}


def kernel_with(shape: str, typed: set[int], *, little_endian: bool = True) -> MockKernel:
    kernel = MockKernel(shape, little_endian=little_endian, pages=MANY)
    words = np.frombuffer(kernel.memory, f"{'<' if little_endian else '>'}u4").reshape(MANY, -1)
    words[:, 48 // 4] = NO_TYPE
    for index in typed:
        words[index, 48 // 4] = CANONICAL_TYPE[shape]
    return kernel


@pytest.mark.parametrize("little_endian", [True, False])
@pytest.mark.parametrize("shape", ["7.3", "6.12", "6.11", "6.1"])
def test_finds_just_the_typed_pages(shape: str, little_endian: bool) -> None:
    typed = {0, 1, 16383, 16384, 30000, MANY - 1}
    kernel = kernel_with(shape, typed, little_endian=little_endian)
    for near_miss, value in enumerate(OTHER_TYPES[shape], start=5):
        kernel.put(FIRST_PFN + near_miss, 48, value, 4)
    scan = scan_memmap(kernel.prog)
    assert scan.pfns.tolist() == [FIRST_PFN + i for i in sorted(typed)]
    assert scan.addresses.tolist() == [MEMMAP + i * PAGE_BYTES for i in sorted(typed)]
    assert (scan.scanned_pages, scan.unreadable_pages) == (MANY, 0)
    assert scan.complete


def test_descriptors_hold_the_bytes_of_their_pages() -> None:
    kernel = kernel_with("7.3", {7, 20000})
    kernel.put(FIRST_PFN + 20000, 56, 0xABC, 8)
    scan = scan_memmap(kernel.prog)
    assert scan.descriptors["pt_memcg_data"].tolist() == [0, 0xABC]


@pytest.mark.parametrize(("shape", "weights"), [("7.3", [1, 4, 2]), ("6.1", [1, 1, 1])])
def test_orders_and_weights(shape: str, weights: list[int]) -> None:
    kernel = kernel_with(shape, {3, 4, 8})
    for index, order in ((4, 2), (8, 1)):
        kernel.put(FIRST_PFN + index, 0, 1 << PG_HEAD, 8)
        kernel.put(FIRST_PFN + index + 1, 0, 0x100 | order, 8)
    scan = scan_memmap(kernel.prog)
    assert scan.orders.tolist() == [0, 2, 1]
    assert counted_pages(kernel.prog, scan).tolist() == weights


def test_impossible_order_is_said_not_believed() -> None:
    kernel = kernel_with("7.3", {3})
    kernel.put(FIRST_PFN + 3, 0, 1 << PG_HEAD, 8)
    kernel.put(FIRST_PFN + 4, 0, 200, 8)
    scan = scan_memmap(kernel.prog)
    assert scan.orders.tolist() == [0]
    assert scan.order_known.tolist() == [False]
    assert not scan.complete


def test_holes_are_counted_and_what_is_beside_them_is_seen() -> None:
    kernel = kernel_with("7.3", {10, 100, 40000})
    # Two pages of the memory map are not in the dump: 64 struct pages each.
    kernel.holes += [(4096, 8192), (1 << 20, (1 << 20) + 4096)]
    scan = scan_memmap(kernel.prog)
    assert scan.pfns.tolist() == [FIRST_PFN + 10, FIRST_PFN + 40000]
    assert scan.unreadable_pages == 128
    assert scan.scanned_pages == MANY - 128
    assert not scan.complete


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    scan_memmap(kernel_with("7.3", set()).prog, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (MANY, MANY)
    assert len(seen) == 4
