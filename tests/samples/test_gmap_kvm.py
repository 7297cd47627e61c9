# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Guest address spaces that belong to KVM (from 7.0) against plain reads of them, and corruption.

What both generations have in common is asked in test_gmap.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from drgn import Object, Program
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mm import page_to_pfn, virt_to_page
from drgn.helpers.linux.radixtree import radix_tree_for_each
from drgn.helpers.linux.xarray import xa_for_each
from opened import Sample
from overlay import Overlay
from test_gmap import Made, census_of, gmaps, machine_of, made, main_pid, of_pid, walk

from ptinspect.census import Census
from ptinspect.checks.context import Context
from ptinspect.checks.leaves import QUESTIONS, Batch, LeafPass
from ptinspect.kernel.descriptor import pfn_to_ptdesc
from ptinspect.kernel.paging import EntryClass
from ptinspect.reach import reach_of
from ptinspect.state.gmap import Gmap, Relation, read_gmaps
from ptinspect.state.gmap_relations import GmapStory, read_gmap_story
from ptinspect.tables.lookup import Outcome
from ptinspect.tables.spaces import Space, SpaceKind, find_spaces
from ptinspect.tables.walk import walk_spaces


@pytest.fixture
def census(sample: Sample) -> Census:
    """The census of a sample whose guests are KVM's."""
    if not made(sample, "gmap-page"):
        pytest.skip("the sample has no guest address spaces")
    census = census_of(sample)
    if not gmaps(census)[0].kvm_owned:
        pytest.skip("the guest address spaces belong to mms")
    return census


def machines(prog: Program) -> list[Object]:
    return list(list_for_each_entry("struct kvm", prog["vm_list"].address_of_(), "vm_list"))


def test_machines_and_children_as_drgn_reads_them(sample: Sample, census: Census) -> None:
    expected = []
    for kvm in machines(sample.prog):
        pending = [(kvm.arch.gmap.read_(), 0)]
        while pending:
            gmap, parent = pending.pop(0)
            rmaps = radix_tree_for_each(gmap.host_to_rmap.address_of_())
            expected.append(
                (
                    *(int(word) for word in (gmap, kvm.mm, parent)),
                    *(int(word) for word in (gmap.asce.val, gmap.guest_asce.val, gmap.edat_level)),
                    bool(gmap.flags & 1),
                    {int(index): int(entry.value_()) for index, entry in rmaps},
                )
            )
            for child in list_for_each_entry("struct gmap", gmap.children.address_of_(), "list"):
                pending.append((child, int(gmap.value_())))
    found = [
        (
            *(gmap.address, gmap.mm, gmap.parent),
            *(gmap.asce, gmap.guest_asce, gmap.edat_level),
            gmap.shadow,
            gmap.host_to_rmap.entries,
        )
        for gmap in gmaps(census)
    ]
    assert found == expected
    assert sum(gmap.shadow for gmap in gmaps(census)) == 3
    assert sum(gmap.ucontrol_cpu for gmap in gmaps(census)) == 1
    # What the mm once had is still there, and stays empty.
    for space in census.spaces.spaces:
        if space.kind is SpaceKind.USER and space.mm is not None:
            head = space.mm.object(sample.prog).context.gmap_list
            assert head.next == head.address_of_()


def test_caches_as_drgn_reads_them(sample: Sample, census: Census) -> None:
    expected = set()
    for kvm in machines(sample.prog):
        caches = [kvm.arch.mc.read_()]
        for _, entry in xa_for_each(kvm.vcpu_array.address_of_()):
            caches.append(Object(sample.prog, "struct kvm_vcpu *", entry.value_()).arch.mc.read_())
        for cache in filter(None, caches):
            both = ((True, cache.crsts, cache.n_crsts), (False, cache.pts, cache.n_pts))
            for crst, array, count in both:
                for n in range(int(count)):
                    pfn = int(page_to_pfn(virt_to_page(array[n])))
                    expected.add((int(cache.value_()), crst, pfn))
    found = {(table.cache, table.crst, table.pfn) for table in census.stories.gmaps.gmaps.caches}
    assert found == expected
    assert {crst for _, crst, _ in found} == {True, False}


