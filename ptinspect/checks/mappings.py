# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What spaces map: whether the pages, their sizes and permissions are those of their areas."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ptinspect.checks.context import Context
from ptinspect.checks.leaves import Batch, leaf_findings, question, suspects
from ptinspect.checks.model import Finding, NotApplicableError, Severity, Tally
from ptinspect.checks.registry import invariant
from ptinspect.kernel.paging import EntryClass, Permission
from ptinspect.memory import BoolArray
from ptinspect.tables.spaces import SpaceKind
from ptinspect.tables.vmas import VM_HUGETLB, VM_MIXEDMAP, VM_PFNMAP

#: VSYSCALL_ADDR (arch/x86/include/uapi/asm/vsyscall.h)
_VSYSCALL = 0xFFFFFFFFFF600000


@question("leaf-in-vma")
def _leaf_outside(batch: Batch) -> tuple[int, BoolArray]:
    context = batch.context
    asked = context.process_space[batch.space]
    asked &= context.user_half(batch.va)
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
    batches = suspects(context, tally, "leaf-in-vma")
    for space in np.flatnonzero(context.process_space).tolist():
        if context.areas_problem(space):
            name = context.tables.spaces[space].name
            tally.miss(f"the areas of {name} cannot be read: {context.areas_problem(space)}")
    for finding in leaf_findings(context, batches, "lies in no memory area"):
        space = _space_of_finding(context, finding)
        busy = context.busy(space) if space is not None else ""
        if busy:
            tally.leave(busy)
        else:
            yield finding


def _space_of_finding(context: Context, finding: Finding) -> int | None:
    for number, space in enumerate(context.tables.spaces):
        if space.name == finding.owner and space.kind is SpaceKind.USER:
            return number
    return None


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
    batches = suspects(context, tally, "leaf-not-table")
    for batch in batches:
        keep = np.ones(len(batch.row), np.bool_)
        for n in range(len(batch.row)):
            areas = context.areas(int(batch.space[n]))
            if areas is None:
                continue
            place = int(areas.index_of(batch.va[n : n + 1])[0])
            flags = int(areas.flags[place]) if place >= 0 else 0
            keep[n] = not flags & (VM_PFNMAP | VM_MIXEDMAP)
        yield from leaf_findings(context, [batch.take(keep)], "maps a page table")


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
    batches = suspects(context, tally, "kernel-no-user")
    yield from leaf_findings(context, batches, "user mode may use a kernel mapping")


@question("user-no-kernel")
def _user_kernel_leaf(batch: Batch) -> tuple[int, BoolArray]:
    context = batch.context
    asked = context.process_space[batch.space] & (batch.kind == EntryClass.LEAF)
    asked &= context.user_half(batch.va)
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
    batches = suspects(context, tally, "user-no-kernel")
    yield from leaf_findings(context, batches, "only the kernel may use a mapping of a process")


@question("hugetlb-leaf")
def _hugetlb_leaves(batch: Batch) -> tuple[int, BoolArray]:
    context = batch.context
    asked = context.process_space[batch.space] & (batch.kind == EntryClass.LEAF)
    suspect = np.zeros(len(asked), np.bool_)
    places = np.flatnonzero(asked)
    number = 0
    space, va = batch.space[places], batch.va[places]
    for one in np.unique(space).tolist():
        areas = context.areas(one)
        if areas is None or not (areas.flags & np.uint64(VM_HUGETLB)).any():
            continue
        here = np.flatnonzero(space == one)
        area = areas.index_of(va[here])
        inside = area >= 0
        inside[inside] = (areas.flags[area[inside]] & np.uint64(VM_HUGETLB)) != 0
        number += int(np.count_nonzero(inside))
        here = places[here[inside]]
        expected = np.array([context.hugetlb_bytes(areas, n) for n in area[inside]], np.uint64)
        sizes = context.paging.leaf_bytes(batch.value[here], batch.level)
        suspect[here] = (expected != 0) & (sizes != expected)
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
    batches = suspects(context, tally, "hugetlb-leaf")
    yield from leaf_findings(context, batches, "not of the size of its hugetlb area")
