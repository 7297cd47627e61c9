# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The trees: where entries point, what they point to, and what they may map."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ptinspect.checks.context import Context, Rows
from ptinspect.checks.leaves import Batch, question
from ptinspect.checks.model import Finding, NotApplicableError, Severity, Tally
from ptinspect.checks.registry import invariant
from ptinspect.kernel.paging import EntryClass, Paging, Permission
from ptinspect.memory import BoolArray
from ptinspect.tables.spaces import SpaceKind
from ptinspect.tables.vmas import VM_HUGETLB, VM_MIXEDMAP, VM_PFNMAP
from ptinspect.tables.walk import RowState

#: First address of the kernel half of x86_64, where an mm can have its LDT.
_X86_KERNEL_HALF = 1 << 63
#: VSYSCALL_ADDR (arch/x86/include/uapi/asm/vsyscall.h)
_VSYSCALL = 0xFFFFFFFFFF600000


def _slab_allowed(context: Context) -> BoolArray:
    """Tell, by row, whether the table may be an object of a slab cache."""
    tables = context.tables
    top = len(context.paging.levels) - 1
    allowed: BoolArray = np.zeros(len(tables), np.bool_)
    if context.arch == "ppc64":
        # PUDs and the hash MMU's PGDs come from PGT_CACHE (arch/powerpc/mm/init-common.c).
        allowed = tables.level >= 2
    if context.arch == "arm64":
        # pgd_cache, if the PGD is smaller than a page (arch/arm64/mm/pgd.c).
        allowed = tables.level == top
    return allowed


def _without_count(context: Context) -> BoolArray:
    """Tell, by row, whether nobody holds the page of the table."""
    pages = context.pages
    # The pages of a slab but the first have no count of their own.
    counted_elsewhere = pages.slab | (pages.tail & _slab_allowed(context))
    free: BoolArray = ~counted_elsewhere & (pages.refcounts < 1)
    return free


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
    slab = pages.slab & ~_slab_allowed(context)
    free = _without_count(context)
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
    if context.arch == "x86_64":
        rows &= tables.va < np.uint64(_X86_KERNEL_HALF)
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


@question("leaf-in-vma")
def _leaf_outside(batch: Batch) -> tuple[int, BoolArray]:
    context = batch.context
    asked = context.process_space[batch.space]
    if context.arch == "x86_64":
        asked &= batch.va < np.uint64(_X86_KERNEL_HALF)
    asked &= (batch.kind == EntryClass.LEAF) | (batch.kind == EntryClass.PROT_NONE)
    suspect = np.zeros(len(asked), np.bool_)
    places = np.flatnonzero(asked)
    number = 0
    space, va = batch.space[places], batch.va[places]
    for one in np.unique(space).tolist():
        areas = context.areas(one)
        if areas is None:
            continue
        here = space == one
        number += int(np.count_nonzero(here))
        suspect[places[here]] = areas.index_of(va[here]) < 0
    return number, suspect


