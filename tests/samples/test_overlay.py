# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""That a corruption laid over a dump is seen by every way of reading it, and goes away again."""

from __future__ import annotations

from opened import Sample
from overlay import Overlay

from ptinspect import page_ptdesc, ptdesc_member, scan_memmap
from ptinspect.kernel.descriptor import pfn_to_ptdesc, ptdesc_address, ptdesc_page


def test_descriptor_and_table(sample: Sample) -> None:
    prog, scan = sample.prog, sample.scan
    overlay = Overlay(prog)
    pt = pfn_to_ptdesc(prog, int(scan.pfns[5]))
    refcount = ptdesc_page(pt)._refcount.counter
    with overlay.value_of(refcount, 7):
        assert refcount.value_() == 7
        assert ptdesc_member(page_ptdesc(ptdesc_page(pt)), "__page_refcount").counter == 7
        assert scan_memmap(prog).descriptors["__page_refcount"][5] == 7
    assert scan_memmap(prog).descriptors["__page_refcount"].tolist() == (
        scan.descriptors["__page_refcount"].tolist()
    )
    table = int(scan.pfns[5]) * int(prog["PAGE_SIZE"])
    address = int(ptdesc_address(pt))
    before = prog.read_u64(address)
    with overlay.word_at(table, 0x1234567, physical=True):
        assert prog.read_u64(address) == prog.read_u64(table, True) == 0x1234567
    assert prog.read_u64(address) == prog.read_u64(table, True) == before
