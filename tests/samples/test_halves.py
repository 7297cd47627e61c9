# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""s390's two tables in a page: bits and lists against what plain drgn reads, and damage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from corrupt import Answer, ask
from drgn import Object
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mm import page_to_pfn, pfn_to_page
from opened import Sample
from overlay import Overlay

from ptinspect.census import Holder, take_census
from ptinspect.checks import run_checks
from ptinspect.faces.fragments import frags_report
from ptinspect.state.halves import BOTH, LOWER, UPPER, Halves, halves_text, read_halves
from ptinspect.tables.spaces import SpaceKind


def halves_of(sample: Sample) -> Halves:
    story = take_census(sample.prog, leaf_counts=False).stories.halves
    if story is None:
        pytest.skip("this kernel has one table in a page")
    return story


def test_bits_agree_with_the_trees(sample: Sample) -> None:
    """Read again one by one: every linked half is allocated, and nothing else is."""
    story = halves_of(sample)
    prog, tables = sample.prog, story.tables
    linked: dict[int, int] = {}
    for row in np.flatnonzero(tables.level == 0).tolist():
        if tables.spaces[int(tables.space[row])].kind is SpaceKind.GMAP:
            continue
        pfn, offset = divmod(int(tables.address[row]), 4096)
        assert offset in (0, 2048)
        linked[pfn] = linked.get(pfn, 0) | (UPPER if offset else LOWER)
    typed = set(sample.scan.pfns.tolist())
    checked = 0
    for pfn, halves in linked.items():
        if pfn not in typed:
            # From before the page allocator.
            continue
        refcount = pfn_to_page(prog, pfn)._refcount.counter.value_()
        (row,) = np.flatnonzero(story.pfn == pfn).tolist()
        whole = bool(story.pgste[row])
        assert refcount & 0xFFFFFF == 1
        assert refcount >> 24 == (BOTH if whole else halves)
        assert (story.bits[row], story.count[row]) == (refcount >> 24, 1)
        assert story.linked[row] == halves
        checked += 1
    assert checked == len(story)
    assert checked > 20
    assert story.missing == ()
    assert not story.problem.any()


def test_lists_are_those_that_drgn_follows(sample: Sample) -> None:
    story = halves_of(sample)
    prog = sample.prog
    for found in story.lists:
        mm = story.tables.spaces[found.space].mm
        assert mm is not None
        head = mm.object(prog).context.pgtable_list.address_of_()
        pages = list_for_each_entry("struct page", head, "lru")
        pfns = sorted(page_to_pfn(page).value_() for page in pages)
        assert found.broken is None
        assert len(pfns) == found.pages
        assert story.pfn[story.listed == found.space].tolist() == pfns
    one = (story.allocated == LOWER) | (story.allocated == UPPER)
    assert ((story.listed >= 0) == one).all()


def test_mms_with_whole_pages(sample: Sample) -> None:
    """Those of KVM: the upper half has the PGSTEs."""
    story = halves_of(sample)
    for row in range(len(story)):
        mm = story.tables.spaces[int(story.space[row])].mm
        assert mm is not None
        whole = bool(mm.object(sample.prog).context.alloc_pgste.value_())
        assert bool(story.pgste[row]) == whole
        if whole:
            assert (story.bits[row], story.linked[row]) == (BOTH, LOWER)


# Damage


def answer(sample: Sample) -> Answer:
    return ask(sample.prog, lambda census: frags_report(census, "x", racing=False))


def page_with(story: Halves, bits: int) -> int:
    return int(story.pfn[np.flatnonzero((story.bits == bits) & ~story.pgste)[0]])


def refcount_of(sample: Sample, pfn: int) -> Object:
    return pfn_to_page(sample.prog, pfn)._refcount.counter


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (0x03, 0x02000001, "a half is linked, but not allocated"),
        (0x01, 0x00000001, "a half is linked, but not allocated"),
        (0x03, 0x13000001, "a half is allocated and waits to be freed at once"),
        (0x03, 0x22000001, "a half is allocated and waits to be freed at once"),
        (0x03, 0x07000001, "bits that mean nothing are set"),
        (0x03, 0x43000001, "bits that mean nothing are set"),
        (0x03, 0x03000002, "the count below the bits is not 1"),
        (0x03, 0x03000000, "the count below the bits is not 1"),
        (0x01, 0x03000001, "on a list, though not just one half is allocated"),
        (0x02, 0x03000001, "on a list, though not just one half is allocated"),
    ],
)
def test_wrong_bits(sample: Sample, before: int, after: int, problem: str) -> None:
    pfn = page_with(halves_of(sample), before)
    refcount = refcount_of(sample, pfn)
    with Overlay(sample.prog).value_of(refcount, after):
        found = answer(sample)
    assert found.status == 1
    line = found.line_with("FINDING")
    assert f"page {pfn:#x}: {problem}: _refcount {after:#010x}" in line
    assert answer(sample).status == 0


