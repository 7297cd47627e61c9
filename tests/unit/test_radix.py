# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Radix trees that are whole, and trees that a walk must survive."""

from __future__ import annotations

import random
import struct

import pytest
from drgn import Architecture, Platform, PlatformFlags, Program, Type, TypeKind, TypeKindSet
from drgn import TypeMember as Member

from ptinspect import radix
from ptinspect.radix import walk_radix

BASE = 0x10000
ROOT = BASE + 0x8
SLOTS = 16
#: shift, offset, padding, then the slots.
NODE_BYTES = 8 + 8 * SLOTS


class Kernel:
    """A kernel with nothing but a tree."""

    def __init__(self) -> None:
        flags = PlatformFlags.IS_64_BIT | PlatformFlags.IS_LITTLE_ENDIAN
        self.prog = Program(Platform(Architecture.X86_64, flags))
        self.memory = bytearray(1 << 20)
        self.used = 0x1000
        prog = self.prog

        def read(address: int, count: int, offset: int, physical: bool) -> bytes:
            return bytes(self.memory[offset : offset + count])

        prog.add_memory_segment(BASE, len(self.memory), read)
        byte = prog.int_type("unsigned char", 1, False)
        word = prog.int_type("unsigned long", 8, False)
        slots = prog.array_type(word, SLOTS)
        types = {
            "xarray": prog.struct_type("xarray", 16, [Member(word, "xa_head", 64)]),
            "xa_node": prog.struct_type(
                "xa_node", NODE_BYTES, [Member(byte, "shift", 0), Member(slots, "slots", 64)]
            ),
        }

        def find(prog: Program, kinds: TypeKindSet, name: str, file: str | None) -> Type | None:
            return types.get(name) if TypeKind.STRUCT in kinds else None

        prog.register_type_finder("radix", find, enable_index=0)

    def put(self, address: int, word: int) -> None:
        struct.pack_into("<Q", self.memory, address - BASE, word)

    def head(self, word: int) -> None:
        self.put(ROOT + 8, word)

    def node(self, shift: int, slots: dict[int, int]) -> int:
        """Make a node; get the word that points to it."""
        address = BASE + self.used
        self.used += NODE_BYTES
        self.memory[address - BASE] = shift
        for slot, word in slots.items():
            self.put(address + 8 + 8 * slot, word)
        return address | 2

    def tree(self, entries: dict[int, int], shift: int, base: int = 0) -> int:
        slots = {}
        for slot in range(SLOTS):
            first = base + (slot << shift)
            within = {i: e for i, e in entries.items() if first <= i < first + (1 << shift)}
            if within:
                slots[slot] = self.tree(within, shift - 4, first) if shift else within[first]
        return self.node(shift, slots)


@pytest.mark.parametrize("seed", range(10))
def test_whole_trees(seed: int) -> None:
    chance = random.Random(seed)
    entries = {chance.randrange(1 << 16): 4 * chance.randrange(1, 1 << 60) for _ in range(50)}
    kernel = Kernel()
    kernel.head(kernel.tree(entries, 12))
    walk = walk_radix(kernel.prog, ROOT)
    assert walk.entries == entries
    assert list(walk.entries) == sorted(entries)
    assert walk.broken == ()


def test_a_tree_of_one_entry_and_an_empty_one() -> None:
    kernel = Kernel()
    assert walk_radix(kernel.prog, ROOT).entries == {}
    kernel.head(0x4000)
    assert walk_radix(kernel.prog, ROOT).entries == {0: 0x4000}


def test_broken_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    leaf = kernel.node(0, {3: 0x8000})
    kernel.head(kernel.node(4, {0: leaf, 1: 0x77777777770002}))
    walk = walk_radix(kernel.prog, ROOT)
    assert walk.entries == {3: 0x8000}
    assert walk.broken == ("node 0x77777777770000 cannot be read",)
    # A node that is its own child covers as much as itself.
    kernel.head(cycle := kernel.node(4, {0: leaf}))
    kernel.put((cycle & ~3) + 8 + 8 * 5, cycle)
    walk = walk_radix(kernel.prog, ROOT)
    assert walk.entries == {3: 0x8000}
    assert len(walk.broken) == 1
    assert "has to cover less than 4" in walk.broken[0]
    # An entry above the lowest level, a node below it, a shift that no node has.
    kernel.head(kernel.node(4, {0: leaf, 2: 0x9000}))
    assert walk_radix(kernel.prog, ROOT).entries == {3: 0x8000, 32: 0x9000}
    assert "of shift 4 has an entry" in walk_radix(kernel.prog, ROOT).broken[0]
    kernel.head(kernel.node(0, {0: leaf}))
    assert "has a node in slot 0" in walk_radix(kernel.prog, ROOT).broken[0]
    kernel.head(kernel.node(3, {0: leaf}))
    assert "has shift 3" in walk_radix(kernel.prog, ROOT).broken[0]
    assert "cannot be read" in walk_radix(kernel.prog, 8).broken[0]
    monkeypatch.setattr(radix, "NODE_LIMIT", 1)
    kernel.head(kernel.node(4, {0: leaf, 1: leaf}))
    assert walk_radix(kernel.prog, ROOT).broken == ("more than 1 nodes",)
