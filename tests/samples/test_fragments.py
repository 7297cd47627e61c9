# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""powerpc's table fragments: counts against what plain drgn reads, and each kind of damage."""

from __future__ import annotations

import numpy as np
import pytest
from corrupt import Answer, ask
from drgn import Object
from drgn.helpers.linux.mm import pfn_to_page, virt_to_pfn
from opened import Sample
from overlay import Overlay

from ptinspect import page_ptdesc, ptdesc_member
from ptinspect.census import Holder, take_census
from ptinspect.faces.fragments import frags_report
from ptinspect.state.fragments import Fragments


def fragments_of(sample: Sample) -> Fragments:
    story = take_census(sample.prog, leaf_counts=False).stories.fragments
    if story is None:
        pytest.skip("this kernel has no fragments")
    return story


def test_every_page_agrees_with_its_count(sample: Sample) -> None:
    """Counted again one by one, with plain reads of the counts and of the caches."""
    story = fragments_of(sample)
    prog = sample.prog
    tables = story.tables
    page = tables.paging.page_bytes
    in_use: dict[int, set[int]] = {}
    for address, level in zip(tables.address.tolist(), tables.level.tolist()):
        if level <= 1:
            in_use.setdefault(address // page, set()).add(address)
    for ring in take_census(prog, leaf_counts=False).stories.deposits.rings:
        for address in ring.tables:
            in_use.setdefault(address // page, set()).add(address)
    reserve: dict[int, int] = {}
    caches = 0
    for space in tables.spaces:
        assert space.mm is not None
        context = space.mm.object(prog).context
        for name in ("pte", "pmd"):
            pointer = context.member_(f"{name}_frag").value_()
            if not pointer:
                continue
            caches += 1
            number = prog[f"__{name}_frag_nr"].value_()
            size = 1 << prog[f"__{name}_frag_size_shift"].value_()
            pfn = virt_to_pfn(prog, pointer).value_()
            reserve[pfn] = number - pointer % page // size
            in_use.setdefault(pfn, set())
    assert story.missing == ()
    assert caches == len(story.caches)
    assert not story.problem.any()
    assert not any(cache.problem for cache in story.caches)
    assert sorted(in_use) == story.pfn.tolist()
    checked = 0
    for row, pfn in enumerate(story.pfn.tolist()):
        if story.boot[row]:
            continue
        pt = page_ptdesc(pfn_to_page(prog, pfn))
        count = ptdesc_member(pt, "pt_frag_refcount").counter.value_()
        assert count == len(in_use[pfn]) + reserve.get(pfn, 0)
        assert (story.refcount[row], story.used[row]) == (count, len(in_use[pfn]))
        checked += 1
    assert checked >= len(sample.scan.pfns)


# Damage


def answer(sample: Sample) -> Answer:
    return ask(sample.prog, lambda census: frags_report(census, "x", racing=False))


def page_of(sample: Sample, level: int, *, cached: bool) -> tuple[int, Object, Object]:
    """A page of a user mm: page frame, its count as a reference, the mm of its space."""
    story = fragments_of(sample)
    kernel = np.array([space.kernel for space in story.tables.spaces])
    fits = (story.level == level) & ((story.cached >= 0) == cached) & ~kernel[story.space]
    row = int(np.flatnonzero(fits & (story.linked > 1))[0])
    mm = story.tables.spaces[int(story.space[row])].mm
    assert mm is not None
    pt = page_ptdesc(pfn_to_page(sample.prog, int(story.pfn[row])))
    count = ptdesc_member(pt, "pt_frag_refcount").counter
    return int(story.pfn[row]), count, mm.object(sample.prog)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (1, "the count is more than was found"),
        (-1, "the count is less than the fragments in use"),
        (-1000, "the count is none that a page can have"),
        (1 << 30, "the count is none that a page can have"),
    ],
)
def test_wrong_count(sample: Sample, level: int, change: int, problem: str) -> None:
    story = fragments_of(sample)
    # A page whose count can grow and shrink and still be possible.
    spare = story.number - story.refcount
    row = int(np.flatnonzero((story.level == level) & (spare > 0) & (story.used > 1))[0])
    pfn = int(story.pfn[row])
    pt = page_ptdesc(pfn_to_page(sample.prog, pfn))
    count = ptdesc_member(pt, "pt_frag_refcount").counter
    with Overlay(sample.prog).value_of(count, count.value_() + change):
        found = answer(sample)
    line = found.line_with("FINDING", f"page {pfn:#x}:")
    assert f"{problem}" in line
    assert found.status == 1
    assert len(found.report.findings) == 1
    assert answer(sample).status == 0


