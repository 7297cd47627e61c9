# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tables that cannot be followed: each ends in a recorded state, and every walk ends."""

from __future__ import annotations

import struct
from random import Random

import numpy as np
import pytest
from drgn import Architecture, Platform, Program
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_memory import LITTLE, MODES, PAGE, Mode, SparseMemory, build_tree

from ptinspect.kernel.paging import EntryClass, Permission, Root, x86_64
from ptinspect.tables import walk
from ptinspect.tables.entries import Entries
from ptinspect.tables.lookup import Outcome, page_owners, table_owners, walk_address
from ptinspect.tables.physical import PhysicalRanges
from ptinspect.tables.ranges import map_space
from ptinspect.tables.spaces import Space, SpaceKind
from ptinspect.tables.usage import space_usage
from ptinspect.tables.walk import RowArray, RowState, Tables, read_leaf_tables, walk_spaces

PAGING = x86_64.make_paging(five_levels=False)
TOP = 3
TABLE = 0x67
LEAF = 0x67


class Machine:
    """x86_64 tables made entry by entry."""

    def __init__(self) -> None:
        self.memory = SparseMemory()
        self.prog = Program(Platform(Architecture.X86_64, LITTLE))
        self.memory.attach(self.prog)

    def entry(self, table: int, index: int, value: int) -> None:
        self.memory.add(table, PAGE)
        self.memory.write(table + 8 * index, struct.pack("<Q", value))

    def chain(self, root: int, index: int = 0) -> int:
        """Make PUD, PMD and PTE tables behind the root; return the PTE table."""
        for n in range(TOP):
            self.entry(root + n * PAGE, index if n == 0 else 0, root + (n + 1) * PAGE | TABLE)
        return root + TOP * PAGE

    def walk(self, *spaces: Space, **options: object) -> Tables:
        return walk_spaces(self.prog, PAGING, spaces, **options)  # type: ignore[arg-type]


def user(root: int, entries: tuple[tuple[int, int], ...] = ((0, 256),)) -> Space:
    return Space(SpaceKind.USER, Root(root, TOP, entries))


def kernel(root: int) -> Space:
    return Space(SpaceKind.KERNEL, Root(root, TOP, ((0, 512),)))


def rows(tables: Tables, level: int) -> list[int]:
    return [int(row) for row in np.flatnonzero(tables.level == level)]


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_table_that_is_not_in_the_dump_is_unreadable(machine: Machine) -> None:
    machine.chain(0x10000)
    machine.entry(0x12000, 7, 0x99000 | TABLE)
    machine.entry(0x13000, 0, 0x5000 | LEAF)
    space = user(0x10000)
    tables = machine.walk(space)
    assert [RowState(s) for s in tables.state[rows(tables, 0)]] == [
        RowState.READ,
        RowState.UNREADABLE,
    ]
    assert not tables.complete
    assert not tables.counted[rows(tables, 0)[1]]
    space_map = map_space(machine.prog, PAGING, space)
    (unseen,) = space_map.unseen
    assert (unseen.start, unseen.end) == (7 << 21, 8 << 21)
    found = walk_address(machine.prog, PAGING, space.root, 7 << 21)
    assert found.outcome is Outcome.UNREADABLE
    assert not space_usage(tables).complete[0]


def test_root_that_is_not_in_the_dump(machine: Machine) -> None:
    tables = machine.walk(user(0x10000))
    assert tables.state.tolist() == [RowState.UNREADABLE]
    assert map_space(machine.prog, PAGING, user(0x10000)).ranges == ()


def test_entry_that_points_outside_memory(machine: Machine) -> None:
    machine.chain(0x10000)
    machine.entry(0x12000, 7, 0x4000_0000_0000 | TABLE)
    memory = PhysicalRanges([(0, 0x20000)])
    tables = machine.walk(user(0x10000), memory=memory)
    assert tables.state[rows(tables, 0)].tolist() == [RowState.UNREADABLE, RowState.OUTSIDE]
    found = walk_address(machine.prog, PAGING, user(0x10000).root, 7 << 21, memory=memory)
    assert found.outcome is Outcome.OUTSIDE
    assert found.steps[-1].value is None


def test_table_that_maps_itself_is_a_cycle_and_ends(machine: Machine) -> None:
    for index in range(512):
        machine.entry(0x10000, index, 0x10000 | TABLE)
    tables = machine.walk(kernel(0x10000))
    assert tables.state[0] == RowState.READ
    assert len(tables) == 513
    assert set(tables.state[1:].tolist()) == {RowState.CYCLE}


def test_long_cycle_between_levels(machine: Machine) -> None:
    machine.chain(0x10000)
    machine.entry(0x12000, 5, 0x11000 | TABLE)
    machine.entry(0x13000, 0, 0x5000 | LEAF)
    tables = machine.walk(user(0x10000))
    assert tables.state[rows(tables, 0)].tolist() == [RowState.READ, RowState.CYCLE]