def test_a_half_that_waits(sample: Sample) -> None:
    """Legal beside an allocated half, or another that waits."""
    story = halves_of(sample)
    for before, after in ((0x01, 0x21000001), (0x02, 0x12000001)):
        pfn = page_with(story, before)
        with Overlay(sample.prog).value_of(refcount_of(sample, pfn), after):
            found = answer(sample)
            states = found.census.stories.halves
        assert found.status == 0
        assert states is not None
        assert states.states()[after >> 24] == 1


def test_a_half_that_nothing_links(sample: Sample) -> None:
    """The entry above it is cleared: allocated, on its way or leaked, but no contradiction."""
    story = halves_of(sample)
    pfn = page_with(story, 0x01)
    tables = story.tables
    (row,) = np.flatnonzero((tables.level == 0) & (tables.address == pfn * 4096)).tolist()
    entry = int(tables.entry_address[row])
    with Overlay(sample.prog).word_at(entry, 0x20, physical=True):
        found = answer(sample)
        census = found.census
        halves = census.stories.halves
    assert halves is not None
    assert halves.on_the_way.sum() == 1
    assert found.status == 0
    assert "on its way there, or leaked" in found.line_with(f"{pfn:#x}")
    assert "1 pages: a half is allocated" in found.text
    index = census.index_of_pfn(pfn)
    assert census.holder[index] == Holder.UNEXPLAINED


@contextmanager
def unlinked(overlay: Overlay, story: Halves, pfn: int) -> Iterator[None]:
    """Empty the entries that point to the two halves of a page."""
    tables = story.tables
    rows = np.flatnonzero((tables.level == 0) & (tables.address // 4096 == pfn)).tolist()
    first, second = (int(tables.entry_address[row]) for row in rows)
    with (
        overlay.word_at(first, 0x20, physical=True),
        overlay.word_at(second, 0x20, physical=True),
    ):
        yield


def test_a_page_whose_halves_only_wait(sample: Sample) -> None:
    """No tree has it, and no list: it is held until its halves are free."""
    story = halves_of(sample)
    pfn = page_with(story, 0x03)
    overlay = Overlay(sample.prog)
    with (
        unlinked(overlay, story, pfn),
        overlay.value_of(refcount_of(sample, pfn), 0x30000001),
    ):
        found = answer(sample)
        census = found.census
    assert found.status == 0
    assert census.holder[census.index_of_pfn(pfn)] == Holder.FRAGMENT_CACHE


def test_a_whole_page_in_a_batch(sample: Sample) -> None:
    """With PGSTEs a page keeps the bits of both halves until its batch is freed."""
    story = halves_of(sample)
    pfn = page_with(story, 0x03)
    overlay = Overlay(sample.prog)
    with (
        unlinked(overlay, story, pfn),
    ):
        tables = take_census(sample.prog, leaf_counts=False).tables
        lost = read_halves(sample.prog, tables, sample.scan)
        pending = np.array([pfn * 4096], np.uint64)
        waits = read_halves(sample.prog, tables, sample.scan, pending=pending)
        checked = run_checks(sample.prog)
    assert lost is not None
    assert waits is not None
    assert lost.pfn[lost.unreached].tolist() == [pfn]
    assert not waits.problem.any()
    # Who holds a whole page is for another invariant.
    found = {finding.invariant for finding in checked.findings}
    assert "typed-reachability" in found
    assert "s390-half-state" not in found


def test_a_list_that_is_cut(sample: Sample) -> None:
    story = halves_of(sample)
    pfn = int(story.pfn[np.flatnonzero(story.listed >= 0)[0]])
    node = pfn_to_page(sample.prog, pfn).lru
    overlay = Overlay(sample.prog)
    with overlay.value_of(node.next, 0):
        found = answer(sample)
        # The link back tells that no page is lost.
        assert found.status == 1
        line = found.line_with("FINDING", "pgtable_list of", "breaks")
        assert f"node {int(node.address_of_()):#x}, next 0x0" in line
        with overlay.value_of(node.prev, 0):
            found = answer(sample)
    # Now one page is.
    assert found.line_with("INCOMPLETE", "pgtable_list of", "breaks")


def test_a_page_on_another_mms_list(sample: Sample) -> None:
    """Two heads point to one page: the second one's links do not agree."""
    story = halves_of(sample)
    whole = [found for found in story.lists if found.pages]
    one, two = (story.tables.spaces[found.space].mm for found in whole[:2])
    assert one is not None
    assert two is not None
    first = one.object(sample.prog).context.pgtable_list
    second = two.object(sample.prog).context.pgtable_list
    overlay = Overlay(sample.prog)
    theirs = second.next
    with (
        overlay.value_of(first.next, theirs.value_()),
        overlay.value_of(theirs.prev, first.address_of_()),
        overlay.value_of(second.next, second.address_of_()),
        overlay.value_of(second.prev, second.address_of_()),
    ):
        found = answer(sample)
    assert found.status in (1, 4)
    assert found.line_with("FINDING", "on the list of another mm") or found.report.missing


@pytest.mark.parametrize(
    ("refcount", "text"),
    [
        (0x01000001, "1; lower half allocated, upper half free"),
        (0x12000001, "1; lower half pending, upper half allocated"),
        (0x22000002, "2; lower half free, upper half allocated and pending"),
    ],
)
def test_words(refcount: int, text: str) -> None:
    assert halves_text(refcount) == text
