# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random tables of every paging mode: what was meant, what ptinspect reads, what drgn reads."""

from __future__ import annotations

from collections import Counter
from functools import cache
from random import Random

import numpy as np
import pytest
from drgn import Program
from synthetic_memory import MODES, Mode, Tree, build_tree, drgn_translation

from ptinspect.kernel.paging.model import EntryClass
from ptinspect.tables.lookup import Outcome, page_owners, table_owners, walk_address
from ptinspect.tables.ranges import map_space
from ptinspect.tables.spaces import Space, SpaceKind
from ptinspect.tables.walk import RowState, Tables, walk_spaces

OUTCOMES = {
    EntryClass.LEAF: Outcome.MAPPED,
    EntryClass.PROT_NONE: Outcome.PROT_NONE,
    EntryClass.SWAP: Outcome.NOT_PRESENT,
}

pytestmark = pytest.mark.parametrize("mode", MODES, ids=str)


@cache
def random_tree(mode: str, seed: int) -> Tree:
    """The tests only read a tree, so one of each kind is enough."""
    return build_tree(next(m for m in MODES if m.name == mode), Random(seed))


@pytest.fixture(params=range(3))
def tree(mode: Mode, request: pytest.FixtureRequest) -> Tree:
    return random_tree(mode.name, request.param)


def space_of(tree: Tree) -> Space:
    return Space(SpaceKind.USER, tree.root)


def walk(tree: Tree) -> tuple[Program, int, Tables]:
    prog, handle = tree.mode.program(tree.memory, tree.root.address)
    return prog, handle, walk_spaces(prog, tree.mode.paging, [space_of(tree)])


def addresses_to_try(tree: Tree, random: Random) -> list[int]:
    """First, last and random bytes of each mapping, and addresses that nothing maps."""
    result = []
    for mapping in tree.mappings:
        span = 1 << tree.mode.paging.levels[mapping.level].shift
        result += [mapping.va, mapping.va + span - 1, mapping.va + random.randrange(span)]
    shape = tree.mode.paging.levels[tree.root.level]
    size = shape.entries << shape.shift
    for _ in range(20):
        result.append(tree.mode.base + random.randrange(size))
    if tree.mode.paging.sign_extended:
        low = (1 << tree.mode.paging.va_bits) - 1
        half = 1 << (tree.mode.paging.va_bits - 1)
        result = [((a & low) ^ half) - half & ((1 << 64) - 1) for a in result]
    return result


def test_every_table_is_reached_once(tree: Tree) -> None:
    _, _, tables = walk(tree)
    entry_addresses = tables.entry_address
    found = sorted(
        (
            int(tables.level[row]),
            int(tables.va[row]),
            int(tables.address[row]),
            int(entry_addresses[row]) if tables.parent[row] >= 0 else -1,
        )
        for row in range(len(tables))
    )
    meant = sorted(
        (t.level, t.va, t.address, -1 if t.entry_address is None else t.entry_address)
        for t in tree.tables
    )
    assert found == meant
    assert set(tables.state.tolist()) == {RowState.READ}


def test_entries_are_counted_by_class(tree: Tree) -> None:
    _, _, tables = walk(tree)
    paging = tree.mode.paging
    for table in tree.tables:
        (row,) = np.flatnonzero(
            (tables.address == np.uint64(table.address)) & (tables.level == table.level)
        ).tolist()
        span = paging.levels[table.level].entries << paging.levels[table.level].shift
        inside = [
            m for m in tree.mappings if m.level == table.level and 0 <= m.va - table.va < span
        ]
        if table.entry_address is None:
            inside = [m for m in tree.mappings if m.level == table.level]
        meant = Counter(m.kind for m in inside)
        meant[EntryClass.TABLE] = sum(
            1
            for t in tree.tables
            if t.entry_address is not None
            and table.address <= t.entry_address < table.address + 8 * span
            and t.level == table.level - 1
            and (t.entry_address - table.address) // 8 < paging.levels[table.level].entries
        )
        for kind in EntryClass:
            if kind is not EntryClass.NONE:
                assert tables.counts[row, kind] == meant[kind], (table, kind)
        assert tables.counts[row].sum() == paging.levels[table.level].entries


def test_addresses_translate_as_meant_and_as_other_walkers_say(tree: Tree, mode: Mode) -> None:
    prog, handle, _ = walk(tree)
    for address in addresses_to_try(tree, Random(7)):
        meant = tree.translate(address)
        found = walk_address(prog, mode.paging, tree.root, address)
        if meant is None:
            assert found.outcome is Outcome.NOT_MAPPED, hex(address)
        else:
            span = 1 << mode.paging.levels[meant.level].shift
            assert found.outcome is OUTCOMES[meant.kind], hex(address)
            if meant.physical is None:
                assert found.physical is None
            else:
                assert found.physical == meant.physical + (address - meant.va)
                assert found.mapped_bytes == span
        if found.outcome is Outcome.PROT_NONE:
            # drgn does not follow PROT_NONE entries as the kernel does (its issue 370).
            continue
        expected = found.physical if found.outcome is Outcome.MAPPED else None
        if mode.reference is not None:
            assert mode.reference(tree.memory, tree.root.address, address) == expected
        elif mode.drgn_root is not None:
            assert drgn_translation(prog, handle, address) == expected, hex(address)


def test_ranges_cover_every_mapping_and_nothing_else(tree: Tree, mode: Mode) -> None:
    prog, _, _ = walk(tree)
    space_map = map_space(prog, mode.paging, space_of(tree))
    assert not space_map.unseen
    covered = 0
    for mapping in tree.mappings:
        span = 1 << mode.paging.levels[mapping.level].shift
        (hit,) = [r for r in space_map.ranges if r.start <= mapping.va < r.end]
        assert hit.kind is mapping.kind
        assert hit.level == mapping.level
        assert mapping.va + span <= hit.end
        covered += span
    assert sum(r.end - r.start for r in space_map.ranges) == covered
    starts = [r.start for r in space_map.ranges]
    assert starts == sorted(starts)


def test_owners_lead_back_to_the_address(tree: Tree, mode: Mode) -> None:
    prog, _, tables = walk(tree)
    for mapping in tree.mappings[:12]:
        if mapping.physical is None:
            continue
        span = 1 << mode.paging.levels[mapping.level].shift
        inside = mapping.physical + span // 2
        seen = [o for o in page_owners(prog, tables, inside) if o.level == mapping.level]
        assert (mapping.va + span // 2, mapping.kind) in [(o.va, o.kind) for o in seen]
    for table in tree.tables:
        owners = table_owners(tables, table.address + 8)
        assert (table.level, table.va, table.entry_address) in [
            (o.level, o.va, o.entry_address) for o in owners
        ]
