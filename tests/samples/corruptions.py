# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
For each invariant the smallest corruption that breaks it, and where it has to be found.

A function damages a target and returns the address that a finding of that invariant must have.
What only debug information can break is broken there, before anything else asks for the types.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
from damage import Damage, NotHereError
from drgn import Program
from retype import move_member

from ptinspect.kernel.descriptor import byte_order, flags_bit, page_type_test
from ptinspect.kernel.direct_map import physical_to_virtual, virtual_to_physical
from ptinspect.kernel.paging import EntryClass, Permission
from ptinspect.kernel.paging.model import PLAIN_SWAP
from ptinspect.state.gmap import Gmap
from ptinspect.state.lists import FREE_LIST
from ptinspect.tables.spaces import Space, SpaceKind
from ptinspect.tables.vmas import VM_HUGETLB

Corruption = Callable[[Damage], int]

CORRUPTIONS: dict[str, Corruption] = {}

#: Those that change a type of a program, not its memory.
RETYPINGS: dict[str, Callable[[Program], int]] = {}


def breaks(id: str) -> Callable[[Corruption], Corruption]:
    """Enter the corruption that breaks an invariant."""

    def enter(corruption: Corruption) -> Corruption:
        assert id not in CORRUPTIONS
        CORRUPTIONS[id] = corruption
        return corruption

    return enter


def move_a_member_of_ptdesc(prog: Program) -> int:
    try:
        return move_member(prog, "ptdesc", "pt_index", 4)
    except LookupError:
        raise NotHereError("this kernel has no struct ptdesc") from None


RETYPINGS["table-match"] = move_a_member_of_ptdesc


# The trees.


@breaks("tree-entry-target-valid")
def point_to_a_free_page(d: Damage) -> int:
    address = d.entry_address(d.row(0))
    target = d.free_page() * d.paging.page_bytes
    return d.write_entry(address, d.retarget(d.entry(address), target, level=1))


@breaks("tree-child-typed")
def untype_a_table(d: Damage) -> int:
    row = d.row(1)
    d.write_member(d.index(row), "__page_type", 0xFFFFFFFF)
    return d.entry_address(row)


@breaks("tree-child-not-foreign")
def map_the_page_of_a_table(d: Damage) -> int:
    row = d.row(0)
    # _mapcount 0: mapped once.
    d.write_member(d.index(row), "__page_type", 0)
    return int(d.tables.address[row])


@breaks("tree-single-parent")
def link_a_table_twice(d: Damage) -> int:
    for row in d.rows(0):
        parent = int(d.tables.parent[row])
        later = [s for s in d.slots(parent, EntryClass.NONE) if s > int(d.tables.index[row])]
        if later:
            value = d.entry(d.entry_address(row))
            return d.write_entry(d.slot_address(parent, later[0]), value)
    raise NotHereError("no table with an empty entry behind it")


@breaks("tree-one-level")
def point_to_the_own_table(d: Damage) -> int:
    row = d.row(0)
    address = d.entry_address(row)
    own = int(d.tables.address[d.tables.parent[row]])
    return d.write_entry(address, d.retarget(d.entry(address), own, level=1))


@breaks("tree-vma-covers-table")
def move_a_table_out_of_its_area(d: Damage) -> int:
    for row in d.rows(0):
        parent = int(d.tables.parent[row])
        for slot in d.slots(parent, EntryClass.NONE):
            if not d.covered(parent, slot):
                address = d.entry_address(row)
                value = d.entry(address)
                d.write_entry(address, d.paging.levels[1].empty)
                return d.write_entry(d.slot_address(parent, slot), value)
    raise NotHereError("areas cover all of every PMD table")


@breaks("tree-leaf-in-vma")
def map_a_page_outside_of_all_areas(d: Damage) -> int:
    for row in d.rows(0):
        leaves = d.slots(row, EntryClass.LEAF)
        for slot in d.slots(row, EntryClass.NONE):
            if leaves and not d.covered(row, slot):
                value = d.entry(d.slot_address(row, leaves[0]))
                return d.write_entry(d.slot_address(row, slot), value)
    raise NotHereError("areas cover all of every PTE table")


