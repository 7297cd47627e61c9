# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Columns, conditions and order of ``list``."""

from __future__ import annotations

import pytest
from mock_kernel import CANONICAL_TYPE, FIRST_PFN, NO_TYPE, MockKernel

from ptinspect.errors import UsageError
from ptinspect.listing import Listing
from ptinspect.tables.scan import scan_memmap

TYPED = (1, 5, 9, 200)


@pytest.fixture
def listing() -> Listing:
    kernel = MockKernel("7.3")
    for index in range(256):
        typed = index in TYPED
        kernel.put(FIRST_PFN + index, 48, CANONICAL_TYPE["7.3"] if typed else NO_TYPE, 4)
        kernel.put(FIRST_PFN + index, 52, 1, 4)
    kernel.put(FIRST_PFN + 5, 52, 3, 4)
    kernel.put(FIRST_PFN + 9, 0, 1 << 1, 8)  # PT_kernel
    kernel.put(FIRST_PFN + 200, 56, 0xFFFF000000000002, 8)
    return Listing(kernel.prog, scan_memmap(kernel.prog))


def pfns(listing: Listing, *conditions: str, **options: object) -> list[int]:
    rows = listing.select(conditions, **options)  # type: ignore[arg-type]
    return [pfn - FIRST_PFN for pfn in listing.column("pfn").values[rows].tolist()]


def test_conditions(listing: Listing) -> None:
    assert pfns(listing) == [1, 5, 9, 200]
    assert pfns(listing, "refcount != 1") == [5]
    assert pfns(listing, "refcount=1") == [1, 9, 200]
    assert pfns(listing, "__page_refcount >= 2") == [5]
    assert pfns(listing, f"pfn<{FIRST_PFN + 9:#x}", "refcount==1") == [1]
    assert pfns(listing, "memcg & 2") == [200]
    assert pfns(listing, "flags & PT_kernel") == [9]
    assert pfns(listing, "order=0", "node=0") == [1, 5, 9, 200]


def test_a_row_without_a_value_meets_no_condition(listing: Listing) -> None:
    assert pfns(listing, "pt_mm=0") == []
    assert pfns(listing, "raw:pt_mm=0") == [1, 5, 9, 200]
    assert pfns(listing, "level != PGD") == []


def test_sort_and_limit(listing: Listing) -> None:
    assert pfns(listing, sort="-pfn", limit=2) == [200, 9]
    assert pfns(listing, sort="refcount")[-1] == 5
    assert pfns(listing, limit=0) == []


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("refcount", "is not COLUMN OP VALUE"),
        ("frobnicate=1", "no column 'frobnicate'"),
        ("refcount=many", "'many' in 'refcount=many' is not a number"),
        ("order=-1", "does not fit column order"),
        ("flags<PG_head", "compares numbers, not text"),
        ("flags & PG_nonsense", "no page flag 'PG_nonsense'"),
        ("pt_list=0", "use pt_list.next and pt_list.prev"),
    ],
)
def test_bad_conditions_say_what_is_wrong(listing: Listing, condition: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        listing.select([condition])


def test_stale_union_members_are_not_shown_as_values(listing: Listing) -> None:
    for name in ("pt_mm", "pt_index", "pmd_huge_pte", "pt_list.next", "pt_rcu_head.func"):
        assert not listing.column(name).present.any(), name
        assert listing.column(f"raw:{name}").present.all(), name
