# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Guest address spaces of s390 against what the workload made, drgn's own helpers, and corruption.

Each relation that ptinspect checks is broken here once, in a real dump, and has to be told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import pytest
from drgn import FaultError, Object, Program, cast
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mm import follow_phys, page_to_pfn, virt_to_phys
from drgn.helpers.linux.pid import find_task
from drgn.helpers.linux.radixtree import radix_tree_for_each
from opened import Sample
from overlay import Overlay

from ptinspect.census import Census, Holder, take_census, untyped_census
from ptinspect.checks import run_checks
from ptinspect.cli.spaces import choose_space
from ptinspect.errors import UsageError
from ptinspect.faces.gmap import absent_report, gmaps_report
from ptinspect.kernel.descriptor import pfn_to_ptdesc
from ptinspect.kernel.paging import EntryClass
from ptinspect.listing import Listing
from ptinspect.lists import walk_list
from ptinspect.reach import reach_of
from ptinspect.records import FieldState
from ptinspect.state.fields import describe_ptdesc
from ptinspect.state.gmap import Gmap, Relation, read_gmaps
from ptinspect.state.gmap_relations import GmapStory, read_gmap_story
from ptinspect.state.pgste import read_pgstes
from ptinspect.tables.lookup import Outcome, Translation, table_owners, walk_address
from ptinspect.tables.spaces import Space, SpaceKind, find_spaces
from ptinspect.tables.walk import walk_spaces

#: Guest memory that is touched by the workload's states; see lab/workload/gmap.h.
SEGMENT = 1 << 20
ALL_BITS = (1 << 64) - 1


class Made(NamedTuple):
    """What the workload says it made."""

    pid: int
    kind: str
    guest: int
    host: int


def made(sample: Sample, *kinds: str) -> list[Made]:
    found = []
    for note in sample.truth["made"]:
        words = note["text"].split()
        if words[0] in kinds:
            found.append(Made(note["pid"], words[0], int(words[1], 16), int(words[2], 16)))
    return found


def main_pid(sample: Sample) -> int:
    """Get the process whose machine has most slots: the one of the state "gmap"."""
    pids = [slot.pid for slot in made(sample, "gmap-slot")]
    return max(pids, key=pids.count)


def census_of(sample: Sample) -> Census:
    """Take the census of a sample, once."""
    prog = sample.prog
    if "test_gmap" not in prog.cache:
        prog.cache["test_gmap"] = take_census(prog)
    found = prog.cache["test_gmap"]
    assert isinstance(found, Census)
    return found


@pytest.fixture
def census(sample: Sample) -> Census:
    """The census of a sample that has guests."""
    if not made(sample, "gmap-page"):
        pytest.skip("the sample has no guest address spaces")
    return census_of(sample)


def gmaps(census: Census) -> tuple[Gmap, ...]:
    return census.stories.gmaps.gmaps.gmaps


def of_pid(census: Census, pid: int) -> list[Gmap]:
    """Get the machines of a process."""
    return [
        gmap
        for gmap in gmaps(census)
        if not gmap.parent and gmap.space and any(task.pid == pid for task in gmap.space.tasks)
    ]


def machine_of(census: Census, page: Made) -> Gmap:
    """Get the guest address space in which a page was faulted in."""
    (found,) = [
        gmap
        for gmap in of_pid(census, page.pid)
        if page.kind == "gmap-user-page" or gmap.host_address(page.guest) == page.host
    ]
    # From 7.0 on a user-controlled virtual CPU has an address space of its own.
    own = [gmap for gmap in gmaps(census) if gmap.ucontrol_cpu and gmap.parent == found.address]
    return own[0] if own else found


def walk(sample: Sample, census: Census, gmap: Gmap, address: int) -> Translation:
    assert gmap.space is not None
    root, owned = gmap.space.root, gmap.kvm_owned
    return walk_address(sample.prog, census.paging, root, address, kvm_owned=owned)


def test_nothing_disagrees(sample: Sample) -> None:
    census = census_of(sample)
    story = census.stories.gmaps
    assert story.disagreements == ()
    assert story.missing == ()
    assert census.complete


