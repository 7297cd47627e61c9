# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A census in numbers: tables by level, how full they are, and where they and their pages lie."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ptinspect.census import Census, Holder, distinct_tables
from ptinspect.kernel.paging import EntryClass
from ptinspect.records import HolderSummary, LevelSummary, NodePlacement, ReachedSummary
from ptinspect.tables.scan import MemmapScan
from ptinspect.tables.spaces import SpaceKind
from ptinspect.tables.walk import RowState


def reached_summary(
    census: Census,
    table_nodes: npt.NDArray[np.int64],
    mapped_nodes: npt.NDArray[np.uint16],
) -> ReachedSummary:
    """
    Sum up a census.

    :param table_nodes: int64, by row of the walk: the node that the table lies on.
    :param mapped_nodes: uint16, shape (rows, nodes): the pages that each table maps, by their node.
    """
    return ReachedSummary(
        spaces=len(census.tables.spaces),
        levels=tuple(_levels(census)),
        unreached=int(np.count_nonzero(census.holder != Holder.TREE)),
        holders=tuple(_holders(census)),
        placement=tuple(_placement(census, table_nodes, mapped_nodes)),
        missing=tuple(census_missing(census)),
    )


def census_missing(census: Census) -> list[str]:
    """Say what a census could not see, in sentences."""
    missing = [f"{note.source}: {note.message}" for note in census.spaces.notes]
    missing.extend(scan_missing(census.scan))
    state = census.tables.state
    for kind, text in (
        (RowState.UNREADABLE, "could not be read"),
        (RowState.OUTSIDE, "lie outside the target's memory"),
        (RowState.CYCLE, "are their own ancestors"),
    ):
        count = int(np.count_nonzero(state == kind))
        if count:
            missing.append(f"{count} tables {text}")
    missing.extend(census.holders_missing)
    return missing


def scan_missing(scan: MemmapScan) -> list[str]:
    """Say what a scan could not see, in sentences."""
    missing = []
    if scan.unreadable_pages:
        missing.append(
            f"{scan.unreadable_pages} struct pages could not be read: descriptors may be missing"
        )
    unknown = int(np.count_nonzero(~scan.order_known))
    if unknown:
        missing.append(f"the order of {unknown} descriptors is unknown, taken as 0")
    return missing


def _holders(census: Census) -> Iterator[HolderSummary]:
    """What holds the most first; the orphans last, also if there are none."""
    counts = {count.holder: count for count in census.holder_counts()}
    orphans = counts.pop(Holder.UNEXPLAINED, None)
    page_bytes = census.paging.page_bytes
    for count in sorted(counts.values(), key=lambda count: -count.descriptors):
        yield HolderSummary(
            count.holder.name.lower(), count.descriptors, count.pages, count.pages * page_bytes
        )
    descriptors, pages = (0, 0) if orphans is None else (orphans.descriptors, orphans.pages)
    name = Holder.UNEXPLAINED.name.lower()
    yield HolderSummary(name, descriptors, pages, pages * page_bytes)


def _levels(census: Census) -> Iterator[LevelSummary]:
    tables = census.tables
    kernel_spaces = np.array([space.kernel for space in tables.spaces], np.bool_)
    kernel = kernel_spaces[tables.space]
    guest_spaces = np.array([space.kind is SpaceKind.GMAP for space in tables.spaces], np.bool_)
    guest = guest_spaces[tables.space]
    distinct = distinct_tables(tables)
    used = tables.counts.sum(axis=1, dtype=np.int64) - tables.counts[:, EntryClass.NONE]
    counted = tables.counted
    empty = counted & (used == 0) & (tables.parent >= 0)
    for count in reversed(census.levels()):
        level = tables.paging.levels[count.level]
        here = distinct & (tables.level == count.level)
        here &= (kernel == count.kernel) & (guest == count.guest)
        empty_tables = int(np.count_nonzero(here & empty))
        yield LevelSummary(
            level=level.name,
            kernel=count.kernel,
            typed=count.typed,
            untyped=count.untyped,
            table_bytes=(count.typed + count.untyped) * level.table_bytes,
            used_entries=int(used[here & counted].sum()),
            all_entries=int(tables.counts[here & counted].sum(dtype=np.int64)),
            empty_tables=empty_tables,
            empty_bytes=empty_tables * level.table_bytes,
            guest=count.guest,
        )


def _placement(
    census: Census,
    table_nodes: npt.NDArray[np.int64],
    mapped_nodes: npt.NDArray[np.uint16],
) -> Iterator[NodePlacement]:
    if mapped_nodes.shape[1] < 2:
        return
    distinct = distinct_tables(census.tables)
    for table_node in np.unique(table_nodes[distinct]).tolist():
        rows = distinct & (table_nodes == table_node)
        totals = mapped_nodes[rows].sum(axis=0, dtype=np.int64)
        for page_node, entries in enumerate(totals.tolist()):
            if entries:
                yield NodePlacement(table_node, page_node, entries)
