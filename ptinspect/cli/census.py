# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The census as commands take it: with progress, with nodes, or only a scan and the reason why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from drgn import Program

from ptinspect.census import Census, take_census
from ptinspect.cli.output import ProgressLine
from ptinspect.errors import PtinspectError
from ptinspect.kernel.paging import paging_of
from ptinspect.reached import reached_summary
from ptinspect.records import ReachedSummary
from ptinspect.tables.placement import NodeCounter, node_map
from ptinspect.tables.scan import MemmapScan, scan_memmap


@dataclass(frozen=True)
class Survey:
    """All that a command knows of a target's page tables."""

    scan: MemmapScan
    #: ``None`` if no walk was wanted, or none was possible; then *problem* says why.
    census: Census | None
    #: uint16, shape (rows of the census, nodes).
    mapped_nodes: npt.NDArray[np.uint16] | None
    table_nodes: npt.NDArray[np.int64] | None
    problem: str | None

    def reached(self) -> ReachedSummary | None:
        """Sum up what the address spaces reach."""
        if self.census is None or self.table_nodes is None or self.mapped_nodes is None:
            return None
        return reached_summary(self.census, self.table_nodes, self.mapped_nodes)


def survey(prog: Program, *, walk: bool, leaf_counts: bool = True) -> Survey:
    """
    Scan the memory map and, if wanted, walk all address spaces.

    A target whose tables cannot be walked (an architecture or a paging mode that is not known)
    still has descriptors: they are scanned, and the reason is kept.

    :raises PtinspectError: if the memory map cannot be scanned
    """
    if not walk:
        return Survey(_scan(prog), None, None, None, None)
    progress = ProgressLine("Walking all address spaces")
    try:
        nodes = node_map(prog)
        counter = NodeCounter(paging_of(prog), nodes)
        census = take_census(prog, leaf_counts=leaf_counts, walk_progress=progress, visitor=counter)
    except PtinspectError as error:
        return Survey(_scan(prog), None, None, None, str(error))
    finally:
        progress.close()
    rows = len(census.tables)
    table_nodes = nodes.node_of(census.tables.address)
    return Survey(census.scan, census, counter.result(rows), table_nodes, None)


def tree_census(prog: Program) -> Census:
    """
    Take the census of a command that needs one, without the entries of the lowest level.

    :raises PtinspectError: if the tables cannot be walked, or the memory map cannot be scanned
    """
    progress = ProgressLine("Walking all address spaces")
    try:
        return take_census(prog, leaf_counts=False, walk_progress=progress)
    finally:
        progress.close()


def _scan(prog: Program) -> MemmapScan:
    progress = ProgressLine("Scanning the memory map")
    try:
        return scan_memmap(prog, progress)
    finally:
        progress.close()