def test_where_there_are_none(sample: Sample) -> None:
    if made(sample, "gmap-page"):
        pytest.skip("the sample has guest address spaces")
    story = census_of(sample).stories.gmaps
    assert story.gmaps.gmaps == ()
    assert story.gmaps.absent is not None
    report = absent_report(story, sample.name)
    assert report.notes == [f"Not applicable: {story.gmaps.absent}."]


def test_slots_are_those_that_were_set(sample: Sample, census: Census) -> None:
    slots = made(sample, "gmap-slot")
    assert len(slots) >= 3
    for slot in slots:
        machines = [gmap.vm for gmap in of_pid(census, slot.pid) if gmap.vm is not None]
        assert any(
            (known.guest, known.host, known.size) == (slot.guest, slot.host, 4 << 20)
            for vm in machines
            for known in vm.slots
        )
        assert {vm.name.split("-")[0] for vm in machines if vm.name} == {str(slot.pid)}


def test_guest_pages_are_the_pages_of_the_process(sample: Sample, census: Census) -> None:
    """Guest and host side, and drgn's own walk of the process, lead to one page."""
    pages = made(sample, "gmap-page", "gmap-zero-page", "gmap-user-page")
    assert {slot.guest >> 40 for slot in pages} >= {0, 0x14}
    for page in pages:
        task = find_task(sample.prog, page.pid)
        gmap = machine_of(census, page)
        assert census.stories.gmaps.host_address(gmap, page.guest) == page.host
        found = walk(sample, census, gmap, page.guest)
        assert found.outcome is Outcome.MAPPED
        assert found.physical == int(reach(task.mm, page.host))


def test_guest_memory_is_what_the_process_wrote(sample: Sample, census: Census) -> None:
    """The guest address at the start of each page, its complement at the end; else zeroes."""
    if not made(sample, "gmap-zero-page"):
        pytest.skip("the sample's workload wrote no pattern")
    checked = 0
    for page in made(sample, "gmap-page", "gmap-zero-page", "gmap-user-page"):
        found = walk(sample, census, machine_of(census, page), page.guest)
        assert found.physical is not None
        data = sample.prog.read(found.physical, census.paging.page_bytes, True)
        first, last = (int.from_bytes(part, "big") for part in (data[:8], data[-8:]))
        zero = page.kind == "gmap-zero-page"
        assert (first, last) == ((0, 0) if zero else (page.guest, ~page.guest & ALL_BITS))
        assert not any(data[8:-8])
        checked += 1
    assert checked >= 30


def reach(mm: Object, address: int) -> Object:
    try:
        return follow_phys(mm, address)
    except FaultError:
        pytest.skip("drgn reads 16 KiB at a page table, which runs out of this dump")


def test_segments_that_were_not_faulted_have_no_table(sample: Sample, census: Census) -> None:
    for slot in made(sample, "gmap-slot"):
        for gmap in of_pid(census, slot.pid):
            assert gmap.space is not None
            last = slot.guest + 3 * SEGMENT
            if gmap.host_address(last) is None:
                continue
            found = walk(sample, census, gmap, last)
            assert found.outcome is Outcome.NOT_MAPPED


def test_lists_and_trees_as_drgn_reads_them(sample: Sample, census: Census) -> None:
    prog = sample.prog
    checked = 0
    for gmap in gmaps(census):
        if gmap.kvm_owned:
            continue
        theirs = Object(prog, "struct gmap *", gmap.address)
        crst = list_for_each_entry("struct page", theirs.crst_list.address_of_(), "lru")
        expected = [(int(page_to_pfn(page)), int(page.index)) for page in crst]
        assert [(table.pfn, table.index) for table in gmap.crst_list] == expected
        for name in ("guest_to_host", "host_to_guest", "host_to_rmap"):
            tree = radix_tree_for_each(getattr(theirs, name).address_of_())
            entries = {int(index): int(entry.value_()) for index, entry in tree}
            assert getattr(gmap, name).entries == entries
        assert gmap.asce & ~0xFFF == int(virt_to_phys(theirs.table))
        checked += len(expected)
    if not any(gmap.kvm_owned for gmap in gmaps(census)):
        assert checked >= 10


