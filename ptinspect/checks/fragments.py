# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages that hold several tables: powerpc's fragments, s390's halves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Union

import numpy as np

from ptinspect.checks.context import Context
from ptinspect.checks.model import Finding, NotApplicableError, Severity, Tally, Value
from ptinspect.checks.registry import invariant
from ptinspect.memory import read_blocks
from ptinspect.state.fragments import PAGE_PROBLEMS, Fragments
from ptinspect.state.halves import HALF_PROBLEMS, Halves
from ptinspect.tables.entries import raw_entries

#: A story with a row for each page, which names a problem.
_Story = Union[Fragments, Halves]


def _comparable(context: Context, tally: Tally, story: _Story) -> bool:
    """Tell whether all was seen that the pages of a story are compared with; note what was not."""
    for what in story.missing:
        tally.miss(what)
    if not context.whole:
        tally.miss("not every table was seen: counts cannot be compared")
    return context.whole


def _contradictions(context: Context, tally: Tally, story: _Story) -> Iterator[int]:
    """Get the rows of pages with a problem, unless something is going on in their space."""
    tally.examine(np.count_nonzero(story.readable))
    for row in np.flatnonzero(story.problem).tolist():
        space = int(story.space[row])
        busy = context.busy(space) if space >= 0 else ""
        if busy:
            tally.leave(busy)
        else:
            yield row


def _page_finding(
    context: Context,
    story: _Story,
    row: int,
    message: str,
    evidence: tuple[tuple[str, Value], ...],
) -> Finding:
    space, pfn = int(story.space[row]), int(story.pfn[row])
    return Finding(
        "page",
        pfn * context.paging.page_bytes,
        message,
        evidence,
        context.tables.spaces[space].name if space >= 0 else "",
        f"show pfn:{pfn:#x}",
    )


@invariant(
    "ppc-frag-refcount",
    severity=Severity.CORRUPTION,
    applies="pages of table fragments; ppc64",
    source="pte_fragment_alloc(), pte_fragment_free() (arch/powerpc/mm/pgtable-frag.c), "
    "pmd_fragment_alloc() (book3s64/pgtable.c)",
    false_positives="fragments between their tree and the batch that frees them",
    breaks="a fragment freed twice or never, an mm that got another's fragments",
)
def ppc_frag_refcount(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A page of fragments counts those in use and those that its cache still has to hand out.

    With a count too low the page is freed with tables in it; with one too high it leaks. All
    fragments of a page are of one level and one mm.
    """
    story = context.census.stories.fragments
    if story is None:
        raise NotApplicableError("only ppc64 has table fragments")
    if not _comparable(context, tally, story):
        return
    for row in _contradictions(context, tally, story):
        yield _page_finding(
            context,
            story,
            row,
            f"page of fragments: {PAGE_PROBLEMS[int(story.problem[row])]}",
            (
                ("pt_frag_refcount", int(story.refcount[row])),
                ("expected", int(story.expected[row])),
                ("arithmetic", story.arithmetic(row)),
            ),
        )
    for cache in story.caches:
        tally.examine(1)
        if cache.problem:
            space_name = context.tables.spaces[cache.space].name
            yield Finding(
                "pointer",
                cache.pointer,
                f"cache of fragments of {space_name}: {cache.problem}",
                (("level", context.paging.levels[cache.level].name),),
                space_name,
                f"show virt:{cache.pointer:#x}",
            )


@invariant(
    "s390-half-state",
    severity=Severity.CORRUPTION,
    applies="pages of two page tables; s390 up to 6.7",
    source="page_table_alloc(), page_table_free(), page_table_free_rcu() (arch/s390/mm/pgalloc.c)",
    false_positives="a half that is allocated and not linked yet",
    breaks="a half freed twice, a page put on the list of another mm",
)
def s390_half_state(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The bits of a page's two halves, its list and the trees that use them agree.

    A half that is linked but not marked as allocated is given to somebody else next.
    """
    story = context.census.stories.halves
    if story is None:
        raise NotApplicableError("only s390 up to 6.7 keeps two page tables in a page")
    if not _comparable(context, tally, story):
        return
    for row in _contradictions(context, tally, story):
        if story.unreached[row]:
            continue  # a typed page that nothing holds: typed-reachability judges those
        yield _page_finding(
            context,
            story,
            row,
            f"halves of a page: {HALF_PROBLEMS[int(story.problem[row])]}",
            (
                ("bits", int(story.bits[row])),
                ("linked", int(story.linked[row])),
                ("deposited", int(story.deposited[row])),
            ),
        )


@invariant(
    "s390-upper-half",
    severity=Severity.SUSPICIOUS,
    applies="page tables of processes without PGSTEs; s390 since 6.8",
    source="page_table_alloc() (arch/s390/mm/pgalloc.c) clears the second half of the page",
    false_positives="none known",
    breaks="a write behind the end of a page table",
)
def s390_upper_half(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Behind a page table of 256 entries, the second half of its page is zero.

    It is the place of the PGSTEs of virtual machines, which these processes are not.
    """
    context_type = context.prog.type("struct mm_struct").member("context").type
    if context.arch != "s390x" or context_type.has_member("pgtable_list"):
        raise NotApplicableError("only s390 since 6.8 leaves the second half of the page free")
    tables = context.tables
    rows = context.user_space[tables.space] & (tables.level == 0) & (tables.first < 0)
    if context_type.has_member("has_pgste"):
        for number in np.unique(tables.space[rows]).tolist():
            mm = context.mm(number)
            if mm is not None and int(mm.context.has_pgste):
                rows &= tables.space != number
    rows &= (context.census.descriptor >= 0) & (tables.address % np.uint64(4096) == 0)
    chosen = np.flatnonzero(rows)
    blocks = read_blocks(context.prog, tables.address[chosen] + np.uint64(2048), 2048)
    unread = int(np.count_nonzero(~blocks.readable))
    if unread:
        tally.miss(f"{unread} halves of pages could not be read")
    tally.examine(np.count_nonzero(blocks.readable))
    words = raw_entries(blocks.data)
    for place in np.flatnonzero((words != 0).any(axis=1) & blocks.readable).tolist():
        slot = int(np.flatnonzero(words[place])[0])
        value = int(context.paging.values(words[place, slot : slot + 1])[0])
        yield context.table_finding(
            int(chosen[place]),
            "the second half of its page is not zero",
            word_at=int(tables.address[chosen[place]]) + 2048 + 8 * slot,
            word=value,
        )
