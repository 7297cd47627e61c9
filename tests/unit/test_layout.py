# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""TABLE_MATCH verdicts, on descriptors that keep the promise and on one that breaks it."""

from __future__ import annotations

import pytest
from drgn import Type, TypeMember, sizeof
from mock_kernel import PAGE_BYTES, MockKernel

from ptinspect import ptdesc_has_member, ptdesc_layout, ptdesc_member
from ptinspect.kernel.descriptor import page_ptdesc, ptdesc_dtype
from ptinspect.records import Layout


def verdicts(layout: Layout, source: str = "kernel") -> dict[str, str]:
    return {m.ptdesc_member: m.verdict for m in layout.matches if m.source == source}


@pytest.mark.parametrize("shape", ["7.3", "6.12", "6.11", "6.1"])
def test_a_kernel_that_keeps_the_promise(shape: str) -> None:
    layout = ptdesc_layout(MockKernel(shape).prog)
    assert layout.native is (shape in ("7.3", "6.12"))
    assert layout.size_fits
    assert set(verdicts(layout).values()) == {"match"}
    assert layout.ptl == "embedded lock (spinlock_t, 4 bytes)"


def test_names_are_those_of_the_kernel() -> None:
    new = {(m.page_member, m.ptdesc_member) for m in ptdesc_layout(MockKernel("7.3").prog).matches}
    old = {(m.page_member, m.ptdesc_member) for m in ptdesc_layout(MockKernel("6.12").prog).matches}
    assert {("compound_info", "pt_list"), ("flags", "pt_flags")} <= new
    assert {("__folio_index", "pt_index")} <= new
    assert {("compound_head", "pt_list"), ("flags", "__page_flags"), ("index", "pt_index")} <= old


def test_a_moved_member_is_a_mismatch() -> None:
    kernel = MockKernel("7.3")
    native = kernel.types["ptdesc"]
    moved = [
        TypeMember(m.type, m.name, 60 * 8 if m.name == "__page_type" else m.bit_offset)
        for m in native.members or ()
    ]
    kernel.types["ptdesc"] = kernel.prog.struct_type("ptdesc", PAGE_BYTES, moved)
    said = verdicts(ptdesc_layout(kernel.prog))
    assert said.pop("__page_type") == "MISMATCH"
    assert set(said.values()) == {"match"}


def test_a_descriptor_that_is_too_large() -> None:
    kernel = MockKernel("7.3")
    members = list(kernel.types["ptdesc"].members or ())
    kernel.types["ptdesc"] = kernel.prog.struct_type("ptdesc", PAGE_BYTES + 8, members)
    assert not ptdesc_layout(kernel.prog).size_fits


def june_2023(kernel: MockKernel) -> Type:
    """struct ptdesc as the patch of 12 June 2023 proposed it."""
    page = kernel.types["page"]
    names = {
        "__page_flags": "flags",
        "pt_list": "lru",
        "_pt_pad_1": "_pt_pad_1",
        "pmd_huge_pte": "pmd_huge_pte",
        "pt_mm": "pt_mm",
        "pt_frag_refcount": "pt_frag_refcount",
        "ptl": "ptl",
    }
    members = [
        TypeMember(page.member(theirs).type, ours, page.member(theirs).bit_offset)
        for ours, theirs in names.items()
    ]
    members.append(TypeMember(kernel.ulong, "_pt_s390_gaddr", 24 * 8))
    return kernel.prog.struct_type("ptdesc", 48, members)


def test_the_patch_of_june_2023() -> None:
    kernel = MockKernel("6.1")
    kernel.types["ptdesc"] = june_2023(kernel)
    layout = ptdesc_layout(kernel.prog)
    assert layout.native
    assert layout.ptdesc_size == 48 < sizeof(kernel.types["page"])
    assert set(verdicts(layout, "June 2023").values()) == {"match"}
    assert ptdesc_has_member(kernel.prog, "_pt_s390_gaddr")
    assert not ptdesc_has_member(kernel.prog, "pt_index")
    kernel.put(0x105, 24, 0x140000000000, 8)
    pt = page_ptdesc(kernel.page(0x105))
    assert ptdesc_member(pt, "_pt_s390_gaddr").value_() == 0x140000000000
    assert "_pt_s390_gaddr" in (ptdesc_dtype(kernel.prog).names or ())