def test_own_tables_are_not_typed_and_bear_their_guest_address(
    sample: Sample, census: Census
) -> None:
    """What a run by hand showed: the tables of slots at 4 GiB and at 0x140000300000."""
    (gmap,) = of_pid(census, main_pid(sample))
    tables = census.tables
    (number,) = [n for n, space in enumerate(tables.spaces) if space.gmap == gmap.address]
    rows = tables.rows_of_space(number)
    own = rows[tables.level[rows] > 0]
    assert {0, 0x100000000, 0x140000000000} <= set(tables.va[own].tolist())
    assert (census.descriptor[own] < 0).all()
    lowest = rows[tables.level[rows] == 0]
    if gmap.kvm_owned:
        assert (census.descriptor[lowest] < 0).all()
        return
    assert {0x100000000, 0x140000000000} <= {table.index for table in gmap.crst_list}
    # The page tables are the process's: typed, and reached by it first.
    assert (census.descriptor[lowest] >= 0).all()
    hosts = {tables.spaces[int(tables.space[row])].kind for row in tables.first[lowest].tolist()}
    assert hosts == {SpaceKind.USER}
    for row in lowest.tolist():
        owners = table_owners(tables, int(tables.address[row]))
        kinds = sorted(tables.spaces[owner.space].kind.value for owner in owners)
        assert kinds == ["gmap", "user"]


def test_the_census_counts_guests_apart(sample: Sample, census: Census) -> None:
    levels = census.levels()
    assert any(level.guest for level in levels)
    for level in levels:
        if level.guest:
            assert not level.kernel
            assert not level.typed
    assert not (census.holder == Holder.UNEXPLAINED).any()


def test_shadows_lead_to_the_pages_of_their_parent(sample: Sample, census: Census) -> None:
    """A page of a guest's guest is the page that the guest's tables name."""
    pages = made(sample, "gmap-shadow-page")
    if not pages:
        pytest.skip("the sample has no shadows")
    for note in sample.truth["made"]:
        words = note["text"].split()
        if words[0] != "gmap-shadow-page":
            continue
        address, guest, asce, edat = (int(words[n], 16) for n in (1, 2, 4, 6))
        (parent,) = of_pid(census, note["pid"])
        (shadow,) = [
            gmap
            for gmap in gmaps(census)
            if gmap.parent == parent.address and (gmap.guest_asce, gmap.edat_level) == (asce, edat)
        ]
        assert shadow.shadow
        mine = walk(sample, census, shadow, address)
        theirs = walk(sample, census, parent, guest)
        assert mine.outcome is Outcome.MAPPED
        assert mine.physical == theirs.physical
        assert mine.steps[-1].table != theirs.steps[-1].table
    fakes = {
        table.index & 1
        for gmap in gmaps(census)
        if gmap.shadow
        for table in gmap.pt_list
        if table.index is not None
    }
    if not shadow.kvm_owned:
        assert fakes == {0, 1}


def test_pgstes_of_guest_pages(sample: Sample, census: Census) -> None:
    """Every page has one; none is locked at rest, and those of empty entries are passed over."""
    tables = census.tables
    for gmap in gmaps(census):
        (number,) = [n for n, space in enumerate(tables.spaces) if space.gmap == gmap.address]
        rows = tables.rows_of_space(number)
        rows = rows[tables.level[rows] == 0]
        found, readable = read_pgstes(
            sample.prog,
            census.paging,
            tables.address[rows],
            tables.va[rows],
            kvm_owned=gmap.kvm_owned,
        )
        assert readable.all()
        assert not any(pgste.locked for pgste in found)
        mapped = {pgste.guest for pgste in found if pgste.kind is EntryClass.LEAF}
        assert len(mapped) == int(tables.counts[rows, EntryClass.LEAF].sum())


