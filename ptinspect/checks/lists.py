# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lists that descriptors are on, and the tables that wait to be freed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ptinspect.checks.context import Context
from ptinspect.checks.model import Finding, NotApplicableError, Severity, Tally, Value
from ptinspect.checks.registry import invariant
from ptinspect.lists import BreakReason, walk_list_at
from ptinspect.memory import among
from ptinspect.state.lists import FREE_LIST, Role
from ptinspect.state.rcu import Segment
from ptinspect.tables.walk import RowState


@invariant(
    "list-integrity",
    severity=Severity.CORRUPTION,
    applies="pgd_list (x86), kernel_pgtable_work.list (7.x), context.pgtable_list (s390 6.1)",
    source="list_add() and list_del() under pgd_lock, kernel_pgtable_work.lock, context.lock",
    false_positives="a node that is being added or deleted (the lock is held)",
    breaks="a table freed while it was on a list, a write over pt_list",
)
def list_integrity(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Every list of descriptors is whole: neighbours point to each other, and each node is in one.

    New kernel mappings are pushed along pgd_list; where it breaks, the rest do not get them.
    """
    story = context.census.stories.lists
    for found in story.lists:
        tally.examine(1 + len(found.pfns))
        if found.problems and _ends_in_a_hole(context, found.head):
            tally.miss(f"{found.name}: {found.problems[0]}")
            continue
        for problem in found.problems:
            yield Finding(
                "list",
                found.head,
                f"{found.name}: {problem}",
                (("nodes_seen", len(found.pfns)), ("nodes_before", found.before_break)),
                look=f"show pfn:{found.pfns[-1]:#x}" if found.pfns else "",
            )


def _ends_in_a_hole(context: Context, head: int) -> bool:
    """Whether a list cannot be followed because memory is missing."""
    broken = walk_list_at(context.prog, head).broken
    unread = broken is not None and broken.reason is BreakReason.UNREADABLE
    return unread and broken is not None and context.in_a_hole(broken.next)


@invariant(
    "kernel-work-list",
    severity=Severity.CORRUPTION,
    applies="tables on kernel_pgtable_work.list (7.x with CONFIG_ASYNC_KERNEL_PGTABLE_FREE)",
    source="pagetable_free_kernel(), kernel_pgtable_work_func() (mm/pgtable-generic.c)",
    false_positives="none known",
    breaks="a kernel table freed while it was linked, or freed twice",
)
def kernel_work_list(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A kernel table that waits to be freed is untyped, in use, and linked in no tree.

    It is given to the page allocator as soon as the I/O TLBs are flushed.
    """
    listed = context.census.stories.lists.named(FREE_LIST)
    if listed is None:
        raise NotApplicableError("this kernel frees its tables at once")
    pages = context.page_reader.read(np.array(listed.pfns, np.uint64))
    linked = set((context.tables.address // np.uint64(context.paging.page_bytes)).tolist())
    for place, pfn in enumerate(listed.pfns):
        if not pages.readable[place]:
            tally.miss(f"the struct page of {pfn:#x} could not be read")
            continue
        tally.examine(1)
        wrong = "typed" if pages.typed[place] else "free" if pages.buddy[place] else ""
        wrong = wrong or ("linked in a tree" if pfn in linked else "")
        if wrong:
            yield Finding(
                "ptdesc",
                listed.ptdescs[place],
                f"a table that waits to be freed is {wrong}",
                (("pfn", pfn), ("page_type", context.page_reader.name(pages.word(place)))),
                look=f"show pfn:{pfn:#x}",
            )


@invariant(
    "table-on-no-list",
    severity=Severity.SUSPICIOUS,
    applies="typed tables that a tree reaches",
    source="only PGDs, deposits, pages with a free half and callbacks use pt_list",
    false_positives="live: a table that is being freed; x86 collects the kernel tables that it "
    "replaces by large pages on a list of its own, for one flush",
    breaks="a page given out twice by the allocator",
)
def table_on_no_list(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A table that is linked in a tree is a node of no other list.

    Whoever has it on a list believes that it is free, or somebody else's.
    """
    story = context.census.stories.lists
    if story.missing:
        # What is behind a break would be taken for a node of a foreign list.
        tally.miss(story.missing[0])
        return
    reached = context.census.reached_counts() > 0
    tally.examine(np.count_nonzero(reached))
    for index in np.flatnonzero(reached & (story.roles == Role.OTHER_LIST)).tolist():
        yield context.descriptor_finding(
            index,
            "a linked table is a node of a list",
            next=int(context.columns("pt_list.next")[index]),
            prev=int(context.columns("pt_list.prev")[index]),
        )


@invariant(
    "pending-not-linked",
    severity=Severity.CORRUPTION,
    applies="tables in batches and callbacks that wait for RCU, or that a stack gathers",
    source="tlb_remove_table() (mm/mmu_gather.c), pte_free_defer() (mm/pgtable-generic.c): the "
    "entry is cleared first",
    false_positives="live: the table was freed and used again between two reads",
    breaks="a table freed without being unlinked, or freed twice",
)
def pending_not_linked(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A table that waits to be freed is linked in no tree, and waits once only.

    After the grace period its page is anybody's.
    """
    story = context.census.stories.pending
    for what in story.missing:
        tally.miss(what)
    tally.examine(len(story.addresses))
    there = context.tables.state <= RowState.UNREADABLE
    reached = among(story.addresses, context.tables.address[there])
    linked = np.isin(story.addresses, np.array(sorted(reached), np.uint64))
    # The tables of a batch that is being freed may be somebody's again, those before all are done.
    done = np.array([free.segment is Segment.INVOKED for free in story.frees] or [False], np.bool_)
    unsure = done[story.free]
    order = np.argsort(unsure, kind="stable")
    _, first = np.unique(story.addresses[order], return_index=True)
    twice = np.ones(len(story.addresses), np.bool_)
    twice[order[first]] = False
    for _ in range(np.count_nonzero((linked | twice) & unsure)):
        tally.leave("a CPU frees its batch just now: it may be in use again")
    for place in np.flatnonzero((linked | twice) & ~unsure).tolist():
        free = story.frees[int(story.free[place])]
        address = int(story.addresses[place])
        what = "linked in a tree" if linked[place] else "queued twice"
        evidence: list[tuple[str, Value]] = [("way", free.way.value), ("function", free.function)]
        evidence.append(("queued_at", free.address))
        if twice[place]:
            same = np.flatnonzero((story.addresses == story.addresses[place]) & ~twice)
            other = story.frees[int(story.free[same[0]])]
            evidence += [("other_way", other.way.value), ("other_queued_at", other.address)]
        yield Finding(
            "table",
            address,
            f"a table that waits to be freed is {what}",
            tuple(evidence),
            free.task,
            f"show phys:{address:#x}",
        )