@breaks("tree-leaf-not-table")
def map_a_table(d: Damage) -> int:
    target = int(d.census.scan.pfns[0]) * d.paging.page_bytes
    for row in d.rows(0):
        for slot in d.slots(row, EntryClass.LEAF):
            address = d.slot_address(row, slot)
            value = d.retarget(d.entry(address), target, level=0, leaf=True)
            return d.write_entry(address, value)
    raise NotHereError("no page is mapped")


def _permit(d: Damage, value: int, level: int, permission: Permission, allowed: bool) -> int:
    for rule in d.paging.levels[level].leaf_permissions:
        if rule.permission is permission:
            value = value & ~rule.mask | rule.value
            return value if allowed else value ^ (rule.mask & -rule.mask)
    raise NotHereError("entries of this architecture do not tell user from kernel")


@breaks("kernel-no-user-leaf")
def permit_user_mode_in_the_kernel(d: Damage) -> int:
    tables = d.tables
    kernel = d.context.kernel_space[tables.space]
    path = (tables.permissions & Permission.USER) != 0
    for row in np.flatnonzero(kernel & path & (tables.level <= 1) & (tables.state == 0)).tolist():
        for slot in d.slots(row, EntryClass.LEAF):
            level = int(tables.level[row])
            address = d.slot_address(row, slot)
            value = _permit(d, d.entry(address), level, Permission.USER, True)
            return d.write_entry(address, value)
    raise NotHereError("no kernel page has a path that permits user mode")


@breaks("user-no-kernel-leaf")
def forbid_user_mode_a_page(d: Damage) -> int:
    for row in d.rows(0):
        for slot in d.slots(row, EntryClass.LEAF):
            address = d.slot_address(row, slot)
            value = _permit(d, d.entry(address), 0, Permission.USER, False)
            if d.arch == "arm64":
                value = _permit(d, value, 0, Permission.EXECUTE_USER, False)
            return d.write_entry(address, value)
    raise NotHereError("no page is mapped")


@breaks("table-alignment")
def misalign_a_table(d: Damage) -> int:
    if d.arch == "s390x":
        # A quarter of a segment table: its bit is part of the origin.
        address = d.entry_address(d.row(1))
        return d.write_entry(address, d.entry(address) | 0x1000)
    if d.arch == "ppc64":
        address = d.entry_address(d.row(1, typed=False))
        return d.write_entry(address, d.entry(address) | 0x100)
    for space in d.tables.spaces:
        if space.kind is SpaceKind.USER and space.tasks and space.mm is not None:
            mm = space.mm.object(d.prog)
            d.write_object(mm.pgd, mm.pgd.value_() + 8)
            return space.root.address + 8
    raise NotHereError("no process")


@breaks("entry-reserved-bits")
def set_a_reserved_bit(d: Damage) -> int:
    bits = {"x86_64": 1 << 8, "arm64": 1 << 55, "riscv64": 1 << 60}
    if d.arch not in bits:
        raise NotHereError("radix-nls-and-bits or s390-crst-type checks this architecture")
    address = d.entry_address(d.row(0))
    return d.write_entry(address, d.entry(address) | bits[d.arch])


@breaks("radix-nls-and-bits")
def name_another_size(d: Damage) -> int:
    if d.arch != "ppc64":
        raise NotHereError("ppc64 only")
    address = d.entry_address(d.row(0))
    return d.write_entry(address, d.entry(address) ^ 1)


@breaks("s390-crst-type")
def change_the_type_of_an_empty_entry(d: Damage) -> int:
    if d.arch != "s390x":
        raise NotHereError("s390 only")
    row = d.row(1)
    address = d.slot_address(row, d.slots(row, EntryClass.NONE)[0])
    return d.write_entry(address, d.entry(address) ^ 0x4)


@breaks("arm64-cont-blocks")
def unmark_one_of_a_block(d: Damage) -> int:
    joined = d.paging.levels[0].contiguous
    if joined is None:
        raise NotHereError("only entries of arm64 have the contiguous hint")
    count, hint = joined
    for row in d.rows(0):
        for slot in d.slots(row, EntryClass.LEAF):
            address = d.slot_address(row, slot)
            if d.entry(address) & hint:
                d.write_entry(address + 8, d.entry(address + 8) & ~hint)
                assert slot % count == 0
                return address
    raise NotHereError("no contiguous block")