def test_a_locked_pgste_is_told(sample: Sample, census: Census) -> None:
    (gmap,) = of_pid(census, main_pid(sample))
    assert gmap.space is not None
    page = next(page for page in made(sample, "gmap-page") if page.pid == main_pid(sample))
    entry = walk_address(sample.prog, census.paging, gmap.space.root, page.guest).steps[-1]
    address = np.array([entry.table], np.uint64)
    guest = np.array([page.guest & -SEGMENT], np.uint64)
    value = 0xA8C4_0000_0300_0000
    with Overlay(sample.prog).word_at(entry.entry_address + 2048, value, physical=True):
        found, _ = read_pgstes(sample.prog, census.paging, address, guest, kvm_owned=gmap.kvm_owned)
    (pgste,) = [pgste for pgste in found if pgste.guest == page.guest]
    assert pgste.locked
    assert (pgste.access, pgste.usage) == (10, "volatile")
    flags = {"locked", "host-referenced", "guest-referenced", "fetch-protected"}
    assert set(pgste.flags) == flags


def test_how_a_machine_is_named(sample: Sample, census: Census) -> None:
    found = census.stories.gmaps.gmaps
    first = of_pid(census, main_pid(sample))[0]
    assert first.vm is not None
    assert found.named(f"gmap:{first.address:#x}") is first
    assert found.named(str(main_pid(sample))) is first
    assert found.named(str(first.vm.name)) is first
    with pytest.raises(UsageError, match="no guest address space"):
        found.named("1")
    twins = {page.pid for page in made(sample, "gmap-slot") if len(of_pid(census, page.pid)) > 1}
    for pid in twins:
        with pytest.raises(UsageError, match="has 2 guest address spaces"):
            found.named(str(pid))


def test_what_a_descriptor_says_of_its_guest(sample: Sample, census: Census) -> None:
    """Guest address and list of a guest's own table; nothing in a page table of the process."""
    prog = sample.prog
    checked = 0
    for gmap in gmaps(census):
        for name, listed in (("crst_list", gmap.crst_list), ("pt_list", gmap.pt_list)):
            for table in listed:
                reach_ = reach_of(prog, census, table.pfn, table.ptdesc, 0)
                pt = pfn_to_ptdesc(prog, table.pfn)
                fields = {
                    field.name: field
                    for field in describe_ptdesc(pt, reach_.level, told=reach_.told).fields
                }
                assert table.index is not None
                assert fields["pt_index"].state is FieldState.VALUE
                assert f"guest address {table.index & ~1:#x}" in fields["pt_index"].text
                assert f"of {name} of gmap:{gmap.address:#x}" in fields["pt_list"].text
                assert fields["ptl"].state is FieldState.STALE
                assert fields["pmd_huge_pte"].state is FieldState.STALE
                checked += 1
    assert checked or any(gmap.kvm_owned for gmap in gmaps(census))
    tables = census.tables
    of_guest = np.array([space.kind is SpaceKind.GMAP for space in tables.spaces])
    shared = of_guest[tables.space] & (tables.first >= 0) & (tables.level == 0)
    shared &= ~of_guest[tables.space[tables.first]]
    for row in np.flatnonzero(shared)[:3].tolist():
        pfn = int(tables.address[row]) // census.paging.page_bytes
        told = census.stories.told(pfn, int(pfn_to_ptdesc(prog, pfn).value_()))
        assert "pt_index" not in {what.member for what in told}


def test_tables_in_untyped_pages_are_listed(sample: Sample, census: Census) -> None:
    others = untyped_census(sample.prog, census)
    listing = Listing(sample.prog, others.scan, others)
    column = listing.column("pt_index")
    said = dict(zip(others.scan.pfns[column.present].tolist(), column.values[column.present]))
    listed = {
        table.pfn: table.index
        for gmap in gmaps(census)
        for table in (*gmap.crst_list, *gmap.pt_list)
    }
    assert {pfn: int(value) for pfn, value in said.items()} == listed
    for gmap in gmaps(census):
        space = census.spaces.of_gmap(gmap.address)
        assert space is not None
        own = {int(others.scan.pfns[row]) for row in others.reached_by(space)}
        assert {table.pfn for table in (*gmap.crst_list, *gmap.pt_list)} <= own


