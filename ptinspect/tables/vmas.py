# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The memory areas of an mm, as arrays.

Since 763ecb035029 ("mm: remove the vma linked list", v6.1) an mm keeps its areas in a maple tree
(lib/maple_tree.c, include/linux/maple_tree.h). The tree may be damaged or change while it is read,
so it is followed with a bound: each node once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Object, Program, Type, offsetof, sizeof
from drgn.helpers.linux.mm import for_each_vma

from ptinspect.errors import IncompleteError
from ptinspect.kernel.descriptor import byte_order
from ptinspect.memory import AddressArray, read_blocks

#: More areas than an mm can have (sysctl vm.max_map_count is 65530, at most 2^31 in theory).
AREA_LIMIT = 1 << 20

#: enum maple_type
_LEAF, _RANGE, _ARANGE = 1, 2, 3
_TYPE_SHIFT, _TYPE_MASK = 3, 15
_NODE_MASK = 255
#: A root or slot that is a node, as an xarray would mark it.
_NODE_TAG, _TAG_MASK, _LOWEST_NODE = 2, 3, 4096

# include/linux/mm.h: the same in all kernels that are supported.
VM_MAYSHARE = 0x80
VM_PFNMAP = 0x400
VM_HUGETLB = 0x400000
VM_MIXEDMAP = 0x10000000


@dataclass(frozen=True)
class Areas:
    """The areas of one mm, in order of address; arrays of the same length."""

    #: uint64, addresses of ``struct vm_area_struct``.
    objects: AddressArray
    #: uint64, first address and the address behind the last.
    starts: AddressArray
    ends: AddressArray
    #: uint64, ``vm_flags``.
    flags: npt.NDArray[np.uint64]
    #: uint64, ``vm_file`` (0 for anonymous memory) and ``vm_pgoff``.
    files: AddressArray
    offsets: npt.NDArray[np.uint64]

    def index_of(self, addresses: AddressArray) -> npt.NDArray[np.intp]:
        """Get the area that contains each address, or -1."""
        if not len(self.starts):
            return np.full(len(addresses), -1, np.intp)
        place = np.searchsorted(self.ends, addresses, side="right")
        inside = place < len(self.ends)
        inside &= self.starts[np.minimum(place, len(self.ends) - 1)] <= addresses
        return np.where(inside, place, -1)

    def touch(self, starts: AddressArray, ends: AddressArray) -> npt.NDArray[np.bool_]:
        """Tell which ranges have at least one address in common with an area."""
        if not len(self.starts):
            return np.zeros(len(starts), np.bool_)
        place = np.searchsorted(self.ends, starts, side="right")
        within = np.minimum(place, len(self.ends) - 1)
        touched: npt.NDArray[np.bool_] = (place < len(self.ends)) & (self.starts[within] < ends)
        return touched


def read_areas(prog: Program, mm: Object) -> Areas:
    """
    Read the areas of an mm.

    :param mm: ``struct mm_struct *``
    :raises FaultError: if the tree or an area cannot be read
    :raises IncompleteError: if they make no sense
    """
    if prog.type("struct mm_struct").has_member("mm_mt"):
        found = _entries(prog, int(mm.mm_mt.ma_root.value_()))
    else:
        # A list without back links that are needed here, up to 6.0.
        found = (int(vma.value_()) for vma in islice(for_each_vma(mm), AREA_LIMIT))
    objects = np.array(list(found), np.uint64)
    type_ = prog.type("struct vm_area_struct")
    blocks = read_blocks(prog, objects, sizeof(type_), physical=False)
    if not blocks.readable.all():
        raise IncompleteError(f"{np.count_nonzero(~blocks.readable)} areas cannot be read")

    def column(name: str) -> npt.NDArray[np.uint64]:
        offset = offsetof(type_, name)
        word = np.ascontiguousarray(blocks.data[:, offset : offset + 8])
        return word.view(f"{byte_order(prog)}u8").reshape(-1).astype(np.uint64)

    areas = Areas(
        objects,
        column("vm_start"),
        column("vm_end"),
        column("vm_flags"),
        column("vm_file"),
        column("vm_pgoff"),
    )
    if (areas.starts >= areas.ends).any() or (areas.starts[1:] < areas.ends[:-1]).any():
        raise IncompleteError("the areas overlap or are out of order")
    return areas


@dataclass(frozen=True)
class _Shape:
    """A kind of maple node: where its pivots and slots are."""

    pivots: int
    pivot_count: int
    slots: int
    slot_count: int


def _shape(node: Type, member: str) -> _Shape:
    inner = node.member(member)
    pivot, slot = inner.type.member("pivot"), inner.type.member("slot")
    assert pivot.type.length is not None
    assert slot.type.length is not None
    return _Shape(
        inner.offset + pivot.offset,
        pivot.type.length,
        inner.offset + slot.offset,
        slot.type.length,
    )


def _entries(prog: Program, root: int) -> Iterator[int]:
    """Get the entries of a maple tree in order, each node read once."""
    if root & _TAG_MASK != _NODE_TAG or root <= _LOWEST_NODE:
        if root:
            yield root
        return
    type_ = prog.type("struct maple_node")
    size = sizeof(type_)
    ranges, gaps = _shape(type_, "mr64"), _shape(type_, "ma64")
    order = byte_order(prog)
    words = struct.Struct(f"{order}{size // 8}Q")
    seen: set[int] = set()
    found = 0
    #: (node, the last index that it covers), the next one at the end.
    stack = [(root, (1 << 64) - 1)]
    while stack:
        node, last = stack.pop()
        address, kind = node & ~_NODE_MASK, node >> _TYPE_SHIFT & _TYPE_MASK
        if address in seen or kind not in (_LEAF, _RANGE, _ARANGE):
            raise IncompleteError(f"the tree of memory areas is damaged at {node:#x}")
        seen.add(address)
        data = words.unpack(prog.read(address, size))
        shape = gaps if kind == _ARANGE else ranges
        below: list[tuple[int, int]] = []
        for number in range(shape.slot_count):
            pivot = data[shape.pivots // 8 + number] if number < shape.pivot_count else 0
            end = min(pivot, last) if pivot else last
            slot = data[shape.slots // 8 + number]
            if kind != _LEAF:
                below.append((slot, end))
            elif slot & _TAG_MASK == 0 and slot:
                yield slot
                found += 1
            if end >= last:
                break
        if found > AREA_LIMIT or len(seen) > AREA_LIMIT:
            raise IncompleteError("the tree of memory areas has no end")
        stack.extend(reversed(below))


def try_areas(prog: Program, mm: Object) -> tuple[Areas | None, str]:
    """Read the areas of an mm; what is wrong instead, if they cannot be read."""
    try:
        return read_areas(prog, mm), ""
    except (FaultError, IncompleteError) as error:
        return None, str(error)