def test_table_of_two_spaces_is_followed_once_and_counts_in_both(machine: Machine) -> None:
    first, second = 0x10000, 0x40000
    pte = machine.chain(first)
    machine.entry(pte, 3, 0x5000 | LEAF)
    # The second space has the PMD table of the first, at another address.
    machine.entry(second, 2, 0x41000 | TABLE)
    machine.entry(0x41000, 9, first + 2 * PAGE | TABLE)
    tables = machine.walk(user(first), user(second))
    shared = [row for row in range(len(tables)) if tables.state[row] == RowState.SHARED]
    (row,) = shared
    assert tables.level[row] == 1
    assert tables.address[tables.first[row]] == tables.address[row]
    assert tables.counts[row].tolist() == tables.counts[tables.first[row]].tolist()
    assert len(rows(tables, 0)) == 1
    owners = table_owners(tables, pte)
    assert {(o.space, o.va) for o in owners} == {(0, 0), (1, (2 << 39) + (9 << 30))}
    pages = page_owners(machine.prog, tables, 0x5000)
    assert {(o.space, o.va) for o in pages} == {
        (0, 3 << 12),
        (1, (2 << 39) + (9 << 30) + (3 << 12)),
    }
    usage = space_usage(tables)
    assert usage.tables[:, 1].tolist() == [1, 1]
    assert usage.accounted_bytes.tolist() == [3 * PAGE, 2 * PAGE]


def test_table_that_one_space_has_twice_is_mapped_twice(machine: Machine) -> None:
    pte = machine.chain(0x10000)
    machine.entry(pte, 3, 0x5000 | LEAF)
    machine.entry(0x11000, 6, 0x12000 | TABLE)
    machine.entry(0x12000, 1, pte | TABLE)
    starts = [r.start for r in map_space(machine.prog, PAGING, user(0x10000)).ranges]
    base = 6 << 30
    page = 3 << 12
    assert starts == [page, (1 << 21) + page, base + page, base + (1 << 21) + page]


def test_only_the_own_part_of_a_root_is_walked(machine: Machine) -> None:
    machine.chain(0x10000)
    machine.entry(0x10000, 300, 0x11000 | TABLE)
    machine.entry(0x10000, 272, 0x50000 | TABLE)
    machine.entry(0x50000, 0, 0)
    tables = machine.walk(user(0x10000, ((0, 256), (272, 273))))
    (root,) = rows(tables, TOP)
    assert tables.counts[root, EntryClass.TABLE] == 2
    assert tables.counts[root].sum() == 257
    assert sorted(tables.index[rows(tables, 2)].tolist()) == [0, 272]
    ldt = tables.va[next(r for r in rows(tables, 2) if tables.index[r] == 272)]
    assert int(ldt) == 0xFFFF880000000000
    whole = walk_address(machine.prog, PAGING, user(0x10000).root, 0xFFFF960000000000)
    assert whole.outcome is Outcome.NO_ADDRESS


def test_two_roots_of_page_table_isolation_share_their_tables(machine: Machine) -> None:
    pte = machine.chain(0x10000, index=1)
    machine.entry(pte, 0, 0x5000 | LEAF)
    # The user half is the page behind; the chain above took it, so move the PUD table away.
    machine.memory.add(0x80000, PAGE)
    machine.memory.write(0x80000, machine.memory.read(0x11000, PAGE))
    machine.entry(0x10000, 1, 0x80000 | TABLE | 1 << 63)
    machine.memory.write(0x11000, bytes(PAGE))
    machine.entry(0x11000, 1, 0x80000 | TABLE)
    half = Space(SpaceKind.ISOLATED, Root(0x11000, TOP, ((0, 512),)))
    tables = machine.walk(user(0x10000), half)
    assert tables.state[rows(tables, 2)].tolist() == [RowState.READ, RowState.SHARED]
    pages = page_owners(machine.prog, tables, 0x5000)
    assert {(o.space, o.va) for o in pages} == {(0, 1 << 39), (1, 1 << 39)}
    mapped = walk_address(machine.prog, PAGING, half.root, 1 << 39)
    assert mapped.permissions is not None
    assert mapped.permissions & Permission.EXECUTE_USER
    kernel_half = walk_address(machine.prog, PAGING, user(0x10000).root, 1 << 39)
    assert kernel_half.permissions is not None
    assert not kernel_half.permissions & Permission.EXECUTE_USER


def test_permissions_are_those_of_the_whole_path(machine: Machine) -> None:
    pte = machine.chain(0x10000)
    machine.entry(pte, 0, 0x5000 | LEAF)
    machine.entry(0x11000, 0, 0x12000 | 0x65 | 1 << 63)
    found = walk_address(machine.prog, PAGING, user(0x10000).root, 0)
    assert found.permissions == Permission.READ | Permission.USER
    (area,) = map_space(machine.prog, PAGING, user(0x10000)).ranges
    assert area.permissions == found.permissions