def test_spaces_that_a_person_names(sample: Sample, census: Census) -> None:
    for gmap in gmaps(census):
        space = choose_space(sample.prog, f"gmap:{gmap.address:x}")
        assert space == gmap.space
        assert space.name.endswith(f" gmap:{gmap.address:#x}")
    with pytest.raises(UsageError, match="there is no gmap at 0x123"):
        choose_space(sample.prog, "gmap:123")


# Corruption: every relation broken once.


class Broken(NamedTuple):
    """A machine of the sample, and what is needed to break it."""

    prog: Program
    overlay: Overlay
    census: Census
    gmap: Gmap
    hosts: list[Space]

    @property
    def object(self) -> Object:
        return Object(self.prog, "struct gmap *", self.gmap.address)

    def story(self) -> GmapStory:
        """Read everything again, with nothing but the processes that have machines."""
        guests = read_gmaps(self.prog, self.hosts).spaces
        tables = walk_spaces(self.prog, self.census.paging, [*self.hosts, *guests])
        return read_gmap_story(self.prog, tables)

    def relations(self) -> set[Relation]:
        return {found.relation for found in self.story().disagreements}

    def entry(self, guest: int, level: int) -> int:
        """Get the physical address of the guest's entry of a level."""
        assert self.gmap.space is not None
        root = self.gmap.space.root
        for step in walk_address(self.prog, self.census.paging, root, guest).steps:
            if step.level == level:
                return step.entry_address
        raise AssertionError("the walk ends above")

    def table(self, index: int) -> Object:
        """Get the struct page of the segment table on crst_list with a guest address."""
        pages = [table for table in self.gmap.crst_list if table.index == index]
        return Object(self.prog, "struct page *", pages[0].ptdesc)


@pytest.fixture
def broken(sample: Sample, census: Census) -> Broken:
    machine = of_pid(census, main_pid(sample))[0]
    if machine.kvm_owned:
        pytest.skip("the machine's tables are KVM's own")
    mms = {gmap.mm for gmap in gmaps(census)}
    hosts = [
        space
        for space in find_spaces(sample.prog, slab=False).spaces
        if space.kind is SpaceKind.USER and space.mm and space.mm.address in mms
    ]
    result = Broken(sample.prog, Overlay(sample.prog), census, machine, hosts)
    assert result.relations() == set()
    return result


def slots_of(root: Object) -> Iterator[tuple[int, int, int]]:
    """Get place, value and address of each slot in the lowest nodes of a radix tree."""
    pending = [int(root.xa_head.value_())]
    while pending:
        node = Object(root.prog_, "struct xa_node *", pending.pop() - 2)
        for n in range(node.slots.type_.length or 0):
            word = int(node.slots[n].value_())
            if word and node.shift:
                pending.append(word)
            elif word:
                yield n, word, int(node.slots[n].address_of_().value_())


def one_field(name: str, change: Callable[[int], int]) -> Callable[[Broken, ExitStack], None]:
    def lay(at: Broken, stack: ExitStack) -> None:
        member = getattr(at.object, name)
        stack.enter_context(at.overlay.value_of(member, change(int(member.value_()))))

    return lay


def index_of_a_table(at: Broken, stack: ExitStack) -> None:
    page = at.table(0x100000000)
    stack.enter_context(at.overlay.value_of(page.index, 0x180000000))


def list_that_does_not_point_back(at: Broken, stack: ExitStack) -> None:
    page = at.table(0x100000000)
    stack.enter_context(at.overlay.value_of(page.lru.prev, 0))


def unlisted_table(at: Broken, stack: ExitStack) -> None:
    node = at.table(0x100000000).lru
    stack.enter_context(at.overlay.value_of(node.prev.next, node.next.value_()))
    stack.enter_context(at.overlay.value_of(node.next.prev, node.prev.value_()))