@invariant(
    "tree-leaf-in-vma",
    severity=Severity.SUSPICIOUS,
    applies="pages that processes map",
    source="unmap_vmas() clears all entries of an area before the area is freed",
    false_positives="munmap(), mremap(), exec() or exit() in progress (mmap_lock held)",
    breaks="a stray write into a table, an area lost or cut short",
)
def tree_leaf_in_vma(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Each page that a process maps lies in one of its memory areas.

    A mapping without an area is never unmapped: the page is read and written after it was freed.
    """
    batches = _suspects(context, tally, "leaf-in-vma")
    for space in np.flatnonzero(context.process_space).tolist():
        if context.areas_problem(space):
            name = context.tables.spaces[space].name
            tally.miss(f"the areas of {name} cannot be read: {context.areas_problem(space)}")
    for finding in _leaf_findings(context, batches, "lies in no memory area"):
        space = _space_of_finding(context, finding)
        busy = context.busy(space) if space is not None else ""
        if busy:
            tally.leave(busy)
        else:
            yield finding


def _miss_unread(context: Context, tally: Tally) -> None:
    unread = context.unread()
    if unread:
        tally.miss(unread)


def _suspects(context: Context, tally: Tally, name: str) -> list[Batch]:
    """Get the suspects of a question about leaf entries; note what was not looked at."""
    asked, batches = context.leaves.suspects(name)
    tally.examine(asked)
    _miss_unread(context, tally)
    return batches


def _space_of_finding(context: Context, finding: Finding) -> int | None:
    for number, space in enumerate(context.tables.spaces):
        if space.name == finding.owner and space.kind is SpaceKind.USER:
            return number
    return None


def _leaf_findings(context: Context, batches: list[Batch], message: str) -> Iterator[Finding]:
    for batch in batches:
        targets = context.paging.leaf_targets(batch.value, batch.level, batch.slot)
        for n in range(len(batch.row)):
            yield context.slot_finding(
                int(batch.row[n]),
                int(batch.slot[n]),
                int(batch.value[n]),
                message,
                maps=int(targets[n]),
            )


@question("leaf-not-table")
def _leaf_table(batch: Batch) -> tuple[int, BoolArray]:
    context = batch.context
    scan = context.census.scan
    asked = context.process_space[batch.space] & (batch.kind == EntryClass.LEAF)
    suspect = np.zeros(len(asked), np.bool_)
    places = np.flatnonzero(asked)
    if not len(places) or not len(scan.pfns):
        return len(places), suspect
    page = np.uint64(context.paging.page_bytes)
    level = context.paging.levels[batch.level]
    values, slots = batch.value[places], batch.slot[places]
    first = context.paging.leaf_targets(values, batch.level, slots) // page
    last = first + np.uint64(max(1, level.entry_span // int(page)) - 1)
    # The last typed page at or before the end of what is mapped reaches into it.
    place = np.searchsorted(scan.pfns, last, side="right").astype(np.intp) - 1
    head = np.maximum(place, 0)
    end = scan.pfns[head] + np.left_shift(np.uint64(1), scan.orders[head].astype(np.uint64))
    suspect[places] = (place >= 0) & (end > first)
    return len(places), suspect


@invariant(
    "tree-leaf-not-table",
    severity=Severity.CORRUPTION,
    applies="pages that processes map",
    source="a page with a page type has no mapcount (include/linux/page-flags.h); "
    "PageTable pages are never mapped by users",
    false_positives="an area of a driver that maps any memory (/dev/mem): VM_PFNMAP, VM_MIXEDMAP "
    "are left out; live: a page that was freed and became a table between two reads",
    breaks="a page that was freed while it was mapped, and used as a table then",
)
def tree_leaf_not_table(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    No process maps a page that is typed as a page table.

    It could write its own page tables, and with them map any memory.
    """
    batches = _suspects(context, tally, "leaf-not-table")
    for batch in batches:
        keep = np.ones(len(batch.row), np.bool_)
        for n in range(len(batch.row)):
            areas = context.areas(int(batch.space[n]))
            if areas is None:
                continue
            place = int(areas.index_of(batch.va[n : n + 1])[0])
            flags = int(areas.flags[place]) if place >= 0 else 0
            keep[n] = not flags & (VM_PFNMAP | VM_MIXEDMAP)
        yield from _leaf_findings(context, [batch.take(keep)], "maps a page table")


@question("kernel-no-user")
def _kernel_user_leaf(batch: Batch) -> tuple[int, BoolArray]:
    context = batch.context
    asked = context.kernel_space[batch.space] & (batch.kind == EntryClass.LEAF)
    suspect = np.zeros(len(asked), np.bool_)
    places = np.flatnonzero(asked)
    own = context.paging.permissions(batch.value[places], batch.level, leaf=True)
    whole = own & context.tables.permissions[batch.row[places]]
    suspect[places] = (whole & Permission.USER) != 0
    if context.arch == "x86_64":
        suspect &= batch.va != np.uint64(_VSYSCALL)
    return len(places), suspect


@invariant(
    "kernel-no-user-leaf",
    severity=Severity.CORRUPTION,
    applies="pages that the kernel maps; not s390, whose spaces are apart",
    source="_PAGE_KERNEL without _PAGE_USER (x86), without PTE_USER (arm64), with "
    "_PAGE_PRIVILEGED (ppc64); exempt: x86's vsyscall page",
    false_positives="none known",
    breaks="a stray write into a kernel table, set_memory_*() with user protection",
)
def kernel_no_user_leaf(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    No page of the kernel's address space can be used by user mode.

    Otherwise every process can read or write kernel memory. The whole path counts.
    """
    if context.arch == "s390x":
        raise NotApplicableError("user mode has an address space of its own on s390")
    batches = _suspects(context, tally, "kernel-no-user")
    yield from _leaf_findings(context, batches, "user mode may use a kernel mapping")


@question("user-no-kernel")
def _user_kernel_leaf(batch: Batch) -> tuple[int, BoolArray]:
    context = batch.context
    asked = context.process_space[batch.space] & (batch.kind == EntryClass.LEAF)
    if context.arch == "x86_64":
        asked &= batch.va < np.uint64(_X86_KERNEL_HALF)
    own = context.paging.permissions(batch.value, batch.level, leaf=True)
    allowed = (own & Permission.USER) != 0
    if context.arch == "arm64":
        # PAGE_EXECONLY has no PTE_USER, but user mode may execute it.
        allowed |= (own & Permission.EXECUTE_USER) != 0
    return int(np.count_nonzero(asked)), asked & ~allowed


@invariant(
    "user-no-kernel-leaf",
    severity=Severity.SUSPICIOUS,
    applies="pages that processes map; x86_64, arm64, ppc64, riscv64",
    source="protection_map[] of each architecture",
    false_positives="none known; arm64's execute-only pages are exempt",
    breaks="a kernel mapping put into a user table, a bit lost from an entry",
)
def user_no_kernel_leaf(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Each page that a process maps can be used by user mode.

    A mapping that only the kernel can use has no place in the user part of a process.
    """
    if context.arch == "s390x":
        raise NotApplicableError("entries of s390 do not tell user from kernel")
    batches = _suspects(context, tally, "user-no-kernel")
    yield from _leaf_findings(context, batches, "only the kernel may use a mapping of a process")


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


# Entry formats.


def _value_findings(
    context: Context,
    rows: Rows,
    slots: npt.NDArray[np.int64],
    values: npt.NDArray[np.uint64],
    message: str,
    **evidence: int,
) -> Iterator[Finding]:
    for row, slot, value in zip(rows.tolist(), slots.tolist(), values.tolist()):
        yield context.slot_finding(row, slot, value, message, **evidence)


#: Bits of x86 entries (arch/x86/include/asm/pgtable_types.h).
_X86_TABLE = 0x63
_X86_USER, _X86_NX, _X86_NOPTISHADOW = 1 << 2, 1 << 63, 1 << 58
_X86_ACCESSED = 1 << 5


def _x86_allowed(context: Context, level: int, user: bool) -> tuple[int, int]:
    """Get which bits a table entry may have, and which it must have."""
    paging = context.paging
    address = paging.levels[level].table_address[0].mask
    encryption = (1 << 52) - 4096 & ~address
    bits = _x86_phys_bits(context)
    if bits is not None:
        address &= (1 << bits) - 1
    allowed = address | encryption | _X86_TABLE | _X86_USER
    top = len(paging.levels) - 1
    if not user:
        # espfix tables are read-only and not executable (arch/x86/kernel/espfix_64.c).
        return allowed | _X86_NX | _X86_NOPTISHADOW, 1
    if level == top:
        # Page-table isolation makes user entries of the kernel's PGD not executable.
        allowed |= _X86_NX | _X86_NOPTISHADOW
    # pmd_bad() wants just these; p4d_bad() and pud_bad() none but these.
    return allowed, _X86_TABLE & ~_X86_ACCESSED if level == 1 else 1


def _x86_phys_bits(context: Context) -> int | None:
    try:
        bits = int(context.prog["boot_cpu_data"].x86_phys_bits.value_())
    except (LookupError, AttributeError):
        return None
    return bits if 32 <= bits <= 52 else None


_ARM64_ATTRIBUTES = 3 | 1 << 10 | 1 << 59 | 1 << 60
_RISCV_PFN = (1 << 54) - (1 << 10)


def _table_bits(context: Context, level: int, user: bool) -> tuple[int, int]:
    """Get which bits an entry that points to a table may have, and which it must have."""
    if context.arch == "x86_64":
        return _x86_allowed(context, level, user)
    fields = context.paging.levels[level].table_address
    address = 0
    for field in fields:
        address |= field.mask
    if context.arch == "arm64":
        return address | _ARM64_ATTRIBUTES, 3
    return _RISCV_PFN | 1, 1


@invariant(
    "entry-reserved-bits",
    severity=Severity.CORRUPTION,
    applies="entries above the lowest level; x86_64, arm64, riscv64",
    source="pmd_bad(), pud_bad(), p4d_bad() (arch/x86/include/asm/pgtable.h); "
    "arch/arm64/include/asm/pgtable-hwdef.h; arch/riscv/include/asm/pgtable-64.h",
    false_positives="none known: entries are written at once",
    breaks="a bit flipped in memory, a stray write into an upper table",
)
def entry_reserved_bits(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Entries that point to tables have no bits but those that the kernel gives them.

    Reserved bits fault in the hardware; others change what all that lies below may do. An entry
    above the lowest level that is neither empty, table, huge page nor swap is also found here.
    """
    if context.arch in ("s390x", "ppc64"):
        which = {"s390x": "s390-crst-type", "ppc64": "radix-nls-and-bits"}[context.arch]
        raise NotApplicableError(f"{which} checks the entries of this architecture")
    _miss_unread(context, tally)
    for level in range(1, len(context.paging.levels)):
        entries = context.upper[level]
        tally.examine(len(entries.row))
        bad = entries.kind == EntryClass.BAD
        yield from _value_findings(
            context,
            entries.row[bad],
            entries.slot[bad],
            entries.value[bad],
            "no kernel writes such an entry",
        )
        table = entries.kind == EntryClass.TABLE
        of_user = context.user_space[context.tables.space[entries.row]]
        for user in (False, True):
            allowed, needed = _table_bits(context, level, user)
            wrong = (entries.value & np.uint64(~allowed & (1 << 64) - 1)) != 0
            wrong |= (entries.value & np.uint64(needed)) != np.uint64(needed)
            wrong &= table & (of_user == user)
            yield from _value_findings(
                context,
                entries.row[wrong],
                entries.slot[wrong],
                entries.value[wrong],
                "bits that an entry for a table does not have",
                allowed=allowed,
                needed=needed,
            )


#: RADIX_PMD_BAD_BITS and its like (arch/powerpc/include/asm/book3s/64/radix.h).
_RADIX_BAD = 0x60000000000000E0


@invariant(
    "radix-nls-and-bits",
    severity=Severity.CORRUPTION,
    applies="entries above the lowest level; ppc64 with the radix MMU",
    source="RADIX_PMD_BAD_BITS, RADIX_PMD_VAL_BITS (asm/book3s/64/radix*.h)",
    false_positives="none known: entries are written at once",
    breaks="a bit flipped in memory, a stray write into an upper table",
)
def radix_nls_and_bits(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A directory entry names the size of the table below it, and has no reserved bits.

    With another size the hardware takes another part of the address as index.
    """
    if context.arch != "ppc64":
        raise NotApplicableError("ppc64 only")
    _miss_unread(context, tally)
    for level in range(1, len(context.paging.levels)):
        entries = context.upper[level]
        tally.examine(len(entries.row))
        size = context.paging.levels[level - 1].entries.bit_length() - 1
        bad = entries.kind == EntryClass.BAD
        yield from _value_findings(
            context,
            entries.row[bad],
            entries.slot[bad],
            entries.value[bad],
            "neither a page nor a table of the level below",
            size_below=size,
        )
        wrong = (entries.kind == EntryClass.TABLE) & ((entries.value & np.uint64(_RADIX_BAD)) != 0)
        yield from _value_findings(
            context,
            entries.row[wrong],
            entries.slot[wrong],
            entries.value[wrong],
            "reserved bits are set",
            reserved=_RADIX_BAD,
        )


#: Of s390 region and segment entries (arch/s390/include/asm/pgtable.h).
_S390_INVALID, _S390_TYPE, _S390_LARGE = 0x20, 0x0C, 0x400
_S390_LENGTH, _S390_OFFSET, _S390_COMMON = 0x03, 0xC0, 0x10
_S390_SWAP = 0x10
#: _SEGMENT_ENTRY_BITS without protection, no-execute and the type, beside the origin.
_S390_SEGMENT_TABLE = (1 << 64) - 0x800 | 0x200 | 0x20 | 0x0C | 0x03


@invariant(
    "s390-crst-type",
    severity=Severity.CORRUPTION,
    applies="every entry of the region and segment tables of s390, the empty ones too",
    source="crst_table_init(), pud_bad(), pmd_bad(), _REGION3_ENTRY_EMPTY and its like "
    "(arch/s390/include/asm/pgtable.h, pgalloc.h)",
    false_positives="none known: entries are written at once",
    breaks="a bit flipped in memory, a table used at another level",
)
def s390_crst_type(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Every entry of a region or segment table says of which level it is, and of what length.

    With the wrong type or length the hardware raises an exception that no handler expects, or
    does not see the upper part of the table below.
    """
    if context.arch != "s390x":
        raise NotApplicableError("s390 only")
    _miss_unread(context, tally)
    for level in range(1, len(context.paging.levels)):
        shape = context.paging.levels[level]
        kind = (level - 1) << 2
        for rows, raw in context.read_tables(level):
            values = context.paging.values(raw)
            own = np.zeros(values.shape, np.bool_)
            for place, row in enumerate(rows.tolist()):
                ranges: tuple[tuple[int, int], ...] = ((0, shape.entries),)
                if int(context.tables.parent[row]) < 0:
                    ranges = context.space_of(row).root.entries
                for begin, end in ranges:
                    own[place, begin:end] = True
            tally.examine(np.count_nonzero(own))
            wrong = own & _s390_wrong(values, level, kind)
            kvm = [context.space_of(row).kvm_owned for row in rows.tolist()]
            if any(kvm):
                wrong[kvm] &= _kvm_wrong(context.paging, values[kvm], level, kind)
            places, slots = np.nonzero(wrong)
            yield from _value_findings(
                context,
                rows[places],
                slots.astype(np.int64),
                values[places, slots],
                "not an entry of this level",
                expected_type=kind,
            )


def _kvm_wrong(paging: Paging, values: npt.NDArray[np.uint64], level: int, kind: int) -> BoolArray:
    """
    The same in tables of KVM's own (arch/s390/kvm/gmap/dat.h), which may say more.

    Invalid entries bear tokens or segments of a user-controlled machine, and _crste_fc0() gives
    every entry a table length.
    """
    if level == 1:
        values = np.where(values & np.uint64(_S390_INVALID), values, values & ~np.uint64(3))
    known = np.isin(paging.classify(values, level), (EntryClass.NONE, EntryClass.MARKER))
    wrong: BoolArray = ~known & _s390_wrong(values, level, kind)
    return wrong


def _s390_wrong(values: npt.NDArray[np.uint64], level: int, kind: int) -> BoolArray:
    def bits(mask: int) -> npt.NDArray[np.uint64]:
        masked: npt.NDArray[np.uint64] = values & np.uint64(mask)
        return masked

    wrong: BoolArray = bits(_S390_TYPE) != kind
    large = bits(_S390_LARGE) != 0 if level <= 2 else np.zeros(values.shape, np.bool_)
    invalid = bits(_S390_INVALID) != 0
    swapped = invalid & ~large & (bits(_S390_SWAP) != 0) if level <= 2 else np.False_
    empty = values == np.uint64(_S390_INVALID | kind)
    wrong |= invalid & ~large & ~empty & ~swapped
    table = ~invalid & ~large
    if level > 1:
        wrong |= table & ((bits(_S390_LENGTH) != 3) | (bits(_S390_OFFSET) != 0))
    else:
        wrong |= table & (bits((1 << 64) - 1 & ~_S390_SEGMENT_TABLE) != 0)
    return wrong


@question("cont-blocks")
def _cont_entries(batch: Batch) -> tuple[int, BoolArray]:
    joined = batch.context.paging.levels[batch.level].contiguous
    if joined is None or not len(batch.row):
        return 0, np.zeros(len(batch.row), np.bool_)
    count, hint = joined
    marked = ((batch.value & np.uint64(hint)) != 0) & (batch.kind == EntryClass.LEAF)
    places = np.flatnonzero(marked)
    if not len(places):
        return 0, np.zeros(len(batch.row), np.bool_)
    # Entries come in order of table and slot: those of one block follow each other.
    span = np.uint64(batch.context.paging.levels[batch.level].entry_span)
    block = batch.row[places] * (1 << 20) + batch.slot[places] // count
    base = batch.context.paging.leaf_targets(batch.value[places], batch.level, batch.slot[places])
    start = base - (batch.slot[places] % count).astype(np.uint64) * span
    _, first, back, sizes = np.unique(
        block, return_index=True, return_inverse=True, return_counts=True
    )
    whole = np.uint64(span * np.uint64(count))
    wrong = (sizes[back] != count) | (start != start[first][back]) | (start % whole != 0)
    suspect = np.zeros(len(batch.row), np.bool_)
    suspect[places] = wrong
    return len(places), suspect


@question("hugetlb-leaf")
def _hugetlb_leaves(batch: Batch) -> tuple[int, BoolArray]:
    context = batch.context
    asked = context.process_space[batch.space] & (batch.kind == EntryClass.LEAF)
    suspect = np.zeros(len(asked), np.bool_)
    places = np.flatnonzero(asked)
    number = 0
    space, va = batch.space[places], batch.va[places]
    sizes = context.paging.leaf_bytes(batch.value[places], batch.level)
    for one in np.unique(space).tolist():
        areas = context.areas(one)
        if areas is None or not (areas.flags & np.uint64(VM_HUGETLB)).any():
            continue
        here = np.flatnonzero(space == one)
        area = areas.index_of(va[here])
        inside = area >= 0
        inside[inside] = (areas.flags[area[inside]] & np.uint64(VM_HUGETLB)) != 0
        number += int(np.count_nonzero(inside))
        expected = np.array([context.hugetlb_bytes(areas, n) for n in area[inside]], np.uint64)
        wrong = (expected != 0) & (sizes[here[inside]] != expected)
        suspect[places[here[inside][wrong]]] = True
    return number, suspect


@invariant(
    "hugetlb-leaf-size",
    severity=Severity.SUSPICIOUS,
    applies="pages of hugetlb areas; not riscv64",
    source="huge_pte_alloc() and set_huge_pte_at() of each architecture",
    false_positives="none known",
    breaks="a small page mapped into a hugetlb area, the wrong hstate",
)
def hugetlb_leaf_size(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A hugetlb area maps pages of its file's size only.

    All that handles the area works on whole huge pages.
    """
    if context.arch == "riscv64":
        raise NotApplicableError("several entries of riscv64 can make a huge page (Svnapot)")
    batches = _suspects(context, tally, "hugetlb-leaf")
    yield from _leaf_findings(context, batches, "not of the size of its hugetlb area")


@invariant(
    "arm64-cont-blocks",
    severity=Severity.SUSPICIOUS,
    applies="entries with the contiguous hint; arm64",
    source="arch/arm64/mm/contpte.c, hugetlbpage.c; Arm ARM, the Contiguous bit",
    false_positives="contpte folds or unfolds a block just now (the table's lock is held)",
    breaks="one entry of a block changed without unfolding it",
)
def arm64_cont_blocks(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A contiguous hint is set in all entries of its block, and their pages follow each other.

    The hardware keeps one translation for the block: which of several, nobody knows.
    """
    if context.arch != "arm64":
        raise NotApplicableError("only entries of arm64 have the contiguous hint")
    batches = _suspects(context, tally, "cont-blocks")
    yield from _leaf_findings(context, batches, "its contiguous block is not whole")


# Roots.


@invariant(
    "root-not-freed",
    severity=Severity.CORRUPTION,
    applies="the root table of every space",
    source="pgd_alloc(), pgd_free() of each architecture; mm/init-mm.c",
    false_positives="live: the mm was freed between two reads",
    breaks="an mm freed too early (mm_count), a write over mm->pgd",
)
def root_not_freed(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The root table of each space lies in memory that is in use.

    A CPU that runs on a freed root translates through whatever is written there.
    """
    tables, pages = context.tables, context.pages
    roots = np.flatnonzero(tables.parent < 0)
    free = _without_count(context)
    for row in roots.tolist():
        if context.space_of(row).kind is SpaceKind.ISOLATED:
            # The second page of an allocation: its struct page says nothing.
            continue
        tally.examine(1)
        if not context.there[row] or pages.outside[row]:
            yield context.table_finding(row, "the root is where the kernel has no memory")
        elif not pages.readable[row]:
            tally.miss("struct pages of root tables could not be read")
        elif pages.buddy[row] or free[row]:
            yield context.table_finding(
                row,
                "the root is a free page",
                page_type=context.page_reader.name(pages.word(row)),
                refcount=int(pages.refcounts[row]),
            )


@question("swap-valid")
def _swap_entries(batch: Batch) -> tuple[int, BoolArray]:
    context = batch.context
    asked = context.user_space[batch.space] & (batch.kind == EntryClass.SWAP)
    places = np.flatnonzero(asked)
    suspect = np.zeros(len(asked), np.bool_)
    if len(places):
        shift = np.uint64(context.paging.levels[batch.level].swap_type_shift)
        types = batch.value[places] >> shift & np.uint64(31)
        suspect[places] = types >= _swap_files(context)
    return int(np.count_nonzero(context.user_space[batch.space])), suspect


def _swap_files(context: Context) -> int:
    try:
        return int(context.prog["nr_swapfiles"].value_())
    except LookupError:
        # Without CONFIG_SWAP there is none.
        return 0


@invariant(
    "swap-entry-valid",
    severity=Severity.SUSPICIOUS,
    applies="entries of processes",
    source="swp_type() < nr_swapfiles (mm/swapfile.c)",
    false_positives="live: swapoff() in progress",
    breaks="a stray write into a table",
)
def swap_entry_valid(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    An entry without a page that is not empty names a swap area that there is, or a special type.

    The next fault on any other entry kills the process, or reads what is not its own.
    """
    batches = _suspects(context, tally, "swap-valid")
    for batch in batches:
        yield from _value_findings(
            context,
            batch.row.astype(np.intp),
            batch.slot,
            batch.value,
            "names no swap area",
            swap_areas=_swap_files(context),
        )