def test_non_present_kernel_entries_are_hidden_pages_not_swap(machine: Machine) -> None:
    pte = machine.chain(0x10000)
    machine.entry(pte, 4, 0x00FF_FFFF_F000)
    assert machine.walk(user(0x10000)).counts[3, EntryClass.SWAP] == 1
    counts = machine.walk(kernel(0x10000)).counts[3]
    assert counts[EntryClass.PROT_NONE] == 1
    assert counts[EntryClass.SWAP] == 0
    (area,) = map_space(machine.prog, PAGING, kernel(0x10000)).ranges
    assert area.kind is EntryClass.PROT_NONE
    found = walk_address(machine.prog, PAGING, kernel(0x10000).root, 4 << 12, kernel=True)
    assert found.outcome is Outcome.PROT_NONE


def test_lowest_level_is_read_only_when_asked_for(machine: Machine) -> None:
    # The PTE table itself does not exist in memory.
    machine.chain(0x10000)
    tables = machine.walk(user(0x10000), leaf_counts=False)
    assert tables.state[rows(tables, 0)].tolist() == [RowState.NOT_READ]
    assert not tables.counted[rows(tables, 0)].any()
    assert tables.complete


def test_reads_do_not_depend_on_how_tables_are_batched(machine: Machine) -> None:
    random = Random(1)
    machine.chain(0x10000)
    places = random.sample(range(0x100, 0x900), 300)
    for index, place in enumerate(places):
        machine.entry(0x12000, index, place * PAGE | TABLE)
        machine.entry(place * PAGE, index, 0x5000 | LEAF)
    for place in places[::17]:
        del machine.memory.pages[place]
    whole = machine.walk(user(0x10000))
    small = machine.walk(user(0x10000), batch_bytes=3 * PAGE)
    for name in ("address", "va", "state", "parent", "index"):
        assert getattr(whole, name).tolist() == getattr(small, name).tolist()
    assert whole.counts.tolist() == small.counts.tolist()
    assert int((whole.state == RowState.UNREADABLE).sum()) == len(places[::17])


def test_leaf_tables_can_be_read_later(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "_SHOWN_LINES", 7)
    machine.chain(0x10000)
    machine.chain(0x80000)
    # Of two spaces, so that the rows of the second one's tables are shared.
    machine.entry(0x82000, 5, 0x100000 | TABLE)
    for index, place in enumerate((0x100, 0x103, 0x101, 0x177)):
        machine.entry(0x12000, 8 * index, place * PAGE | TABLE)
        for slot in range(0, 512, 1 + 60 * index):
            machine.entry(place * PAGE, slot, (0x5000 + slot * PAGE) | LEAF)
    del machine.memory.pages[0x101]
    spaces = user(0x10000), kernel(0x80000)
    shown: dict[tuple[int, int], int] = {}

    def show(rows: RowArray, entries: Entries) -> None:
        assert (entries.kind == EntryClass.LEAF).all()
        for row, slot, value in zip(rows[entries.row], entries.slot, entries.value):
            shown[int(row), int(slot)] = int(value)

    whole = machine.walk(*spaces)
    later = machine.walk(*spaces, leaf_counts=False)
    unread = later.state.tolist(), later.counts.tolist()
    assert RowState.NOT_READ in later.state
    read_leaf_tables(machine.prog, later, visitor=show)
    for name in ("state", "first", "counts"):
        assert getattr(later, name).tolist() == getattr(whole, name).tolist()
    read = np.flatnonzero((whole.level == 0) & (whole.state == RowState.READ))
    assert len(shown) == whole.counts[read, EntryClass.LEAF].sum()
    for (row, slot), value in shown.items():
        here = int(whole.address[row]) + 8 * slot
        assert value == int.from_bytes(machine.memory.read(here, 8), "little")
    again = whole.unread()
    seen = whole.state[again.state == RowState.NOT_READ]
    assert (seen == RowState.READ).all()
    assert again.counts.tolist() == unread[1]


@pytest.mark.parametrize("mode", MODES[::3], ids=str)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_garbage_never_breaks_a_walk(mode: Mode, seed: int) -> None:
    """Entries at random places of good tables are overwritten with arbitrary numbers."""
    random = Random(seed)
    tree = build_tree(mode, random, tables=8, fill=6)
    targets = [table.address for table in tree.tables]
    for table in tree.tables:
        for _ in range(4):
            slot = random.randrange(mode.paging.levels[table.level].entries)
            value = random.choice(
                [random.getrandbits(64), random.choice(targets) | 0x67, random.choice(targets)]
            )
            tree.memory.write(table.address + 8 * slot, struct.pack("<Q", value))
    prog, _ = mode.program(tree.memory, tree.root.address)
    spaces = [Space(SpaceKind.USER, tree.root), Space(SpaceKind.KERNEL, tree.root)]
    tables = walk_spaces(prog, mode.paging, spaces)
    readable = tables.state == RowState.READ
    assert len(np.unique(tables.address[readable])) <= int(readable.sum())
    map_space(prog, mode.paging, spaces[0])
    for _ in range(20):
        walk_address(prog, mode.paging, tree.root, random.getrandbits(64))
    page_owners(prog, tables, random.getrandbits(52))
    table_owners(tables, random.choice(targets))
