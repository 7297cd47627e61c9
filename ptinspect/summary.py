# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Page-table memory of one target: what is typed, and whether the kernel counted the same."""

from __future__ import annotations

import numpy as np
from drgn import FaultError, Program

from ptinspect.errors import TargetError
from ptinspect.records import CounterReading, Summary, TypedCount
from ptinspect.tables.counters import read_nr_pagetable
from ptinspect.tables.nodes import page_nodes
from ptinspect.tables.scan import MemmapScan, counted_pages


def summarise(prog: Program, scan: MemmapScan) -> Summary:
    """
    Add up a scan by node and order, beside the kernel's own counter.

    :param prog: The kernel.
    :param scan: What :func:`scan_memmap` found in it.
    :return: The counts; where NR_PAGETABLE cannot be read, the reason in its place.
    """
    counter: CounterReading | None = None
    problem = None
    try:
        counter = read_nr_pagetable(prog)
    except FaultError as error:
        problem = f"NR_PAGETABLE cannot be read: {error}"
    except (LookupError, TargetError) as error:
        problem = str(error)
    return Summary(
        page_bytes=int(prog["PAGE_SIZE"].value_()),
        scanned_pages=scan.scanned_pages,
        unreadable_pages=scan.unreadable_pages,
        unknown_orders=int(np.count_nonzero(~scan.order_known)),
        typed=_typed_counts(prog, scan),
        counter=counter,
        counter_problem=problem,
    )


def _typed_counts(prog: Program, scan: MemmapScan) -> tuple[TypedCount, ...]:
    nodes = page_nodes(prog, scan.descriptors["pt_flags"])
    weights = counted_pages(prog, scan)
    groups, members = np.unique(
        np.stack([nodes, scan.orders.astype(np.int64)], axis=1), axis=0, return_inverse=True
    )
    members = members.reshape(-1)
    counts = np.bincount(members, minlength=len(groups))
    counted = np.bincount(members, weights=weights, minlength=len(groups))
    return tuple(
        TypedCount(
            node=int(node),
            order=int(order),
            descriptors=int(count),
            pages=int(count) << int(order),
            counted_pages=int(total),
        )
        for (node, order), count, total in zip(groups, counts, counted)
    )