@breaks("root-not-freed")
def drop_the_reference_of_a_root(d: Damage) -> int:
    for space in d.tables.spaces:
        if space.kind is SpaceKind.USER and space.tasks:
            pfn = space.root.address // d.paging.page_bytes
            page = d.context.page_reader.read(np.array([pfn], np.uint64))
            if page.slab[0]:
                raise NotHereError("roots are objects of a slab cache")
            d.write_page_member(pfn, "__page_refcount", 0)
            return space.root.address
    raise NotHereError("no process")


@breaks("swap-entry-valid")
def name_a_swap_area_that_is_not_there(d: Damage) -> int:
    shift = d.paging.levels[0].swap_type_shift
    kinds = d.paging.swap_classes or PLAIN_SWAP
    number = max(n for n, kind in enumerate(kinds) if kind is EntryClass.SWAP)
    fixed = {"s390x": 0x600, "ppc64": 1 << 62}.get(d.arch, 0)
    value = fixed | number << shift | 1 << 20
    assert d.paging.classify(np.array([value], np.uint64), 0)[0] == EntryClass.SWAP
    row = d.row(0, space=d.space("sparse"))
    return d.write_entry(d.slot_address(row, d.slots(row, EntryClass.NONE)[0]), value)


# Roots.


def _process(d: Damage) -> Space:
    return next(s for s in d.tables.spaces if s.kind is SpaceKind.USER and s.tasks and s.mm)


@breaks("s390-asce-root")
def move_the_pgd(d: Damage) -> int:
    if d.arch != "s390x":
        raise NotHereError("only s390 has an ASCE beside mm->pgd")
    space = _process(d)
    assert space.mm is not None
    pgd = space.mm.object(d.prog).pgd
    d.write_object(pgd, pgd.value_() + 0x4000)
    return space.mm.address


@breaks("radix-process-table")
def change_the_process_table(d: Damage) -> int:
    if d.arch != "ppc64":
        raise NotHereError("only ppc64 with the radix MMU has a process table")
    space = _process(d)
    assert space.mm is not None
    mm = space.mm.object(d.prog)
    entry = d.prog["process_tb"][int(mm.context.id)].prtb0
    # Big-endian: the lowest byte of the base comes last but two.
    d.write_object(entry, int(entry) ^ 1 << 40)
    return space.mm.address


@breaks("x86-kernel-half")
def lose_a_kernel_entry(d: Damage) -> int:
    if d.arch != "x86_64":
        raise NotHereError("only x86 keeps a copy of the kernel's part in every root")
    root = _process(d).root.address
    slots = [slot for slot in range(256, 512) if d.entry(root + 8 * slot)]
    return d.write_entry(root + 8 * slots[0], 0)


@breaks("x86-pti-user-root")
def lose_an_entry_of_user_mode(d: Damage) -> int:
    if not getattr(d.paging, "isolated", False):
        raise NotHereError("no page-table isolation")
    root = _process(d).root.address | 4096
    slots = [slot for slot in range(256) if d.entry(root + 8 * slot)]
    return d.write_entry(root + 8 * slots[0], 0)


@breaks("hugetlb-leaf-size")
def move_small_pages_into_a_hugetlb_area(d: Damage) -> int:
    for name in ("hugetlb-a", "hugetlb-b"):
        number = d.space(name)
        areas = d.context.areas(number)
        assert areas is not None
        for row in d.rows(1, space=number, typed=False, shared=True):
            for slot in d.slots(row, EntryClass.LEAF):
                place = int(areas.index_of(np.array([d.slot_va(row, slot)], np.uint64))[0])
                if place < 0 or not int(areas.flags[place]) & VM_HUGETLB:
                    continue
                small = d.row(0, space=number)
                page = d.slots(small, EntryClass.LEAF)[0]
                address = d.entry_address(small)
                d.write_entry(d.slot_address(row, slot), d.entry(address))
                d.write_entry(address, d.paging.levels[1].empty)
                return d.slot_address(small, page)
    raise NotHereError("no hugetlb page is mapped")


# Descriptors.


def _a_table(d: Damage) -> int:
    return d.index(d.row(0))


@breaks("desc-refcount-one")
def take_a_reference(d: Damage) -> int:
    index = _a_table(d)
    return d.write_member(index, "__page_refcount", d.member(index, "__page_refcount") + 1)


@breaks("desc-mapping-zero")
def give_it_a_mapping(d: Damage) -> int:
    return d.write_member(_a_table(d), "__page_mapping", 1)