def test_what_a_kept_table_says(sample: Sample, census: Census) -> None:
    cached = census.stories.gmaps.gmaps.caches[0]
    ptdesc = int(pfn_to_ptdesc(sample.prog, cached.pfn).value_())
    (told,) = census.stories.told(cached.pfn, ptdesc)
    assert "kept ready by KVM for vcpu 0" in told.text
    (gmap,) = of_pid(census, main_pid(sample))
    assert gmap.space is not None
    root = gmap.space.root.address // census.paging.page_bytes
    told_of = census.stories.told(root, int(pfn_to_ptdesc(sample.prog, root).value_()))
    assert {what.member for what in told_of if what.stale} == {"pmd_huge_pte", "ptl", "pt_index"}


def test_segments_of_a_user_controlled_cpu(sample: Sample, census: Census) -> None:
    """Two segments were mapped: the one that was touched has a table, the other its name."""
    (page,) = made(sample, "gmap-user-page")
    cpu = machine_of(census, page)
    assert cpu.ucontrol_cpu
    story = census.stories.gmaps
    segment, host = page.guest >> 20, page.host >> 20
    expected = {segment: host, segment + 1: host + 1}
    assert story.machine_segments == {cpu.address: expected}
    assert (
        story.host_address(cpu, page.guest + (1 << 20) + 0x3000) == page.host + (1 << 20) + 0x3000
    )
    second = walk(sample, census, cpu, page.guest + (1 << 20))
    assert second.outcome is Outcome.NOT_PRESENT
    assert second.steps[-1].kind is EntryClass.MARKER
    tables = census.tables
    (number,) = [n for n, space in enumerate(tables.spaces) if space.gmap == cpu.address]
    rows = tables.rows_of_space(number)
    (row,) = rows[tables.level[rows] == 0]
    first = tables.spaces[int(tables.space[tables.first[row]])]
    assert first.gmap == cpu.parent


# Corruption: every relation broken once.


class Broken(NamedTuple):
    """The machines of a sample, and what is needed to break one."""

    prog: Program
    overlay: Overlay
    sample: Sample
    census: Census
    gmap: Gmap
    hosts: list[Space]

    def object(self, gmap: Gmap | None = None) -> Object:
        return Object(self.prog, "struct gmap *", (gmap or self.gmap).address)

    def story(self) -> GmapStory:
        guests = read_gmaps(self.prog, self.hosts).spaces
        tables = walk_spaces(self.prog, self.census.paging, [*self.hosts, *guests])
        return read_gmap_story(self.prog, tables)

    def relations(self) -> set[Relation]:
        return {found.relation for found in self.story().disagreements}

    def entry(self, gmap: Gmap, guest: int, level: int) -> int:
        """Get the physical address of a guest's entry of a level."""
        for step in walk(self.sample, self.census, gmap, guest).steps:
            if step.level == level:
                return step.entry_address
        raise AssertionError("the walk ends above")

    def shadow(self) -> Gmap:
        """Get the shadow of the guest's tables as they are without large segments."""
        shadows = [gmap for gmap in gmaps(self.census) if gmap.shadow]
        return next(gmap for gmap in shadows if (gmap.guest_asce, gmap.edat_level) == (0x10007, 0))

    def page(self) -> Made:
        return next(page for page in made(self.sample, "gmap-page") if page.pid == self.pid)

    @property
    def pid(self) -> int:
        return main_pid(self.sample)


@pytest.fixture
def broken(sample: Sample, census: Census) -> Broken:
    mms = {gmap.mm for gmap in gmaps(census)}
    hosts = [
        space
        for space in find_spaces(sample.prog, slab=False).spaces
        if space.kind is SpaceKind.USER and space.mm and space.mm.address in mms
    ]
    (gmap,) = of_pid(census, main_pid(sample))
    result = Broken(sample.prog, Overlay(sample.prog), sample, census, gmap, hosts)
    assert result.relations() == set()
    return result


