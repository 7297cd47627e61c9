# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real dumps: the counts that their kernels gave, and descriptors as plain drgn reads them."""

from __future__ import annotations

import numpy as np
import pytest
from drgn import Object, TypeKind, cast
from drgn.helpers.linux.mm import page_to_pfn, pfn_to_page, virt_to_pfn
from opened import Sample

from ptinspect import describe_ptdesc, page_ptdesc, ptdesc_is_native, ptdesc_pfn, summarise
from ptinspect.records import FieldState
from ptinspect.state.fields import typed_levels
from ptinspect.target import sample_names

REQUIRED = {
    *("x86_64-7.3", "x86_64-7.3-load", "x86_64-6.1", "x86_64-6.12-lockdep"),
    *("s390x-6.1", "s390x-6.12", "s390x-7.3", "arm64-7.3", "ppc64le-6.12"),
}


def test_the_samples_are_there() -> None:
    assert set(sample_names()) >= REQUIRED


def test_typed_pages_are_those_that_the_kernel_showed(sample: Sample) -> None:
    """/proc/kpageflags of the guest itself, page by page."""
    truth = sample.truth["kpageflags_pgtable"]
    pfns = [
        pfn
        for start, count in truth["pfns"]
        for pfn in range(int(start, 16), int(start, 16) + count)
    ]
    assert len(pfns) == truth["count"]
    # Of compound tables some kernels show all pages, others the first alone.
    heads = zip(sample.scan.pfns.tolist(), sample.scan.orders.tolist())
    tails = {head + page for head, order in heads for page in range(1, 1 << order)}
    assert sample.scan.pfns.tolist() == [pfn for pfn in pfns if pfn not in tails]
    assert sample.scan.complete


def test_counted_pages_are_nr_pagetable(sample: Sample) -> None:
    summary = summarise(sample.prog, sample.scan)
    assert summary.counter is not None
    truth = sample.truth["nr_page_table_pages"]
    assert summary.counter.global_pages == truth["global"]
    assert summary.counter.exact_pages == truth["exact"]
    assert sum(summary.counter.node_pages.values()) == truth["exact"]
    assert summary.counted_pages == truth["exact"]
    assert summary.difference == 0
    assert summary.complete


def test_nodes_are_those_of_the_zones(sample: Sample) -> None:
    """The node in the flags word against the node whose span has the page."""
    summary = summarise(sample.prog, sample.scan)
    assert {count.node for count in summary.typed} <= {
        int(node) for node in sample.truth["node_vmstat"] or {"0": {}}
    }


def chosen(sample: Sample, count: int = 100) -> list[int]:
    """Page frames of typed pages, spread over all of them; every kind of order is among them."""
    scan = sample.scan
    spread = np.unique(np.linspace(0, len(scan.pfns) - 1, count).astype(int))
    with_order = np.flatnonzero(scan.orders)[:10]
    return [int(pfn) for pfn in scan.pfns[np.union1d(spread, with_order)]]


# Where a member of struct ptdesc lies in struct page of a kernel without struct ptdesc, as a C
# programmer would write it.
_PAGE_EXPRESSIONS = {
    "pt_flags": "flags",
    "pt_rcu_head": "callback_head",
    "pt_list": "lru",
    "_pt_pad_1": "_pt_pad_1",
    "pmd_huge_pte": "pmd_huge_pte",
    "__page_mapping": "mapping",
    "pt_index": "index",
    "pt_mm": "pt_mm",
    "pt_frag_refcount": "pt_frag_refcount",
    "pt_share_count": "pt_share_count",
    "ptl": "ptl",
    "__page_type": "page_type",
    "__page_refcount": "_refcount",
    "pt_memcg_data": "memcg_data",
}


def words(value: Object) -> tuple[int, ...]:
    """The integers in an object, depth first, as plain drgn gives them."""
    if value.type_.unaliased_kind() == TypeKind.STRUCT:
        members = value.type_.unaliased().members or ()
        return tuple(w for m in members if m.name for w in words(value.member_(m.name)))
    if value.type_.unaliased_kind() == TypeKind.UNION:
        return words(value.member_((value.type_.unaliased().members or ())[0].name or ""))
    return (int(value.value_()),)


def test_every_member_equals_plain_drgn(sample: Sample) -> None:
    prog = sample.prog
    native = ptdesc_is_native(prog)
    compared = 0
    for pfn in chosen(sample):
        page = pfn_to_page(prog, pfn)
        plain = cast("struct ptdesc *", page) if native else page
        record = describe_ptdesc(page_ptdesc(page))
        assert record.pfn == pfn == page_to_pfn(page).value_()
        for field in record.fields:
            if field.state is FieldState.ABSENT:
                continue
            name = field.name
            if not native:
                name = _PAGE_EXPRESSIONS[name]
            elif name == "pt_flags" and not plain.type_.type.has_member(name):
                name = "__page_flags"
            member = plain.member_(name)
            if field.name == "ptl" and len(field.raw) == 1:
                expected: tuple[int, ...] = (
                    int.from_bytes(member.to_bytes_(), byte_order_of(member)),
                )
            else:
                expected = words(member)
            assert field.raw == expected, (hex(pfn), field.name)
            compared += 1
    assert compared >= 10 * len(chosen(sample)) >= 10 * 50


def byte_order_of(value: Object) -> str:
    platform = value.prog_.platform
    assert platform is not None
    return "little" if platform.flags & platform.flags.IS_LITTLE_ENDIAN else "big"


def test_descriptor_and_pfn_are_inverse(sample: Sample) -> None:
    for pfn in chosen(sample, 20):
        pt = page_ptdesc(pfn_to_page(sample.prog, pfn))
        assert ptdesc_pfn(pt).value_() == pfn


def test_pgds_name_their_mm(sample: Sample) -> None:
    """7.3 types its PGDs; each of them is the pgd of the mm that it names."""
    if sample.name != "x86_64-7.3":
        pytest.skip("only x86 has pt_mm, and before 7.x its PGDs are not typed")
    levels = typed_levels(sample.prog, sample.scan)
    roots = np.flatnonzero(levels == "PGD")
    processes = len({p["tgid"] for p in sample.truth["processes"]})
    assert len(roots) >= processes // 2
    for row in roots.tolist():
        mm = Object(sample.prog, "struct mm_struct *", int(sample.scan.descriptors["pt_mm"][row]))
        address = mm.pgd.value_()
        assert virt_to_pfn(sample.prog, address).value_() == int(sample.scan.pfns[row])