@breaks("desc-flags-legal")
def lock_the_page(d: Damage) -> int:
    index = _a_table(d)
    bit = flags_bit(d.prog, "PG_locked")
    assert bit
    return d.write_member(index, "pt_flags", d.member(index, "pt_flags") | bit)


@breaks("desc-type-canonical")
def set_a_low_bit_of_the_type(d: Damage) -> int:
    index = _a_table(d)
    return d.write_member(index, "__page_type", page_type_test(d.prog).canonical ^ 1)


@breaks("pt-kernel-agrees")
def mark_a_table_of_a_process(d: Damage) -> int:
    bit = flags_bit(d.prog, "PT_kernel")
    if bit is None:
        raise NotHereError("this kernel does not mark kernel tables (no PT_kernel)")
    index = _a_table(d)
    return d.write_member(index, "pt_flags", d.member(index, "pt_flags") | bit)


@breaks("x86-pgd-mm")
def name_another_mm(d: Damage) -> int:
    if d.arch != "x86_64":
        raise NotHereError("only x86 keeps a list of its pgds")
    users = [s for s in d.tables.spaces if s.kind is SpaceKind.USER and s.tasks and s.mm]
    one, other = users[:2]
    assert one.mm is not None
    assert other.mm is not None
    return d.write_page_member(one.root.address // 4096, "pt_mm", other.mm.address)


@breaks("share-count")
def count_a_sharer_more(d: Damage) -> int:
    index = d.index(d.row(1))
    return d.write_member(index, "pt_share_count", d.member(index, "pt_share_count") + 1)


@breaks("memcg-data-sane")
def mark_the_charge_as_something_else(d: Damage) -> int:
    index = _a_table(d)
    return d.write_member(index, "pt_memcg_data", d.member(index, "pt_memcg_data") | 1)


@breaks("pmd-huge-pte-user-only")
def give_the_kernel_a_deposit(d: Damage) -> int:
    kernel = d.context.descriptors_of(d.context.kernel_space, level=1)
    if not len(kernel):
        raise NotHereError("no PMD table of the kernel is typed")
    return d.write_member(int(kernel[0]), "pmd_huge_pte", int(d.census.scan.addresses[0]))


# Accounting.


@breaks("nr-pagetable-total")
def count_a_page_more(d: Damage) -> int:
    counters = d.prog["vm_node_stat"]
    item = int(d.prog.constant("NR_PAGETABLE"))
    counter = counters[item].counter
    d.write_object(counter, int(counter) + 1)
    return int(counters.address_of_())


@breaks("typed-reachability")
def unlink_the_tables_of_a_page(d: Damage) -> int:
    def others(index: int) -> bool:
        rows = set(d.census.rows_of(index).tolist())
        return not rows <= unlinkable

    # What a cache of fragments keeps is no orphan.
    cached = set(d.census.stories.parted_pages.held_pfns.tolist())
    pfns = d.census.scan.pfns
    unlinkable = {row for row in d.rows(0) if int(pfns[d.index(row)]) not in cached}
    pages = sorted({d.index(row) for row in unlinkable}, key=lambda i: len(d.census.rows_of(i)))
    # Where CPUs take tables out of trees, as many orphans as they are would be theirs.
    wanted = 4 if d.census.stories.pending.frees else 1
    chosen = [index for index in pages if not others(index)][:wanted]
    if len(chosen) < wanted:
        raise NotHereError("no page whose tables can all be unlinked")
    for index in chosen:
        for row in d.census.rows_of(index).tolist():
            d.write_entry(d.entry_address(row), d.paging.levels[1].empty)
    return int(d.census.scan.addresses[chosen[0]])


@breaks("mm-pgtables-bytes")
def count_a_table_more(d: Damage) -> int:
    space = d.tables.spaces[d.space("sparse")]
    assert space.mm is not None
    counter = space.mm.object(d.prog).pgtables_bytes.counter
    d.write_object(counter, int(counter) + d.paging.levels[0].table_bytes)
    return space.mm.address


# Deposits.


def _ring(d: Damage):  # type: ignore[no-untyped-def]
    for ring in d.census.stories.deposits.rings:
        if ring.tables and ring.ptdesc is not None:
            return ring
    raise NotHereError("no table is deposited")


@breaks("deposit-count")
def lose_the_deposits(d: Damage) -> int:
    ring = _ring(d)
    index = int(np.flatnonzero(d.census.scan.addresses == np.uint64(ring.ptdesc))[0])
    return d.write_member(index, "pmd_huge_pte", 0)


@breaks("deposit-ring-sane")
def cut_the_ring(d: Damage) -> int:
    ring = _ring(d)
    table = ring.tables[0]
    if d.census.stories.deposits.node_in_table:
        d.write(physical_to_virtual(d.prog, table), bytes(8))
    else:
        index = d.census.index_of_pfn(table // d.paging.page_bytes)
        assert index is not None
        d.write_member(index, "pt_list.next", 0x100)
    return int(ring.ptdesc)


@breaks("deposit-empty")
def fill_an_entry_of_a_deposit(d: Damage) -> int:
    table = _ring(d).tables[0]
    row = d.row(0)
    leaf = d.slots(row, EntryClass.LEAF)[0]
    d.write_entry(table + 8 * 16, d.entry(d.slot_address(row, leaf)))
    return table


# Lists, and tables that wait to be freed.


@breaks("list-integrity")
def break_a_back_link(d: Damage) -> int:
    for found in d.census.stories.lists.lists:
        if found.ptdescs:
            d.write_page_member(found.pfns[0], "pt_list.prev", found.head ^ 0x10)
            return found.head
    raise NotHereError("no descriptor is on a list of this kernel")


@breaks("kernel-work-list")
def type_a_table_that_waits(d: Damage) -> int:
    listed = d.census.stories.lists.named(FREE_LIST)
    if listed is None:
        raise NotHereError("this kernel frees its tables at once")
    if not listed.pfns:
        raise NotHereError("no kernel table waits to be freed")
    return d.write_page_member(listed.pfns[0], "__page_type", page_type_test(d.prog).canonical)


@breaks("table-on-no-list")
def link_two_tables_in_a_list(d: Damage) -> int:
    one, other = sorted({d.index(row) for row in d.rows(0)})[:2]
    fields = d.census.scan.descriptors.dtype.fields
    assert fields is not None
    offset = fields["pt_list.next"][1]
    for here, there in ((one, other), (other, one)):
        node = int(d.census.scan.addresses[there]) + offset
        d.write_member(here, "pt_list.next", node)
        d.write_member(here, "pt_list.prev", node)
    return int(d.census.scan.addresses[one])


@breaks("pending-not-linked")
def link_a_table_that_waits(d: Damage) -> int:
    pending = d.census.stories.pending
    if not len(pending.addresses):
        raise NotHereError("no table waits to be freed")
    row = d.row(0)
    address = d.entry_address(row)
    target = int(pending.addresses[0])
    d.write_entry(address, d.retarget(d.entry(address), target, level=1))
    return target


# Locks.


@breaks("ptl-legal")
def write_over_a_lock(d: Damage) -> int:
    # No lock word, and no pointer.
    return d.write_member(_a_table(d), "ptl", 0x7FF4)


@breaks("ptl-has-holder")
def lock_a_table_for_ever(d: Damage) -> int:
    story = d.census.stories.locks
    if any(task.pid for task in story.running.values()):
        raise NotHereError("a CPU is not idle, and could be who has the lock")
    index = _a_table(d)
    row = int(np.flatnonzero(story.descriptor == index)[0])
    assert story.type is not None
    order = byte_order(d.prog)
    word = int(story.address[row]) + (story.type.word or 0)
    # Locked; where the owner is kept too, by CPU 0.
    d.write(word, struct.pack(f"{order}I", 1))
    return int(d.census.scan.addresses[index])


@breaks("ptl-kernel-unused")
def lock_a_kernel_table(d: Damage) -> int:
    if flags_bit(d.prog, "PT_kernel") is None:
        raise NotHereError("this kernel gives the kernel's tables locks too")
    kernel = d.context.descriptors_of(d.context.kernel_space)
    return d.write_member(int(kernel[0]), "ptl", 1)


# Pages that hold several tables.


@breaks("ppc-frag-refcount")
def count_a_fragment_more(d: Damage) -> int:
    if d.census.stories.fragments is None:
        raise NotHereError("only ppc64 has table fragments")
    index = _a_table(d)
    d.write_member(index, "pt_frag_refcount", d.member(index, "pt_frag_refcount") + 1)
    return int(d.census.scan.pfns[index]) * d.paging.page_bytes


@breaks("s390-half-state")
def mark_a_linked_half_as_free(d: Damage) -> int:
    if d.census.stories.halves is None:
        raise NotHereError("only s390 up to 6.7 keeps two page tables in a page")
    row = d.row(0)
    index = d.index(row)
    half = 2 if int(d.tables.address[row]) % 4096 else 1
    bits = d.member(index, "__page_refcount") & 0xFFFFFFFF
    d.write_member(index, "__page_refcount", bits & ~(half << 24))
    return int(d.census.scan.pfns[index]) * d.paging.page_bytes


@breaks("s390-upper-half")
def write_behind_a_table(d: Damage) -> int:
    context = d.prog.type("struct mm_struct").member("context").type
    if d.arch != "s390x" or context.has_member("pgtable_list"):
        raise NotHereError("only s390 since 6.8 leaves the second half of the page free")
    for row in d.rows(0):
        mm = d.context.mm(int(d.tables.space[row]))
        assert mm is not None
        if not context.has_member("has_pgste") or not int(mm.context.has_pgste):
            address = int(d.tables.address[row])
            d.write_entry(address + 2048, 1)
            return address
    raise NotHereError("every process has PGSTEs")


# Guests.


def _guest(d: Damage) -> Gmap:
    for gmap in d.census.stories.gmaps.gmaps.gmaps:
        if not gmap.kvm_owned and not gmap.shadow and gmap.host_to_guest.entries:
            return gmap
    raise NotHereError("no guest address space of this generation (s390 before 7.0)")


@breaks("gmap-h2g-g2h")
def empty_a_segment_of_a_guest(d: Damage) -> int:
    host, entry = next(iter(_guest(d).host_to_guest.entries.items()))
    d.write_entry(virtual_to_physical(d.prog, entry), d.paging.levels[1].empty)
    return host << 20


@breaks("gmap-crst-index")
def change_the_guest_address_of_a_table(d: Damage) -> int:
    table = next(t for t in _guest(d).crst_list if t.index is not None)
    assert table.index is not None
    d.write_page_member(table.pfn, "pt_index", table.index ^ 1 << 20)
    return table.pfn * d.paging.page_bytes


@breaks("gmap-mirrors-host")
def give_the_guest_another_table(d: Damage) -> int:
    try:
        gmap = _guest(d)
    except NotHereError:
        return _give_the_guest_another_page(d)
    for guest, host in gmap.guest_to_host.entries.items():
        entry = gmap.host_to_guest.entries.get(host >> 20)
        if entry is None:
            continue
        address = virtual_to_physical(d.prog, entry)
        other = int(d.tables.address[d.row(0)])
        d.write_entry(address, d.retarget(d.entry(address), other, level=1))
        return guest << 20
    raise NotHereError("no segment is mapped")


def _give_the_guest_another_page(d: Damage) -> int:
    """Where the guest has page tables of its own (7.0)."""
    for gmap in d.census.stories.gmaps.gmaps.gmaps:
        if gmap.kvm_owned and not gmap.shadow and not gmap.parent:
            for row in _guest_rows(d, gmap, 0):
                # Its entries lack the bits that tell leaves in tables of processes.
                valid = (d.contents(row).values & np.uint64(0x400)) == 0
                for slot in np.flatnonzero(valid).tolist():
                    address = d.slot_address(row, slot)
                    d.write_entry(address, d.entry(address) ^ 1 << 12)
                    return d.slot_va(row, slot)
    raise NotHereError("no guest address space, or no page of one")


def _guest_rows(d: Damage, gmap: Gmap, level: int) -> list[int]:
    for number, space in enumerate(d.tables.spaces):
        if space.gmap == gmap.address:
            rows = d.tables.rows_of_space(number)
            return [int(row) for row in rows[d.tables.level[rows] == level]]
    return []


@breaks("gmap-tables")
def take_a_reference_to_a_table_of_a_guest(d: Damage) -> int:
    for gmap in d.census.stories.gmaps.gmaps.gmaps:
        for row in _guest_rows(d, gmap, 1):
            address = int(d.tables.address[row])
            d.write_page_member(address // d.paging.page_bytes, "__page_refcount", 2)
            return address
    raise NotHereError("no guest address space")
