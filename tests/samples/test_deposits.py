# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Deposited tables of each sample against plain drgn and the kernel's counts; damaged rings."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import pytest
from corrupt import Answer, ask
from drgn import Object, Type, TypeMember, offsetof
from drgn.helpers.linux.mm import pfn_to_page, vma_find
from opened import Sample
from overlay import Overlay
from test_walk import deposits, walked

from ptinspect import for_each_deposited_pgtable, page_ptdesc, ptdesc_member, virt_to_ptdesc
from ptinspect.census import Holder, take_census
from ptinspect.faces.deposits import deposits_report
from ptinspect.kernel.paging import EntryClass, Paging
from ptinspect.listing import Listing
from ptinspect.lists import BreakReason
from ptinspect.state.deposits import DepositRing, Deposits
from ptinspect.state.huge_leaves import HugePage, read_huge_leaves
from ptinspect.state.pmd_tables import read_pmd_tables
from ptinspect.tables.spaces import SpaceKind


def story(sample: Sample) -> Deposits:
    return walked(sample).census.stories.deposits


def test_tables_are_those_that_plain_drgn_finds(sample: Sample) -> None:
    paging, spaces, tables, _ = walked(sample)
    found = story(sample)
    assert found.supported
    assert found.missing == found.findings == ()
    for number, space in enumerate(spaces.spaces):
        if space.kind is not SpaceKind.USER:
            continue
        rings = [ring for ring in found.rings if ring.space == number]
        pfns = [table // paging.page_bytes for ring in rings for table in ring.tables]
        assert pfns == deposits(sample.prog, paging, tables, tables.rows_of_space(number))
        spare = len(pfns) * paging.levels[0].table_bytes
        assert space.mm is not None
        assert walked_bytes(sample, number) + spare == space.mm.pgtables_bytes


def walked_bytes(sample: Sample, space: int) -> int:
    """Bytes of the tables that the kernel counts in an mm, spare ones left out."""
    paging, _, tables, _ = walked(sample)
    rows = tables.rows_of_space(space)
    rows = rows[(tables.parent[rows] >= 0) & (tables.level[rows] <= 2)]
    return sum(paging.levels[level].table_bytes for level in tables.level[rows].tolist())


def test_huge_pages_are_those_of_smaps(sample: Sample) -> None:
    """AnonHugePages of each process, and the uses of the huge zero page that it made."""
    _, spaces, tables, _ = walked(sample)
    found = story(sample)
    span_kb = tables.paging.levels[1].entry_span // 1024
    zeroes = Counter(n["pid"] for n in sample.truth["made"] if n["text"].startswith("thp-zero"))
    for process in sample.truth["processes"]:
        space = spaces.of_pid(process["pid"])
        rings = [r for r in found.rings if tables.spaces[r.space] is space]
        huge = sum(ring.huge[HugePage.ANONYMOUS] for ring in rings)
        assert huge * span_kb == process["smaps_rollup_kb"].get("AnonHugePages", 0)
        assert sum(ring.huge[HugePage.ZERO] for ring in rings) == 2 * zeroes[process["pid"]]
        assert sum(ring.undecided for ring in rings) == 0
        assert all(ring.agrees for ring in rings)


def test_every_huge_entry_is_told(sample: Sample) -> None:
    """hugetlb pages are seen and need no deposit."""
    _, _, tables, _ = walked(sample)
    pmds = read_pmd_tables(sample.prog, tables)
    leaves = read_huge_leaves(sample.prog, tables, pmds)
    wanted = (EntryClass.LEAF, EntryClass.PROT_NONE, EntryClass.MIGRATION, EntryClass.SPECIAL)
    assert len(leaves.kind) == tables.counts[pmds.rows][:, wanted].sum()
    kinds = Counter(leaves.kind.tolist())
    assert kinds[HugePage.UNDECIDED] == leaves.unreadable_tables == 0
    hugetlb = sum(n["text"].startswith("hugetlb 0x") for n in sample.truth["made"])
    # Three pages each, through one table where it is shared.
    shared = tables.paging.architecture != "ppc64" and hugetlb
    assert kinds[HugePage.OTHER] >= (3 if shared else 3 * hugetlb)


def test_held_in_the_census(sample: Sample) -> None:
    census = take_census(sample.prog, leaf_counts=False)
    assert not len(census.unexplained())
    assert census.complete
    paging, _, tables, _ = walked(sample)
    users = np.flatnonzero([space.kind is SpaceKind.USER for space in tables.spaces])
    rows = np.flatnonzero(np.isin(tables.space, users) & (tables.first < 0))
    spare = {census.index_of_pfn(p) for p in deposits(sample.prog, paging, tables, rows)}
    # A page with fragments can have spare tables beside others that are reached.
    alone = {i for i in spare if i is not None and not len(census.rows_of(i))}
    assert set(np.flatnonzero(census.holder == Holder.DEPOSIT).tolist()) == alone
    listing = Listing(sample.prog, census.scan, census)
    assert set(listing.select(["holder = deposit", "level = PTE"]).tolist()) == alone


def test_iterator_of_the_shell(sample: Sample) -> None:
    prog, page = sample.prog, walked(sample).paging.page_bytes
    for ring in story(sample).rings:
        pt = Object(prog, page_ptdesc(Object(prog, "struct page *", 0)).type_, ring.ptdesc)
        first = ptdesc_member(pt, "pmd_huge_pte")
        found = list(for_each_deposited_pgtable(pt))
        assert found[0] == first
        assert found[0].type_.type_name() == "pgtable_t"
        assert len(found) == len(ring.tables)
        for pgtable, table in zip(found, ring.tables):
            if story(sample).node_in_table:
                spare = virt_to_ptdesc(pgtable)
                assert pgtable.value_() % page == table % page
            else:
                spare = page_ptdesc(pgtable)
            assert ptdesc_member(spare, "__page_refcount").counter > 0


# Damage


@pytest.fixture
def ring(sample: Sample) -> DepositRing:
    """A ring with at least three tables."""
    for ring in story(sample).rings:
        if len(ring.tables) > 2:
            return ring
    pytest.skip("the sample has no deposited tables")


def node_of(sample: Sample, table: int) -> int:
    """Virtual address of a spare table's list node."""
    if story(sample).node_in_table:
        address: int = walked(sample).census.paging.virtual_to_physical(sample.prog, 0)
        return (table - address) & ((1 << 64) - 1)
    pt = Object(sample.prog, "struct page *", descriptor_of(sample, table))
    return int(pt.lru.address_of_())


def descriptor_of(sample: Sample, table: int) -> int:
    scan = sample.scan
    index = int(np.searchsorted(scan.pfns, table // walked(sample).paging.page_bytes))
    return int(scan.addresses[index])


def first_word(sample: Sample, ring: DepositRing) -> Object:
    """The pmd_huge_pte of a ring, as a reference."""
    pt = Object(sample.prog, "struct page *", ring.ptdesc)
    return ptdesc_member(page_ptdesc(pt), "pmd_huge_pte")


def answer(sample: Sample) -> Answer:
    return ask(
        sample.prog,
        lambda census: deposits_report(census, "x", racing=False, each=True, space=None),
    )


def damaged_ring(found: Answer, ring: DepositRing) -> DepositRing:
    (same,) = (r for r in found.census.stories.deposits.rings if r.pmd_tables == ring.pmd_tables)
    return same


def test_cut(sample: Sample, ring: DepositRing) -> None:
    """The second node points nowhere: two tables are still seen, the others become orphans."""
    second = node_of(sample, ring.tables[1])
    with Overlay(sample.prog).word_at(second, 0):
        found = answer(sample)
    assert found.status == 4
    line = found.line_with("INCOMPLETE", f"{ring.pmd_tables[0]:#x}")
    assert BreakReason.NULL.value in line
    assert f"node {second:#x}, next 0x0" in line
    assert damaged_ring(found, ring).tables == ring.tables[:2]
    assert "broken" in found.line_with(f"{ring.ptdesc:#x}")
    assert answer(sample).status == 0


def test_looped(sample: Sample, ring: DepositRing) -> None:
    third, second = (node_of(sample, table) for table in (ring.tables[2], ring.tables[1]))
    with Overlay(sample.prog).word_at(third, second):
        found = answer(sample)
    assert found.status == 4
    assert f"node {third:#x}, next {second:#x}, its prev" in found.line_with("INCOMPLETE")
    assert damaged_ring(found, ring).tables == ring.tables[:3]


def test_looped_with_its_links_back(sample: Sample, ring: DepositRing) -> None:
    """A loop that excludes the first node; both of its ends agree."""
    third, second = (node_of(sample, table) for table in (ring.tables[2], ring.tables[1]))
    overlay = Overlay(sample.prog)
    with overlay.word_at(third, second), overlay.word_at(second + 8, third):
        found = answer(sample)
    assert found.status == 4
    # Already the first node is not what the second one points back to.
    assert BreakReason.BACK_LINK.value in found.line_with("INCOMPLETE")


@pytest.mark.parametrize(
    "garbage", [0x1234, 0xDEAD000000000122, 0xFFFFFFFFFFFFFF00, (1 << 64) - 1, "init_task"]
)
def test_garbage(sample: Sample, ring: DepositRing, garbage: int | str) -> None:
    """pmd_huge_pte points to nothing, to a poison, or at a list that is whole but of tasks."""
    if isinstance(garbage, str):
        at = int(sample.prog[garbage].tasks.address_of_())
        garbage = at if story(sample).node_in_table else at - 8
    with Overlay(sample.prog).value_of(first_word(sample, ring), garbage):
        found = answer(sample)
    assert found.status == 4
    assert found.line_with("INCOMPLETE", "deposits of", f"{ring.pmd_tables[0]:#x}")
    assert damaged_ring(found, ring).tables == ()
    assert found.text.count("\n") < 30


def test_none_where_some_are_needed(sample: Sample, ring: DepositRing) -> None:
    with Overlay(sample.prog).value_of(first_word(sample, ring), 0):
        found = answer(sample)
    assert found.status == 1
    line = found.line_with("FINDING")
    assert f"0 tables deposited, {ring.needed} huge pages need one" in line
    assert "too few" in found.line_with(f"{ring.ptdesc:#x}")


def test_one_too_few(sample: Sample, ring: DepositRing) -> None:
    """The ring is closed around one of its tables: it is whole, but too short."""
    first, second, third = (node_of(sample, table) for table in ring.tables[:3])
    overlay = Overlay(sample.prog)
    with overlay.word_at(first, third), overlay.word_at(third + 8, first):
        found = answer(sample)
    assert found.status == 1
    assert f"{ring.needed - 1} tables deposited" in found.line_with("FINDING")
    if not story(sample).node_in_table:
        (orphan,) = found.census.unexplained()
        assert int(sample.scan.addresses[orphan]) == descriptor_of(sample, ring.tables[1])
    del second


def test_crossed(sample: Sample, ring: DepositRing) -> None:
    """Another PMD table says that it has the same tables."""
    _, _, tables, _ = walked(sample)
    pmds = read_pmd_tables(sample.prog, tables)
    other = next(int(p) for p in pmds.ptdescs if int(p) != ring.ptdesc)
    second = ptdesc_member(page_ptdesc(Object(sample.prog, "struct page *", other)), "pmd_huge_pte")
    with Overlay(sample.prog).value_of(second, first_word(sample, ring).value_()):
        found = answer(sample)
    assert found.status == 4
    lines = [line for line in found.text.splitlines() if "is on another ring too" in line]
    assert len(lines) == 2
    assert all(line.startswith("INCOMPLETE") for line in lines)


def test_the_pmd_table_is_not_typed_any_more(sample: Sample, ring: DepositRing) -> None:
    """Its descriptor is somebody else's: what hangs there is not followed."""
    page = Object(sample.prog, "struct page *", ring.ptdesc)
    with Overlay(sample.prog).value_of(page.page_type, 0xFFFFFFFF):
        found = answer(sample)
    assert found.status == 4
    assert "1 PMD tables of mms are in pages that are not typed" in found.line_with("INCOMPLETE")
    assert damaged_ring(found, ring).tables == ()


class Leaf(NamedTuple):
    va: int
    #: Page frame.
    pfn: int
    #: Physical address of the entry.
    entry: int


def leaves(sample: Sample, ring: DepositRing) -> list[Leaf]:
    """The readable huge pages that are mapped through a ring's PMD tables."""
    _, _, tables, _ = walked(sample)
    level, found = tables.paging.levels[1], []
    for table in ring.pmd_tables:
        (row,) = np.flatnonzero((tables.address == table) & (tables.first < 0))
        raw = np.frombuffer(sample.prog.read(table, level.table_bytes, True), np.uint64)
        values = tables.paging.values(raw)
        slots = np.flatnonzero(tables.paging.classify(values, 1) == EntryClass.LEAF)
        targets = tables.paging.leaf_targets(values[slots], 1, slots)
        for slot, target in zip(slots.tolist(), targets.tolist()):
            va = int(tables.va[row]) + (slot << level.shift)
            found.append(Leaf(va, target // tables.paging.page_bytes, table + 8 * slot))
    return found


def needed(sample: Sample, ring: DepositRing) -> tuple[int, int]:
    found = damaged_ring(answer(sample), ring)
    return found.needed, found.undecided


def mm_of(sample: Sample, ring: DepositRing) -> Object:
    space = walked(sample).tables.spaces[ring.space]
    assert space.mm is not None
    return space.mm.object(sample.prog)


def test_pages_of_files_and_of_hugetlb_need_no_deposit(sample: Sample, ring: DepositRing) -> None:
    prog = sample.prog
    leaf = next(a for a in leaves(sample, ring) if a.pfn != prog["huge_zero_pfn"].value_())
    page = pfn_to_page(prog, leaf.pfn)
    overlay = Overlay(prog)
    assert page.mapping.value_() & 1
    with overlay.value_of(page.mapping, page.mapping.value_() & ~1):
        assert needed(sample, ring) == (ring.needed - 1, 0)
    try:
        hugetlb = prog.constant("PGTY_hugetlb").value_() << 24
    except LookupError:
        # Told by the mapping: all of its pages.
        operations = vma_find(mm_of(sample, ring), leaf.va).vm_ops
        with overlay.value_of(operations, prog["hugetlb_vm_ops"].address_of_().value_()):
            assert needed(sample, ring)[0] < ring.needed
    else:
        with overlay.value_of(page.page_type, hugetlb):
            assert needed(sample, ring) == (ring.needed - 1, 0)


def moving_entry(paging: Paging, pfn: int) -> int | None:
    """
    Make a migration entry as __swp_entry() does, of a page that was young and dirty.

    :return: ``None`` where the offset is not known.
    """
    kind = paging.swap_classes.index(EntryClass.MIGRATION)
    bits = {"x86_64": 52 if len(paging.levels) == 5 else 46, "arm64": 48}.get(paging.architecture)
    if bits is None:
        return None
    offset = pfn | 3 << (bits - 12)
    every = (1 << 64) - 1
    if paging.architecture == "x86_64":
        return kind << 59 | ((~offset << 14) & every) >> 5
    return kind << 6 | offset << 12


def test_pages_that_are_being_moved(sample: Sample, ring: DepositRing) -> None:
    """Their entries name the page as those that are mapped do: it tells whether it is anonymous."""
    prog, paging = sample.prog, walked(sample).paging
    leaf = next(a for a in leaves(sample, ring) if a.pfn != prog["huge_zero_pfn"].value_())
    page = pfn_to_page(prog, leaf.pfn)
    entry, nowhere = (moving_entry(paging, pfn) for pfn in (leaf.pfn, 0x3FFFFFF00))
    if entry is None or nowhere is None:
        pytest.skip("here it is not known where swap entries have the page")
    assert paging.classify(np.array([entry], np.uint64), 1)[0] == EntryClass.MIGRATION
    overlay = Overlay(prog)
    with overlay.bytes_at(leaf.entry, entry.to_bytes(8, "little"), physical=True):
        assert needed(sample, ring) == (ring.needed, 0)
        with overlay.value_of(page.mapping, page.mapping.value_() & ~1):
            assert needed(sample, ring) == (ring.needed - 1, 0)
    with overlay.bytes_at(leaf.entry, nowhere.to_bytes(8, "little"), physical=True):
        assert needed(sample, ring) == (ring.needed - 1, 1)


def test_the_huge_zero_page_needs_none_in_a_dax_mapping(sample: Sample, ring: DepositRing) -> None:
    prog = sample.prog
    zeroes = [a for a in leaves(sample, ring) if a.pfn == prog["huge_zero_pfn"].value_()]
    assert len(zeroes) == ring.huge[HugePage.ZERO] == 2
    mm = mm_of(sample, ring)
    file = vma_find(mm, mm.start_code).vm_file.read_()
    flags = file.f_mapping.host.i_flags
    overlay = Overlay(prog)
    with overlay.value_of(vma_find(mm, zeroes[0].va).vm_file, file.value_()):
        assert needed(sample, ring) == (ring.needed, 0)
        with overlay.value_of(flags, flags.value_() | 1 << 13):
            assert needed(sample, ring) == (ring.needed - 2, 0)
    with overlay.value_of(vma_find(mm, zeroes[0].va).vm_file, 0x1234):
        assert needed(sample, ring) == (ring.needed - 2, 2)
        found = answer(sample)
    assert found.status == 4
    assert "2 huge pages may or may not need" in found.line_with("INCOMPLETE")


# Kernels without split PMD locks keep the ring in the mm: such a kernel is built with fewer CPUs
# than CONFIG_SPLIT_PTLOCK_CPUS; here its mm_struct is laid over a real one


def test_ring_of_an_mm(sample: Sample, ring: DepositRing) -> None:
    prog = sample.prog
    space = walked(sample).tables.spaces[ring.space]
    assert space.mm is not None
    mm = prog.type("struct mm_struct")
    # A word that nothing of ptinspect's reads.
    offset = offsetof(mm, "total_vm")
    member = TypeMember(prog.type("pgtable_t"), "pmd_huge_pte", 8 * offset)
    other = [m for m in mm.members or () if not m.name or m.name != "total_vm"]
    laid_over = prog.struct_type("mm_struct", mm.size, [*other, member])

    def find(program: object, kinds: object, name: str, filename: str | None) -> Type | None:
        return laid_over if name == "mm_struct" else None

    overlay = Overlay(prog)
    first = first_word(sample, ring).value_()
    blocks = [
        overlay.word_at(s.mm.address + offset, first if s is space else 0)
        for s in walked(sample).tables.spaces
        if s.mm is not None and s.kind is SpaceKind.USER
    ]
    prog.register_type_finder("without_split_locks", find, enable_index=0)
    try:
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block)
            found = answer(sample)
    finally:
        names = prog.enabled_type_finders()
        prog.set_enabled_type_finders([n for n in names if n != "without_split_locks"])
    deposits_found = found.census.stories.deposits
    assert deposits_found.in_mm
    assert found.status == 0
    (same,) = deposits_found.rings
    assert same.ptdesc is None
    assert same.tables == ring.tables
    assert same.needed == ring.needed
    assert set(ring.pmd_tables) <= set(same.pmd_tables)
    assert "A ring begins at the mm" in found.text