def page_of_another(at: Broken, stack: ExitStack) -> None:
    entry = at.entry(at.gmap, at.page().guest, 0)
    value = at.prog.read_u64(entry, True)
    stack.enter_context(at.overlay.word_at(entry, value + 0x1000, physical=True))


def page_that_the_process_lost(at: Broken, stack: ExitStack) -> None:
    entry = at.entry(at.gmap, at.page().guest, 0)
    value = at.prog.read_u64(entry, True)
    stack.enter_context(at.overlay.word_at(entry + 8 * 200, value, physical=True))


def page_outside_of_the_slots(at: Broken, stack: ExitStack) -> None:
    entry = at.entry(at.gmap, 0x100000000, 1)
    value = at.prog.read_u64(entry, True)
    # The table is moved, for what is reached twice is looked at once.
    stack.enter_context(at.overlay.word_at(entry + 8 * 64, value, physical=True))
    stack.enter_context(at.overlay.word_at(entry, 0x20, physical=True))


def table_of_two(at: Broken, stack: ExitStack) -> None:
    shadow = at.shadow()
    (other,) = [gmap for gmap in gmaps(at.census) if gmap.address == shadow.parent]
    theirs = at.prog.read_u64(at.entry(other, 0, 2), True)
    mine = at.entry(at.gmap, 0, 2)
    stack.enter_context(at.overlay.word_at(mine, theirs, physical=True))


def typed_table(at: Broken, stack: ExitStack) -> None:
    assert at.gmap.space is not None
    page = virt_to_page(at.prog, at.gmap.space.root.address)
    typed = int(at.census.scan.descriptors["__page_type"][0])
    stack.enter_context(at.overlay.value_of(page.page_type, typed))


def referenced_table(at: Broken, stack: ExitStack) -> None:
    page = virt_to_page(at.prog, at.entry(at.gmap, at.page().guest, 0))
    stack.enter_context(at.overlay.value_of(page._refcount.counter, 2))


def gmap_of_another_machine(at: Broken, stack: ExitStack) -> None:
    gmap = at.object()
    stack.enter_context(at.overlay.value_of(gmap.kvm, int(gmap.kvm.value_()) + 64))


def child_of_another(at: Broken, stack: ExitStack) -> None:
    child = at.object(at.shadow())
    stack.enter_context(at.overlay.value_of(child.parent, at.gmap.address))


def children_that_do_not_point_back(at: Broken, stack: ExitStack) -> None:
    child = at.object(at.shadow())
    stack.enter_context(at.overlay.value_of(child.list.prev, 0x40))


def machine_that_is_listed_badly(at: Broken, stack: ExitStack) -> None:
    head = at.prog["vm_list"]
    stack.enter_context(at.overlay.value_of(head.next.prev, 0))


def real_space(at: Broken, stack: ExitStack) -> None:
    asce = at.object().asce.val
    stack.enter_context(at.overlay.value_of(asce, int(asce.value_()) | 0x20))


def shadow_of_another_page(at: Broken, stack: ExitStack) -> None:
    entry = at.entry(at.shadow(), 0x80103000, 0)
    value = at.prog.read_u64(entry, True)
    stack.enter_context(at.overlay.word_at(entry, value + 0x1000, physical=True))


def cache_with_too_much(at: Broken, stack: ExitStack) -> None:
    cache = at.census.stories.gmaps.gmaps.caches[0].cache
    count = Object(at.prog, "struct kvm_s390_mmu_cache *", cache).n_crsts
    stack.enter_context(at.overlay.value_of(count, 7))


def cache_with_a_table_in_use(at: Broken, stack: ExitStack) -> None:
    cache = at.census.stories.gmaps.gmaps.caches[0].cache
    slot = Object(at.prog, "struct kvm_s390_mmu_cache *", cache).crsts[0]
    assert at.gmap.space is not None
    stack.enter_context(at.overlay.value_of(slot, at.gmap.space.root.address))


