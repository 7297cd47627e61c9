# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The descriptor's type, names, NumPy type and page type, on kernels of every shape."""

from __future__ import annotations

import numpy as np
import pytest
from drgn import offsetof, sizeof
from mock_kernel import CANONICAL_TYPE, FIRST_PFN, NO_TYPE, MockKernel

from ptinspect import (
    page_is_pgtable,
    page_ptdesc,
    ptdesc_dtype,
    ptdesc_flags,
    ptdesc_has_member,
    ptdesc_is_native,
    ptdesc_member,
    ptdesc_page,
    ptdesc_test_kernel,
    ptdesc_type,
)
from ptinspect.kernel.descriptor import (
    MEMBER_NAMES,
    canonical_member_name,
    native_member_name,
    page_type_test,
)

SHAPES = ("7.3", "6.12", "6.11", "6.1")


@pytest.fixture(params=[(s, e) for s in SHAPES for e in (True, False)], ids=str)
def kernel(request: pytest.FixtureRequest) -> MockKernel:
    shape, little_endian = request.param
    return MockKernel(shape, little_endian=little_endian)


def test_native_type_is_taken_where_it_exists(kernel: MockKernel) -> None:
    native = kernel.shape in ("7.3", "6.12")
    assert ptdesc_is_native(kernel.prog) is native
    if native:
        assert str(ptdesc_type(kernel.prog)) == str(kernel.prog.type("struct ptdesc"))


def test_overlay_has_the_offsets_of_struct_page() -> None:
    prog = MockKernel("6.1").prog
    overlay = ptdesc_type(prog)
    assert sizeof(overlay) == sizeof(prog.type("struct page"))
    expected = {
        "pt_flags": 0,
        "pt_rcu_head": 8,
        "pt_list": 8,
        "_pt_pad_1": 8,
        "pmd_huge_pte": 16,
        "__page_mapping": 24,
        "pt_index": 32,
        "pt_mm": 32,
        "pt_frag_refcount": 32,
        "ptl": 40,
        "__page_type": 48,
        "__page_refcount": 52,
        "pt_memcg_data": 56,
    }
    assert {name: offsetof(overlay, name) for name in expected} == expected


def test_absent_members_are_absent_not_zero() -> None:
    prog = MockKernel("6.1").prog
    assert not ptdesc_has_member(prog, "pt_share_count")
    assert "pt_share_count" not in (ptdesc_dtype(prog).names or ())
    with pytest.raises(LookupError, match="pt_share_count"):
        native_member_name(prog, "pt_share_count")


def test_every_name_leads_to_the_one_spelling() -> None:
    assert canonical_member_name("__page_flags") == "pt_flags"
    assert canonical_member_name("flags") == "pt_flags"
    assert canonical_member_name("lru") == "pt_list"
    assert canonical_member_name("compound_head") == "_pt_pad_1"
    assert canonical_member_name("compound_info") == "_pt_pad_1"
    assert canonical_member_name("__folio_index") == "pt_index"
    for name in MEMBER_NAMES:
        assert canonical_member_name(name) == name
    with pytest.raises(LookupError, match="no member 'frobnicate'"):
        canonical_member_name("frobnicate")


def test_one_spelling_reads_every_kernel(kernel: MockKernel) -> None:
    kernel.put(FIRST_PFN + 3, 0, 0x42, 8)
    kernel.put(FIRST_PFN + 3, 32, 0x1234, 8)
    kernel.put(FIRST_PFN + 3, 52, 7, 4)
    pt = page_ptdesc(kernel.page(FIRST_PFN + 3))
    assert ptdesc_flags(pt).value_() == 0x42
    assert ptdesc_member(pt, "pt_index").value_() == 0x1234
    assert ptdesc_member(pt, "__folio_index").value_() == 0x1234
    assert ptdesc_member(pt, "_refcount").counter.value_() == 7
    assert ptdesc_page(pt).value_() == kernel.page(FIRST_PFN + 3).value_()


def test_dtype_reads_what_drgn_reads(kernel: MockKernel) -> None:
    random = np.random.default_rng(1)
    pfn = FIRST_PFN + 5
    for offset in range(0, 64, 8):
        kernel.put(pfn, offset, int(random.integers(1 << 63)), 8)
    pt = page_ptdesc(kernel.page(pfn))
    dtype = ptdesc_dtype(kernel.prog)
    row = np.frombuffer(kernel.prog.read(pt.value_(), dtype.itemsize), dtype)[0]
    for name in dtype.names or ():
        base, _, part = name.partition(".")
        value = ptdesc_member(pt, base)
        if part:
            value = value.member_(part)
        raw = value.to_bytes_()
        expected = int.from_bytes(raw, kernel.byteorder, signed=row[name].dtype.kind == "i")  # type: ignore[arg-type]
        assert int(row[name]) == expected, name


def test_page_type(kernel: MockKernel) -> None:
    kernel.put(FIRST_PFN, 48, CANONICAL_TYPE[kernel.shape], 4)
    kernel.put(FIRST_PFN + 1, 48, NO_TYPE, 4)
    kernel.put(FIRST_PFN + 2, 48, 0, 4)
    assert page_type_test(kernel.prog).canonical == CANONICAL_TYPE[kernel.shape]
    assert [page_is_pgtable(kernel.page(FIRST_PFN + i)) for i in range(3)] == [True, False, False]


def test_kernel_mark_is_unknown_where_the_kernel_has_none(kernel: MockKernel) -> None:
    kernel.put(FIRST_PFN, 0, 1 << 1, 8)
    pt = page_ptdesc(kernel.page(FIRST_PFN))
    assert ptdesc_test_kernel(pt) is (True if kernel.shape == "7.3" else None)
