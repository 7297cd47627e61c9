# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
One way to walk a kernel's doubly linked lists: bounded, cycle-safe, every link checked.

A list is data that may be wrong, and on a live target it changes underfoot. The walk keeps what it
saw up to the break, and says where and how the list breaks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

from drgn import FaultError, Object, PlatformFlags, Program

#: More nodes than any list of page tables or tasks has.
LIST_LIMIT = 1 << 24

#: LIST_POISON1 and LIST_POISON2 without the architecture's offset, which is far above both.
_POISONS = (0x100, 0x122)
_POISON_OFFSETS = (0, 0xDEAD000000000000, 0x5DEADBEEF0000000)
_POISONED = frozenset(offset + poison for offset in _POISON_OFFSETS for poison in _POISONS)


class BreakReason(Enum):
    """How a list is broken."""

    UNREADABLE = "the next node cannot be read"
    NULL = "the link is NULL"
    POISON = "the link is a list poison: the node was deleted"
    BACK_LINK = "the next node does not point back"
    CYCLE = "the list comes back to a node other than its head"
    LIMIT = "the list is longer than the limit"


@dataclass(frozen=True)
class ListBreak:
    """Where a list breaks."""

    reason: BreakReason
    #: Address of the last good node (or the head).
    node: int
    #: What its link onward says: ``next``.
    next: int
    #: What that node's link back says, if it could be read: ``prev``.
    prev: int | None = None
    #: The list was followed by ``prev``, so that the link back is ``next``.
    backward: bool = False

    def __str__(self) -> str:
        onward, back = ("prev", "next") if self.backward else ("next", "prev")
        text = f"{self.reason.value}: node {self.node:#x}, {onward} {self.next:#x}"
        return text if self.prev is None else f"{text}, its {back} {self.prev:#x}"


@dataclass(frozen=True)
class ListWalk:
    """The nodes of a list up to its end or its break."""

    #: Address of the head.
    head: int
    #: Addresses of the embedded ``struct list_head``, in order, without the head.
    nodes: tuple[int, ...]
    #: ``None`` if the list is whole.
    broken: ListBreak | None


@dataclass(frozen=True)
class BothWays:
    """The nodes of a list walked from its head, and where that breaks also from its end."""

    #: Addresses of the embedded ``struct list_head``, in order: up to a break, then from the end.
    nodes: tuple[int, ...]
    #: How many of them are on the near side of the break: all if the list is whole.
    before_break: int
    #: Where it breaks, walked forward and backward; empty if it is whole.
    breaks: tuple[ListBreak, ...]
    #: Whether nodes may be lost between two breaks. One wrong link alone loses none.
    lost: bool


def walk_list(head: Object, *, limit: int = LIST_LIMIT, back_links: bool = True) -> ListWalk:
    """
    Walk a list from its head.

    :param head: ``struct list_head *``
    :param limit: Nodes after which the list counts as broken.
    :param back_links: Whether ``prev`` must point back; not so for RCU-protected lists, whose
        deleted nodes keep their ``next`` while ``prev`` is poisoned.
    :return: The nodes in order, and where and why the walk ended early, if it did.
    """
    return walk_list_at(head.prog_, head.value_(), limit=limit, back_links=back_links)


def walk_list_at(
    prog: Program,
    head: int,
    *,
    limit: int = LIST_LIMIT,
    back_links: bool = True,
    backward: bool = False,
) -> ListWalk:
    """
    Walk a list from the address of its head; see :func:`walk_list`.

    :param backward: Follow ``prev`` and check ``next``: what lies behind a break is found so.
    """
    links = _link_format(prog)
    nodes: list[int] = []
    seen = {head}
    here = head
    try:
        following = links.unpack(prog.read(head, links.size))[int(backward)]
    except FaultError:
        return ListWalk(head, (), ListBreak(BreakReason.UNREADABLE, head, head))
    while True:
        problem, after, prev = _step(prog, links, following, backward)
        if problem is None and back_links and prev != here:
            problem = BreakReason.BACK_LINK
        if problem is None and following != head and following in seen:
            problem = BreakReason.CYCLE
        if problem is None and following != head and len(nodes) >= limit:
            problem = BreakReason.LIMIT
        if problem is not None:
            where = ListBreak(problem, here, following, prev, backward)
            return ListWalk(head, tuple(nodes), where)
        if following == head:
            return ListWalk(head, tuple(nodes), None)
        nodes.append(following)
        seen.add(following)
        here, following = following, after


def walk_both_ways(prog: Program, head: int) -> BothWays:
    """Walk a list from the address of its head, and what lies behind a break from the end."""
    forward = walk_list_at(prog, head)
    if forward.broken is None:
        return BothWays(forward.nodes, len(forward.nodes), (), False)
    known = {head, *forward.nodes}
    backward = walk_list_at(prog, head, backward=True)
    rest = tuple(node for node in reversed(backward.nodes) if node not in known)
    breaks, lost = [forward.broken], False
    if backward.broken is not None:
        breaks.append(backward.broken)
        # Of the two links between neighbours one is wrong, and the other tells that they are.
        met = backward.broken.next == forward.broken.node
        met |= backward.broken.node == forward.broken.next
        # A head that is missing from the target tells nothing.
        lost = not met or forward.broken.node == forward.broken.next
    return BothWays((*forward.nodes, *rest), len(forward.nodes), tuple(breaks), lost)


def _step(
    prog: Program, links: struct.Struct, node: int, backward: bool
) -> tuple[BreakReason | None, int, int | None]:
    """Read a node: a problem with it if any, its link onward, its link back."""
    if not node:
        return BreakReason.NULL, 0, None
    if node in _POISONED:
        return BreakReason.POISON, 0, None
    try:
        after, prev = links.unpack(prog.read(node, links.size))
    except FaultError:
        return BreakReason.UNREADABLE, 0, None
    return (None, prev, after) if backward else (None, after, prev)


def _link_format(prog: Program) -> struct.Struct:
    platform = prog.platform
    assert platform is not None
    little = bool(platform.flags & PlatformFlags.IS_LITTLE_ENDIAN)
    return struct.Struct("<QQ" if little else ">QQ")
