# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel counts, beside what there is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ptinspect.census import Holder
from ptinspect.checks.context import Context
from ptinspect.checks.model import Finding, NotApplicableError, Severity, Tally
from ptinspect.checks.registry import invariant
from ptinspect.reached import census_missing
from ptinspect.tables.counters import read_nr_pagetable
from ptinspect.tables.scan import counted_pages


@invariant(
    "nr-pagetable-total",
    severity=Severity.ACCOUNTING,
    applies="the whole system",
    source="__pagetable_ctor(), pagetable_dtor() (include/linux/mm.h); mm/vmstat.c",
    false_positives="a CPU between typing and counting a table; 7.3's memory hot-remove frees "
    "without uncounting (free_pagetable() in arch/x86/mm/init_64.c)",
    breaks="a table freed without its destructor, or its page type written over",
)
def nr_pagetable_total(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    NR_PAGETABLE, with what CPUs have not folded in yet, is the number of typed pages.

    Every table is typed and counted by the same function: if the numbers differ, one was freed
    without it, or lost its type.
    """
    scan = context.census.scan
    if scan.unreadable_pages or not scan.order_known.all():
        tally.miss("not every struct page could be read: typed pages cannot be counted")
        return
    typed = int(counted_pages(context.prog, scan).sum())
    counter = read_nr_pagetable(context.prog)
    tally.examine(len(scan.pfns))
    if typed != counter.exact_pages:
        variable = context.prog["vm_node_stat"]
        yield Finding(
            "counter",
            int(variable.address_of_().value_()),
            f"{typed} pages are typed, NR_PAGETABLE is {counter.exact_pages}",
            (("typed_pages", typed), ("nr_pagetable", counter.exact_pages)),
            look="summary",
        )


@invariant(
    "typed-reachability",
    severity=Severity.LEAK,
    applies="every typed page",
    source="a table belongs to a tree, a deposit, a callback or batch that frees it, or a cache",
    false_positives="a table that was allocated and is not linked yet: only a CPU or a sleeping "
    "task's stack knows it (vmf->prealloc_pte, __pte_alloc())",
    breaks="a table unlinked without being freed, an mm lost with all its tables",
)
def typed_reachability(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Each typed page is held by something: an address space, a deposit, or what will free it.

    Nothing will ever free the others.
    """
    census = context.census
    if not hasattr(census.stories, "deposits"):
        raise NotApplicableError("deposits are not read yet")
    missing = census_missing(census)
    if missing:
        tally.miss(f"not everything that may hold a table was seen: {missing[0]}")
        return
    tally.examine(len(census.scan.pfns))
    for index in np.flatnonzero(census.holder == Holder.UNEXPLAINED).tolist():
        yield context.descriptor_finding(index, "nothing holds this table")