@pytest.mark.parametrize(
    ("pointer", "problem"),
    [
        (0x1234, "points to no memory"),
        (0xFFFFFFFFFFFFFF00, "points to no memory"),
        ("odd", "does not point to the start of a fragment"),
        ("first", "points to the first fragment of a page"),
    ],
)
@pytest.mark.parametrize("name", ["pte", "pmd"])
def test_garbage_in_a_cache(sample: Sample, name: str, pointer: int | str, problem: str) -> None:
    pfn, _, mm = page_of(sample, ("pte", "pmd").index(name), cached=True)
    cache = mm.context.member_(f"{name}_frag")
    right = cache.value_()
    page = int(sample.prog["PAGE_SIZE"].value_())
    values = {"odd": right + 8, "first": right // page * page}
    value = values[pointer] if isinstance(pointer, str) else pointer
    with Overlay(sample.prog).value_of(cache, value):
        found = answer(sample)
    assert found.status == 1
    assert problem in found.line_with("FINDING", f"{name}_frag of", f"({value:#x})")
    # Without its cache the page's count is too high.
    assert "more than was found" in found.line_with("FINDING", f"page {pfn:#x}:")


def test_a_cache_that_points_back(sample: Sample) -> None:
    """It would hand out a table that is in use."""
    pfn, _, mm = page_of(sample, 0, cached=True)
    cache = mm.context.pte_frag
    size = 1 << sample.prog["__pte_frag_size_shift"].value_()
    with Overlay(sample.prog).value_of(cache, cache.value_() - size):
        found = answer(sample)
    assert found.status == 1
    assert "still has to hand out is in use" in found.line_with("FINDING", f"page {pfn:#x}:")


def test_a_cache_in_another_mms_page(sample: Sample) -> None:
    story = fragments_of(sample)
    kernel = np.array([space.kernel for space in story.tables.spaces])
    one, two = [c for c in story.caches if c.level == 0 and not kernel[c.space]][:2]
    mm = story.tables.spaces[one.space].mm
    assert mm is not None
    with Overlay(sample.prog).value_of(mm.object(sample.prog).context.pte_frag, two.pointer):
        found = answer(sample)
    assert found.status == 1
    found.line_with("FINDING", "pte_frag of", "points into a page of")
    assert "more than one cache" in found.line_with("FINDING", f"page {two.pfn:#x}:")


def test_a_cache_in_a_page_that_is_no_table(sample: Sample) -> None:
    _, _, mm = page_of(sample, 0, cached=True)
    garbage = sample.prog["init_mm"].pgd.value_() + 0x100
    with Overlay(sample.prog).value_of(mm.context.pte_frag, garbage):
        found = answer(sample)
    assert found.status == 1
    assert "is no page table" in found.line_with("FINDING", "pte_frag of")


def test_a_cache_of_an_mm_that_exits(sample: Sample) -> None:
    """arch_exit_mmap() takes what the cache has off the count and leaves the pointer."""
    pfn, count, mm = page_of(sample, 0, cached=True)
    overlay = Overlay(sample.prog)
    left = fragments_of(sample).reserve[row_of(sample, pfn)]
    with overlay.value_of(mm.mm_users.counter, 0):
        found = answer(sample)
        assert found.status == 0
        with overlay.value_of(count, count.value_() - int(left)):
            found = answer(sample)
    assert found.status == 0
    story = found.census.stories.fragments
    assert story is not None
    assert story.cached[int(np.flatnonzero(story.pfn == pfn)[0])] == -1
    assert "the mm exits or is new" in found.line_with("pte_frag", f"{pfn:#x}")


def test_a_mm_that_fork_has_just_copied(sample: Sample) -> None:
    """dup_mm() copies root and caches; only then the child gets its own."""
    pfn, _, mm = page_of(sample, 0, cached=True)
    spaces = fragments_of(sample).tables.spaces
    alone = next(s for s in spaces if not s.kernel and not s.tasks)
    assert alone.mm is not None
    child = alone.mm.object(sample.prog)
    overlay = Overlay(sample.prog)
    with (
        overlay.value_of(child.pgd, mm.pgd.value_()),
        overlay.value_of(child.context.pte_frag, mm.context.pte_frag.value_()),
        overlay.value_of(child.context.pmd_frag, mm.context.pmd_frag.value_()),
    ):
        found = answer(sample)
    # What the other mm had is lost now, but nothing is said of the parent.
    assert not any(f"{pfn:#x}" in finding for finding in found.report.findings)
    assert not any("points into" in finding for finding in found.report.findings)


def row_of(sample: Sample, pfn: int) -> int:
    return int(np.flatnonzero(fragments_of(sample).pfn == pfn)[0])


def test_what_only_a_cache_keeps_is_held(sample: Sample) -> None:
    """The PMD entry that leads to a page is cleared: the page is no orphan, its cache keeps it."""
    story = fragments_of(sample)
    tables = story.tables
    page = tables.paging.page_bytes
    counts = np.bincount(np.searchsorted(story.pfn, tables.address[tables.level == 0] // page))
    row = int(np.flatnonzero((counts == 1) & (story.cached[: len(counts)] >= 0))[0])
    place = np.flatnonzero((tables.level == 0) & (tables.address // page == story.pfn[row]))[0]
    entry = int(tables.entry_address[place])
    with Overlay(sample.prog).word_at(entry, 0, physical=True):
        census = take_census(sample.prog, leaf_counts=False)
        index = census.index_of_pfn(int(story.pfn[row]))
        assert index is not None
        assert census.holder[index] == Holder.FRAGMENT_CACHE
        found = answer(sample)
    # One is in use no more, but nobody took it off the count.
    assert "more than was found" in found.line_with("FINDING", f"{int(story.pfn[row]):#x}:")


def test_tables_of_another_kernel(sample: Sample) -> None:
    """Only kernels that have fragments tell any."""
    stories = take_census(sample.prog, leaf_counts=False).stories
    assert (stories.fragments is not None) == sample.name.startswith("ppc64le")
    assert stories.halves is None or sample.prog.type("mm_context_t").has_member("pgtable_list")
