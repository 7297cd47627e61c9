# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""On which NUMA nodes the pages lie that each table maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from drgn import Program, sizeof

from ptinspect.kernel.descriptor import ptdesc_dtype
from ptinspect.kernel.paging import EntryClass, Paging
from ptinspect.memory import AddressArray, read_blocks
from ptinspect.tables.entries import Entries
from ptinspect.tables.nodes import page_nodes
from ptinspect.tables.scan import PageRange, memmap_ranges
from ptinspect.tables.walk import RowArray

#: Every node has at least this much memory in one piece (x86's NODE_MIN_SIZE is 4 MiB).
_SAMPLE_BYTES = 4 << 20

#: Node of what is not memory.
NO_NODE = -1


@dataclass(frozen=True)
class NodeMap:
    """Physical memory by node: pieces without overlap, in order of address."""

    #: uint64, first byte of each piece.
    begins: AddressArray
    #: uint64, the byte behind it.
    ends: AddressArray
    #: int64.
    nodes: npt.NDArray[np.int64]

    @property
    def count(self) -> int:
        """One more than the highest node number."""
        return int(self.nodes.max()) + 1 if len(self.nodes) else 1

    def node_of(self, addresses: AddressArray) -> npt.NDArray[np.int64]:
        """Get the node of physical addresses, or :data:`NO_NODE`."""
        if not len(self.begins):
            return np.full(len(addresses), NO_NODE, np.int64)
        place = np.searchsorted(self.begins, addresses, side="right") - 1
        piece = np.maximum(place, 0)
        inside = (place >= 0) & (addresses < self.ends[piece])
        return np.where(inside, self.nodes[piece], np.int64(NO_NODE))


def node_map(prog: Program) -> NodeMap:
    """
    Learn from the memory map which memory belongs to which node.

    Looks at one struct page every few megabytes, and searches the borders in between.

    :raises PtinspectError: see :func:`~ptinspect.tables.scan.memmap_ranges`
    """
    page = 1 << prog["PAGE_SHIFT"].value_()
    pieces: list[tuple[int, int, int]] = []
    for pages in memmap_ranges(prog):
        pieces.extend(_pieces(prog, pages, max(1, _SAMPLE_BYTES // page)))
    return NodeMap(
        np.array([begin * page for begin, _, _ in pieces], np.uint64),
        np.array([end * page for _, end, _ in pieces], np.uint64),
        np.array([node for _, _, node in pieces], np.int64),
    )


def _pieces(prog: Program, pages: PageRange, step: int) -> list[tuple[int, int, int]]:
    """Cut a range of pages where the node changes: first page, page behind the last, node."""
    samples = np.unique(
        np.append(np.arange(pages.start_pfn, pages.end_pfn, step), pages.end_pfn - 1)
    ).astype(np.uint64)
    nodes = _nodes_of(prog, pages, samples)
    pieces = []
    begin = pages.start_pfn
    for n in np.flatnonzero(nodes[1:] != nodes[:-1]).tolist():
        low, high = int(samples[n]), int(samples[n + 1])
        while high - low > 1:
            middle = (low + high) // 2
            here = _nodes_of(prog, pages, np.array([middle], np.uint64))[0]
            low, high = (middle, high) if here == nodes[n] else (low, middle)
        pieces.append((begin, high, int(nodes[n])))
        begin = high
    return [*pieces, (begin, pages.end_pfn, int(nodes[-1]))]


def _nodes_of(
    prog: Program, pages: PageRange, pfns: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    dtype = ptdesc_dtype(prog)
    size = np.uint64(sizeof(prog.type("struct page")))
    addresses = np.uint64(pages.memmap) + (pfns - np.uint64(pages.start_pfn)) * size
    blocks = read_blocks(prog, addresses, dtype.itemsize, physical=False)
    flags = blocks.data.view(dtype).reshape(-1)["pt_flags"].astype(np.uint64)
    return np.where(blocks.readable, page_nodes(prog, flags), np.int64(NO_NODE))


class NodeCounter:
    """
    A visitor for :func:`~ptinspect.tables.walk.walk_spaces` that counts mapped pages by node.
    """

    def __init__(self, paging: Paging, nodes: NodeMap) -> None:
        self._paging = paging
        self._nodes = nodes
        self._rows: list[RowArray] = []
        self._counts: list[npt.NDArray[np.uint16]] = []

    def __call__(self, rows: RowArray, entries: Entries) -> None:
        """Count the pages that some tables of the lowest level map."""
        leaf = entries.kind == EntryClass.LEAF
        row, slot = entries.row[leaf], entries.slot[leaf]
        targets = self._paging.leaf_targets(entries.value[leaf], 0, slot)
        node = self._nodes.node_of(targets)
        known = node >= 0
        width = self._nodes.count
        counts = np.bincount(row[known] * width + node[known], minlength=len(rows) * width)
        self._rows.append(rows)
        self._counts.append(counts.reshape(len(rows), width).astype(np.uint16))

    def result(self, rows: int) -> npt.NDArray[np.uint16]:
        """
        Get the pages by node that each table maps.

        :param rows: Number of rows of the walk.
        :return: uint16, shape (rows, nodes); zeros for tables that were not read themselves.
        """
        result = np.zeros((rows, self._nodes.count), np.uint16)
        for where, counts in zip(self._rows, self._counts):
            result[where] = counts
        return result
