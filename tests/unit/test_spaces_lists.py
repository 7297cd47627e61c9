# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lists of the kernel: whole ones, and every way in which one breaks."""

from __future__ import annotations

import struct
from random import Random

import pytest
from drgn import Architecture, Platform, Program
from hypothesis import given
from hypothesis import strategies as st
from synthetic_memory import BIG, DIRECT_MAP, LITTLE, PAGE, SparseMemory

from ptinspect.lists import BreakReason, walk_both_ways, walk_list_at

HEAD = DIRECT_MAP + 0x1000


class Lists:
    def __init__(self, big: bool = False) -> None:
        self.memory = SparseMemory()
        self.format = ">QQ" if big else "<QQ"
        architecture = Architecture.S390X if big else Architecture.X86_64
        self.prog = Program(Platform(architecture, BIG if big else LITTLE))
        self.memory.attach(self.prog)

    def node(self, address: int, next_: int, prev: int) -> None:
        self.memory.add(address - DIRECT_MAP, 16)
        self.memory.write(address - DIRECT_MAP, struct.pack(self.format, next_, prev))

    def ring(self, addresses: list[int]) -> None:
        ring = [HEAD, *addresses]
        for n, address in enumerate(ring):
            self.node(address, ring[(n + 1) % len(ring)], ring[n - 1])


@given(st.sets(st.integers(2, 500), max_size=40), st.booleans(), st.randoms())
def test_whole_list(places: set[int], big: bool, random: Random) -> None:
    lists = Lists(big)
    addresses = [DIRECT_MAP + 0x1000 * place for place in places]
    random.shuffle(addresses)
    lists.ring(addresses)
    walk = walk_list_at(lists.prog, HEAD)
    assert walk.nodes == tuple(addresses)
    assert walk.broken is None


NODES = [DIRECT_MAP + 0x1000 * n for n in (2, 3, 4)]


@pytest.mark.parametrize(
    ("node", "links", "reason", "seen"),
    [
        (NODES[1], (0, NODES[0]), BreakReason.NULL, 2),
        (NODES[1], (0xDEAD000000000100, NODES[0]), BreakReason.POISON, 2),
        (NODES[1], (0x5DEADBEEF0000100, NODES[0]), BreakReason.POISON, 2),
        (NODES[1], (NODES[2], NODES[2]), BreakReason.BACK_LINK, 1),
        (NODES[1], (NODES[0], NODES[0]), BreakReason.BACK_LINK, 2),
        (NODES[1], (DIRECT_MAP + 0x99000, NODES[0]), BreakReason.UNREADABLE, 2),
        (HEAD, (0, 0), BreakReason.NULL, 0),
        (HEAD, (NODES[0], NODES[0]), BreakReason.BACK_LINK, 3),
    ],
)
def test_broken_list(node: int, links: tuple[int, int], reason: BreakReason, seen: int) -> None:
    lists = Lists()
    lists.ring(NODES)
    lists.node(node, *links)
    walk = walk_list_at(lists.prog, HEAD)
    assert walk.broken is not None
    assert walk.broken.reason is reason
    assert walk.nodes == tuple(NODES[:seen])
    assert walk.broken.node == (NODES[seen - 1] if seen else HEAD)
    assert hex(walk.broken.node) in str(walk.broken)


def test_cycle_without_back_links() -> None:
    lists = Lists()
    lists.ring(NODES)
    lists.node(NODES[2], NODES[1], NODES[1])
    walk = walk_list_at(lists.prog, HEAD, back_links=False)
    assert walk.broken is not None
    assert walk.broken.reason is BreakReason.CYCLE
    assert walk.nodes == tuple(NODES)


def test_limit() -> None:
    lists = Lists()
    lists.ring(NODES)
    walk = walk_list_at(lists.prog, HEAD, limit=2)
    assert walk.broken is not None
    assert walk.broken.reason is BreakReason.LIMIT
    assert walk.nodes == tuple(NODES[:2])
    assert walk_list_at(lists.prog, HEAD, limit=3).broken is None


def test_head_that_cannot_be_read() -> None:
    lists = Lists()
    walk = walk_list_at(lists.prog, HEAD)
    assert walk.broken is not None
    assert walk.broken.reason is BreakReason.UNREADABLE
    assert walk_both_ways(lists.prog, HEAD).lost


def test_nodes_may_straddle_pages() -> None:
    lists = Lists()
    addresses = [DIRECT_MAP + 0x5000 - 8, DIRECT_MAP + 7 * PAGE - 8]
    lists.ring(addresses)
    assert walk_list_at(lists.prog, HEAD).nodes == tuple(addresses)


@pytest.mark.parametrize(
    ("wrong", "lost"),
    [
        ([], False),
        ([(NODES[0], 0, HEAD)], False),
        ([(NODES[1], 0xDEAD000000000100, NODES[0])], False),
        ([(NODES[1], NODES[2], 0xDEAD000000000122)], False),
        ([(HEAD, 0, NODES[2])], False),
        ([(HEAD, NODES[0], 0)], False),
        # Both links of a node; a link onward, and one back elsewhere.
        ([(NODES[1], 0, 0)], True),
        ([(NODES[0], 0, HEAD), (NODES[2], HEAD, 0)], True),
    ],
)
def test_both_ways(wrong: list[tuple[int, int, int]], lost: bool) -> None:
    lists = Lists()
    lists.ring(NODES)
    for links in wrong:
        lists.node(*links)
    walk = walk_both_ways(lists.prog, HEAD)
    assert bool(walk.breaks) is bool(wrong)
    assert walk.lost is lost
    assert walk.nodes == ((NODES[0], NODES[2]) if lost else tuple(NODES))


def test_a_node_that_cannot_be_read_may_hide_others() -> None:
    lists = Lists()
    gone = DIRECT_MAP + 0x99000
    lists.ring(NODES)
    lists.node(NODES[0], gone, HEAD)
    lists.node(NODES[1], NODES[2], gone)
    walk = walk_both_ways(lists.prog, HEAD)
    assert walk.lost
    assert walk.nodes == tuple(NODES)
