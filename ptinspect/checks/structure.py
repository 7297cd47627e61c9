# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The trees: which tables are linked to which, and what their pages are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ptinspect.checks.context import Context, Rows
from ptinspect.checks.model import Finding, Severity, Tally
from ptinspect.checks.registry import invariant
from ptinspect.tables.vmas import VM_HUGETLB
from ptinspect.tables.walk import RowState


@invariant(
    "tree-entry-target-valid",
    severity=Severity.CORRUPTION,
    applies="every entry that points to a table, in all spaces",
    source="p?d_page_vaddr() of each architecture; a table in use is an allocated page",
    false_positives="live: the table was freed and its page used again between two reads",
    breaks="a use after free, a stray write into a table, a table freed while it was linked",
)
def tree_entry_target_valid(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Each entry that points to a table points into memory, to a page that is in use as a table.

    What it points to is translated through by the hardware: if the page is free it will soon hold
    somebody's data, and that data will be taken for mappings.
    """
    tables, pages = context.tables, context.pages
    linked = tables.parent >= 0
    tally.examine(np.count_nonzero(linked))
    outside = linked & ((tables.state == RowState.OUTSIDE) | pages.outside)
    for row in np.flatnonzero(outside).tolist():
        yield context.entry_finding(row, "points to where the kernel has no memory")
    linked &= ~outside & (tables.state != RowState.CYCLE)
    unknown = int(np.count_nonzero(linked & ~pages.readable))
    if unknown:
        tally.miss(f"the struct pages of {unknown} tables could not be read")
    linked &= pages.readable
    slab = pages.slab & ~context.slab_allowed
    free = context.without_count
    for row in np.flatnonzero(linked & (pages.buddy | slab | free)).tolist():
        what = "free" if pages.buddy[row] or free[row] else "a slab"
        yield context.entry_finding(
            row,
            f"points to a page that is {what}",
            page_type=context.page_reader.name(pages.word(row)),
            refcount=int(pages.refcounts[row]),
        )


@invariant(
    "tree-child-typed",
    severity=Severity.CORRUPTION,
    applies="tables of processes at the levels that this kernel types (learned from the target)",
    source="pagetable_*_ctor(), include/linux/mm.h; pgtable_pte_page_ctor() in 6.1",
    false_positives="live: a table that is being freed",
    breaks="a table freed while it was linked, a write over page_type, a constructor left out",
)
def tree_child_typed(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Each table of a process lies in a page that is typed as a page table, where its level is typed.

    PTE and PMD tables always are; of the higher levels only if this kernel types them. A table
    without the type was freed, or will be freed without being uncounted.
    """
    tables, census, pages = context.tables, context.census, context.pages
    user = context.user_space[tables.space] & context.there
    typed = census.descriptor >= 0
    for level in range(len(context.paging.levels)):
        for root in (False, True):
            here = user & (tables.level == level) & ((tables.parent < 0) == root)
            total = int(np.count_nonzero(here))
            if not total:
                continue
            if level > 1 or root:
                # Learned: one damaged table does not change what the others say.
                number = int(np.count_nonzero(here & typed))
                if number * 2 <= total:
                    continue
            tally.examine(total)
            suspect = here & ~typed
            unseen = int(np.count_nonzero(suspect & ~pages.readable))
            if unseen:
                tally.miss(f"the struct pages of {unseen} tables could not be read")
            for row in np.flatnonzero(suspect & pages.readable & ~pages.typed).tolist():
                yield context.entry_finding(
                    row,
                    "its table is not typed as a page table",
                    page_type=context.page_reader.name(pages.word(row)),
                    refcount=int(pages.refcounts[row]),
                )


@invariant(
    "tree-child-not-foreign",
    severity=Severity.CORRUPTION,
    applies="every table that is reached, in all spaces",
    source="include/linux/page-flags.h (page types), mm/page_alloc.c (bad_page())",
    false_positives="live: the page was freed and used again between two reads",
    breaks="a use after free: the page of a table was given to somebody else",
)
def tree_child_not_foreign(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    No table lies in a page that is something else: of another type, mapped, or on an LRU list.

    Two users of one page write over each other.
    """
    tables, pages = context.tables, context.pages
    seen = context.there & pages.readable
    tally.examine(np.count_nonzero(seen))
    # In all but the first page of a compound page that word is another one (ppc64's PUD tables of
    # 4K pages are objects of slabs of several pages).
    mapped = ~pages.slab & ~pages.buddy & ~pages.tail & (pages.records["__page_mapping"] != 0)
    # A typed page with a mapping is desc-mapping-zero's.
    suspect = seen & (pages.foreign | pages.lru | (mapped & ~pages.typed))
    _, first = np.unique(tables.address, return_index=True)
    for row in first[suspect[first]].tolist():
        yield context.table_finding(
            row,
            "its page belongs to somebody else",
            page_type=context.page_reader.name(pages.word(row)),
            lru=int(pages.lru[row]),
            mapping=int(pages.records["__page_mapping"][row]),
        )


def _parents(context: Context, address: int) -> Rows:
    """Get the rows of a table, one for each entry that points to it."""
    return np.flatnonzero(context.tables.address == np.uint64(address))


@invariant(
    "tree-single-parent",
    severity=Severity.CORRUPTION,
    applies="tables below the roots of processes",
    source="p?d_populate() of a table that nobody else has; huge_pmd_share() (mm/hugetlb.c)",
    false_positives="live: mremap() moves a table between two reads (move_normal_pmd())",
    breaks="a table linked twice, a parent entry copied by a stray write",
)
def tree_single_parent(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A table of a process has exactly one entry that points to it.

    When one of its owners goes, it frees the table under the other. PMD tables of shared hugetlb
    mappings are exempt if their count of sharers says so, which share-count checks.
    """
    tables = context.tables
    user = context.user_space[tables.space] & (tables.parent >= 0)
    tally.examine(np.count_nonzero(user))
    doubled = np.flatnonzero(user & (tables.state == RowState.SHARED))
    for address in np.unique(tables.address[doubled]).tolist():
        rows = _parents(context, address)
        rows = rows[tables.parent[rows] >= 0]
        mine = rows[context.user_space[tables.space[rows]]]
        if not context.pages.readable[rows[0]]:
            tally.miss("the descriptor of a table with several parents could not be read")
            continue
        if (tables.level[rows] == 1).all() and _may_be_shared(context, rows):
            continue
        first = int(tables.first[mine[-1]])
        other = first if first >= 0 else int(rows[0])
        yield context.entry_finding(
            int(mine[-1]),
            "its table is linked elsewhere too",
            other_entry=int(tables.entry_address[other]),
            other_space=context.space_of(other).name,
            other_va=int(tables.va[other]),
            entries_in_all=len(rows),
        )


def _may_be_shared(context: Context, rows: Rows) -> bool:
    """Whether all entries that share a PMD table are in hugetlb areas, and its count is not 0."""
    tables = context.tables
    index = int(context.census.descriptor[rows[0]])
    if index < 0 or not context.user_space[tables.space[rows]].all():
        return False
    if context.has_column("pt_share_count"):
        extra = int(context.columns("pt_share_count")[index])
    else:
        # Before the count had a member of its own, sharers were references (6.1 and older).
        extra = int(context.columns("__page_refcount")[index]) - 1
    return extra > 0 and all(_in_hugetlb(context, int(row)) for row in rows)


def _in_hugetlb(context: Context, row: int) -> bool:
    areas = context.areas(int(context.tables.space[row]))
    if areas is None:
        return True
    start = context.tables.va[row : row + 1]
    place = np.searchsorted(areas.ends, start, side="right")[0]
    return bool(place < len(areas.flags) and int(areas.flags[place]) & VM_HUGETLB)


@invariant(
    "tree-one-level",
    severity=Severity.CORRUPTION,
    applies="every table that is reached, in all spaces",
    source="the levels of a tree are fixed: p?d_populate() links tables of the level below",
    false_positives="live: a table was freed and its page used at another level between two reads",
    breaks="an upper entry overwritten with the address of a table of another level",
)
def tree_one_level(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    No table is reached at two levels, and none is its own ancestor.

    At the wrong level, mappings are taken for tables.
    """
    tables = context.tables
    tally.examine(len(tables))
    cycles = tables.state == RowState.CYCLE
    for row in np.flatnonzero(cycles).tolist():
        yield context.entry_finding(row, "points to a table above itself")
    order = np.argsort(tables.address, kind="stable")
    address, level = tables.address[order], tables.level[order]
    conflict = np.flatnonzero((address[1:] == address[:-1]) & (level[1:] != level[:-1]))
    for place in conflict.tolist():
        one, other = int(order[place]), int(order[place + 1])
        if not context.there[one] or not context.there[other] or cycles[one] or cycles[other]:
            continue
        if int(tables.parent[other]) < 0:
            one, other = other, one
        yield context.entry_finding(
            other,
            f"its table is also a {context.level_name(one)} table",
            other_entry=int(tables.entry_address[one]),
            other_space=context.space_of(one).name,
        )


@invariant(
    "tree-vma-covers-table",
    severity=Severity.SUSPICIOUS,
    applies="tables below the roots of processes that have memory areas",
    source="free_pgtables(), free_pgd_range(): a table goes with the last area that needs it",
    false_positives="munmap(), mremap(), exec() or exit() in progress (mmap_lock held)",
    breaks="a table that was not freed with its area, an area lost from the tree of areas",
)
def tree_vma_covers_table(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Each table of a process translates at least one address of one of its memory areas.

    Other tables stay until the process ends, and what they map is out of anybody's control.
    """
    tables = context.tables
    # Of the root's entries x86 has one in the kernel half (the LDT), without an area.
    rows = context.process_space[tables.space] & (tables.parent >= 0) & context.there
    rows &= context.user_half(tables.va)
    spans = context.spans()
    for space in np.unique(tables.space[rows]).tolist():
        here = np.flatnonzero(rows & (tables.space == space))
        areas = context.areas(space)
        if areas is None:
            tally.miss(
                f"the areas of {tables.spaces[space].name} cannot be read: "
                f"{context.areas_problem(space)}"
            )
            continue
        tally.examine(len(here))
        starts = tables.va[here]
        for row in here[~areas.touch(starts, starts + spans[here])].tolist():
            busy = context.busy(space)
            if busy:
                tally.leave(busy)
                continue
            yield context.entry_finding(
                row, "its table covers no memory area", bytes_covered=int(spans[row])
            )


@invariant(
    "table-alignment",
    severity=Severity.CORRUPTION,
    applies="every table whose entry or pgd pointer has bits for it; s390, ppc64 and roots",
    source="16 KiB CRST tables, 2 KiB page tables (arch/s390/mm/pgalloc.c); fragments "
    "(arch/powerpc/mm/pgtable-frag.c); pgd_alloc() of each architecture",
    false_positives="none known",
    breaks="low bits of a table pointer overwritten",
)
def table_alignment(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Each table begins at a multiple of its size.

    The hardware ignores the low bits: it uses another table than the kernel does.
    """
    tables = context.tables
    sizes = tables.table_bytes.astype(np.uint64)
    if context.arch not in ("s390x", "ppc64"):
        # Elsewhere entries have no bits below the alignment of a table.
        look = tables.parent < 0
        page = np.uint64(context.paging.page_bytes)
        sizes = np.minimum(sizes, page)
    else:
        look = np.ones(len(tables), np.bool_)
    if context.arch == "s390x" and context.has_column("pt_index") and _one_table_a_page(context):
        # Since two tables no longer share a page (6.6), users' page tables begin a page.
        sizes = np.where(
            context.user_space[tables.space] & (tables.level == 0), np.uint64(4096), sizes
        )
    tally.examine(np.count_nonzero(look))
    for row in np.flatnonzero(look & (tables.address % sizes != 0)).tolist():
        yield context.entry_finding(
            row,
            f"its table does not begin at a multiple of {int(sizes[row])} bytes",
            table_address=int(tables.address[row]),
        )


def _one_table_a_page(context: Context) -> bool:
    """Whether s390 page tables have a page each: 6.1 and older kept halves in the refcount."""
    return (
        not context.prog.type("struct mm_struct").member("context").type.has_member("pgtable_list")
    )
