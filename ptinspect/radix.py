# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
One way to read a kernel's radix tree (an xarray, include/linux/xarray.h): bounded, each node once.

Like a list, a tree is data that may be wrong: a node must cover less than the one above it, and
what breaks is told beside what could be read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from drgn import FaultError, Program, offsetof, sizeof

from ptinspect.kernel.descriptor import byte_order

#: More nodes than any tree of guest memory has.
NODE_LIMIT = 1 << 20

#: The low bits of a slot that holds a node (xa_is_node()); such slots are larger than this.
_INTERNAL_MASK, _INTERNAL, _LEAST_NODE = 3, 2, 4096


@dataclass(frozen=True)
class RadixWalk:
    """The entries of a tree, as far as it could be read."""

    #: Index to the word that is stored there, in order of the index.
    entries: dict[int, int]
    #: What is wrong with the tree, in words; empty if it is whole.
    broken: tuple[str, ...] = ()


class _Layout(NamedTuple):
    bytes: int
    shift: int
    slots: int
    number: int
    word: struct.Struct


def walk_radix(prog: Program, root: int) -> RadixWalk:
    """
    Read a tree.

    :param root: Address of the ``struct radix_tree_root`` (``struct xarray``).
    """
    head = root + offsetof(prog.type("struct xarray"), "xa_head")
    layout = _layout(prog)
    entries: dict[int, int] = {}
    broken: list[str] = []
    try:
        word = int(layout.word.unpack(prog.read(head, 8))[0])
    except FaultError:
        return RadixWalk({}, (f"the root at {root:#x} cannot be read",))
    if not word:
        return RadixWalk({})
    if not _is_node(word):
        return RadixWalk({0: word})
    #: Nodes to read: address, index of the first slot, the shift that it must stay below.
    pending = [(word - _INTERNAL, 0, 64)]
    seen = 0
    bits = layout.number.bit_length() - 1
    while pending:
        node, base, below = pending.pop()
        seen += 1
        if seen > NODE_LIMIT:
            broken.append(f"more than {NODE_LIMIT} nodes")
            break
        try:
            data = prog.read(node, layout.bytes)
        except FaultError:
            broken.append(f"node {node:#x} cannot be read")
            continue
        shift = data[layout.shift]
        if shift >= below or shift % bits:
            broken.append(f"node {node:#x} has shift {shift}, but has to cover less than {below}")
            continue
        for slot in range(layout.number):
            word = int(layout.word.unpack_from(data, layout.slots + 8 * slot)[0])
            index = base + (slot << shift)
            if not word:
                continue
            if not _is_node(word):
                if shift:
                    broken.append(f"node {node:#x} of shift {shift} has an entry in slot {slot}")
                entries[index] = word
            elif shift:
                pending.append((word - _INTERNAL, index, shift))
            else:
                broken.append(f"the lowest node {node:#x} has a node in slot {slot}")
    return RadixWalk(dict(sorted(entries.items())), tuple(broken))


def _is_node(word: int) -> bool:
    return word & _INTERNAL_MASK == _INTERNAL and word > _LEAST_NODE


def _layout(prog: Program) -> _Layout:
    node = prog.type("struct xa_node")
    slots = node.member("slots").type
    assert slots.length is not None
    return _Layout(
        sizeof(node),
        offsetof(node, "shift"),
        offsetof(node, "slots"),
        slots.length,
        struct.Struct(f"{byte_order(prog)}Q"),
    )