def cache_with_one_twice(at: Broken, stack: ExitStack) -> None:
    cache = at.census.stories.gmaps.gmaps.caches[0].cache
    slots = Object(at.prog, "struct kvm_s390_mmu_cache *", cache).crsts
    stack.enter_context(at.overlay.value_of(slots[0], int(slots[1].value_())))


def segment_of_another_name(at: Broken, stack: ExitStack) -> None:
    (page,) = made(at.sample, "gmap-user-page")
    table = at.entry(machine_of(at.census, page), page.guest, 0) & ~0xFFF
    word = table + 2048 + 8 * 10
    value = at.prog.read_u64(word, True)
    stack.enter_context(at.overlay.word_at(word, value + (1 << 32), physical=True))


@pytest.mark.parametrize(
    ("damage", "relation"),
    [
        (page_of_another, Relation.HOST_PAGE),
        (page_that_the_process_lost, Relation.HOST_PAGE),
        (page_outside_of_the_slots, Relation.SLOT),
        (table_of_two, Relation.SINGLE),
        (typed_table, Relation.DESCRIPTOR),
        (referenced_table, Relation.DESCRIPTOR),
        (gmap_of_another_machine, Relation.OWNER),
        (child_of_another, Relation.OWNER),
        (children_that_do_not_point_back, Relation.LIST),
        (machine_that_is_listed_badly, Relation.LIST),
        (real_space, Relation.ASCE),
        (shadow_of_another_page, Relation.SHADOWED),
        (cache_with_too_much, Relation.CACHE),
        (cache_with_a_table_in_use, Relation.CACHE),
        (cache_with_one_twice, Relation.CACHE),
        (segment_of_another_name, Relation.UCONTROL),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_corruption_is_told(
    broken: Broken, damage: Callable[[Broken, ExitStack], None], relation: Relation
) -> None:
    with ExitStack() as stack:
        damage(broken, stack)
        story = broken.story()
        assert relation in {found.relation for found in story.disagreements}
        # Of a gmap that is there, but for KVM's list of machines.
        known = {gmap.address for gmap in story.gmaps.gmaps} | {0}
        assert {found.gmap for found in story.disagreements} <= known
    assert broken.relations() == set()


def test_show_and_check_count_as_the_walk_does(
    sample: Sample, census: Census, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KVM's entries have no read bit, so an old page is mapped there for all who look."""
    tables, seen = census.tables, 0
    kvm = [number for number, space in enumerate(tables.spaces) if space.kvm_owned]
    rows = np.flatnonzero(np.isin(tables.space, kvm) & (tables.level == 0) & tables.counted)
    for row in rows.tolist():
        pfn = int(tables.address[row]) // census.paging.page_bytes
        pt = int(pfn_to_ptdesc(sample.prog, pfn).value_())
        (contents,) = reach_of(sample.prog, census, pfn, pt, 0).contents
        counts = np.bincount(contents.kinds, minlength=len(EntryClass))
        assert counts.tolist() == tables.counts[row].tolist()
        plain = census.paging.classify(contents.values, 0)
        seen += int(np.count_nonzero(plain != contents.kinds))
    assert seen > 0

    def hidden(batch: Batch) -> tuple[int, npt.NDArray[np.bool_]]:
        asked = batch.context.kvm_space[batch.space] & (batch.level == 0)
        return int(np.count_nonzero(asked)), asked & (batch.kind == EntryClass.PROT_NONE)

    monkeypatch.setitem(QUESTIONS, "hidden", hidden)
    asked, suspects = LeafPass(Context(sample.prog, census)).suspects("hidden")
    assert asked > 0
    assert suspects == []


def test_old_pages_are_mapped(sample: Sample, census: Census) -> None:
    """KVM's entries have no read bit: none of them is one without access."""
    tables = census.tables
    guests = np.array([space.kvm_owned for space in tables.spaces])[tables.space]
    assert int(tables.counts[guests, EntryClass.LEAF].sum())
    assert not tables.counts[guests, EntryClass.PROT_NONE].any()
    assert not tables.counts[guests, EntryClass.BAD].any()