def tree_without_a_table(at: Broken, stack: ExitStack) -> None:
    stack.enter_context(at.overlay.word_at(at.entry(0x100000000, 2), 0x24, physical=True))


def host_to_guest_elsewhere(at: Broken, stack: ExitStack) -> None:
    slots = sorted(slots_of(at.object.host_to_guest), key=lambda slot: slot[1])
    (_, word, _), (_, _, address) = slots[0], slots[1]
    stack.enter_context(at.overlay.word_at(address, word))


def host_to_guest_outside(at: Broken, stack: ExitStack) -> None:
    *_, (_, word, address) = slots_of(at.object.host_to_guest)
    stack.enter_context(at.overlay.word_at(address, word + (1 << 20)))


def guest_to_host_elsewhere(at: Broken, stack: ExitStack) -> None:
    *_, (_, word, address) = slots_of(at.object.guest_to_host)
    stack.enter_context(at.overlay.word_at(address, word + (64 << 20)))


def guest_to_host_gone(at: Broken, stack: ExitStack) -> None:
    used = [entry for _, entry, _ in slots_of(at.object.host_to_guest)]
    assert used
    for _, word, address in slots_of(at.object.guest_to_host):
        if word >> 20 in at.gmap.host_to_guest.entries:
            stack.enter_context(at.overlay.word_at(address, 0))
            return


def segment_of_another_table(at: Broken, stack: ExitStack) -> None:
    first, second = at.entry(0x100000000, 1), at.entry(0x100100000, 1)
    other = at.prog.read_u64(second, True)
    stack.enter_context(at.overlay.word_at(first, other, physical=True))


def unlinked_segment(at: Broken, stack: ExitStack) -> None:
    stack.enter_context(at.overlay.word_at(at.entry(0x100000000, 1), 0x20, physical=True))


def linked_segment_that_nobody_knows(at: Broken, stack: ExitStack) -> None:
    first = at.entry(0x100000000, 1)
    value = at.prog.read_u64(first, True)
    stack.enter_context(at.overlay.word_at(first + 8 * 100, value, physical=True))


def node_that_covers_too_much(at: Broken, stack: ExitStack) -> None:
    head = int(at.object.guest_to_host.xa_head.value_()) - 2
    stack.enter_context(at.overlay.bytes_at(head, b"\xff"))


def tree_with_a_cycle(at: Broken, stack: ExitStack) -> None:
    head = int(at.object.guest_to_host.xa_head.value_())
    node = Object(at.prog, "struct xa_node *", head - 2)
    stack.enter_context(at.overlay.value_of(node.slots[1], head))


def mm_with_another_asce(at: Broken, stack: ExitStack) -> None:
    context = Object(at.prog, "struct mm_struct *", at.gmap.mm).context
    stack.enter_context(at.overlay.value_of(context.gmap_asce, 0))


def slot_elsewhere(at: Broken, stack: ExitStack) -> None:
    kvm = cast("struct kvm *", at.object.private)
    slots = kvm.memslots[0]
    node = int(slots.gfn_tree.rb_node.value_())
    type_ = at.prog.type("struct kvm_memory_slot")
    base = node - type_.member("gfn_node").offset - 24 * int(slots.node_idx.value_())
    slot = Object(at.prog, "struct kvm_memory_slot *", base)
    host = int(slot.userspace_addr.value_())
    stack.enter_context(at.overlay.value_of(slot.userspace_addr, host + SEGMENT))


def typed_table(at: Broken, stack: ExitStack) -> None:
    page = at.table(0x100000000)
    typed = int(at.census.scan.descriptors["__page_type"][0])
    stack.enter_context(at.overlay.value_of(page.page_type, typed))


def referenced_table(at: Broken, stack: ExitStack) -> None:
    page = at.table(0x100000000)
    stack.enter_context(at.overlay.value_of(page._refcount.counter, 2))


@pytest.mark.parametrize(
    ("damage", "relation"),
    [
        (index_of_a_table, Relation.INDEX),
        (list_that_does_not_point_back, Relation.LIST),
        (unlisted_table, Relation.CRST_LIST),
        (tree_without_a_table, Relation.CRST_LIST),
        (host_to_guest_elsewhere, Relation.HOST_TO_GUEST),
        (host_to_guest_outside, Relation.HOST_TO_GUEST),
        (guest_to_host_elsewhere, Relation.SLOT),
        (guest_to_host_gone, Relation.GUEST_TO_HOST),
        (segment_of_another_table, Relation.HOST_TABLE),
        (unlinked_segment, Relation.HOST_TO_GUEST),
        (linked_segment_that_nobody_knows, Relation.GUEST_TO_HOST),
        (node_that_covers_too_much, Relation.RADIX),
        (tree_with_a_cycle, Relation.RADIX),
        (one_field("asce", lambda asce: asce + 0x4000), Relation.ASCE),
        (one_field("asce", lambda asce: asce | 0x20), Relation.ASCE),
        (one_field("asce_end", lambda end: end >> 11), Relation.ASCE),
        (mm_with_another_asce, Relation.ASCE),
        (one_field("mm", lambda mm: mm + 64), Relation.OWNER),
        (one_field("parent", lambda parent: 64), Relation.OWNER),
        (slot_elsewhere, Relation.SLOT),
        (typed_table, Relation.DESCRIPTOR),
        (referenced_table, Relation.DESCRIPTOR),
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
        report = gmaps_report(story, broken.census, "a sample")
        assert any(text.startswith(f"{relation.value}: gmap:") for text in report.findings)
    assert broken.relations() == set()


def test_corruption_of_a_shadow_is_told(broken: Broken) -> None:
    shadows = [gmap for gmap in gmaps(broken.census) if gmap.shadow and not gmap.kvm_owned]
    if not shadows:
        pytest.skip("the sample has no shadows")
    prog, overlay = broken.prog, broken.overlay
    shadow = next(gmap for gmap in shadows if not gmap.guest_asce & 0x20)
    page = Object(prog, "struct page *", shadow.pt_list[0].ptdesc)
    with overlay.value_of(page.index, int(page.index.value_()) + 0x1000):
        assert broken.relations() == {Relation.SHADOWED}
    node = page.lru
    with ExitStack() as stack:
        stack.enter_context(overlay.value_of(node.prev.next, node.next.value_()))
        stack.enter_context(overlay.value_of(node.next.prev, node.prev.value_()))
        assert broken.relations() == {Relation.PT_LIST}
    theirs = Object(prog, "struct gmap *", shadow.address)
    with overlay.value_of(theirs.parent, shadow.parent + 64):
        assert Relation.OWNER in broken.relations()
    parent = Object(prog, "struct gmap *", shadow.parent)
    head = parent.guest_to_host.xa_head
    with overlay.value_of(theirs.guest_to_host.xa_head, head.value_()):
        assert Relation.GUEST_TO_HOST in broken.relations()


def test_a_list_head_that_leads_nowhere(broken: Broken) -> None:
    mm = Object(broken.prog, "struct mm_struct *", broken.gmap.mm)
    head = mm.context.gmap_list
    assert walk_list(head.address_of_()).broken is None
    with broken.overlay.value_of(head.next, 0x10):
        assert Relation.LIST in broken.relations()
    with broken.overlay.value_of(head.next, 0):
        assert Relation.LIST in broken.relations()


def test_slots_that_are_being_changed(broken: Broken) -> None:
    """They come into use first; the guest's address space follows when SRCU readers are gone."""
    kvm = cast("struct kvm *", broken.object.private)
    only = ["gmap-h2g-g2h"]
    with ExitStack() as stack:
        slot_elsewhere(broken, stack)
        assert run_checks(broken.prog, only=only).findings
        stack.enter_context(broken.overlay.value_of(kvm.slots_lock.owner.counter, 1 << 12))
        (result,) = run_checks(broken.prog, only=only).results
    assert result.findings == ()
    assert [why for why, _ in result.set_aside] == ["memory slots of the machine are being changed"]
