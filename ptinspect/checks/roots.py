# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Root tables: their pages, what else names them, and what they share with the kernel's."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from drgn import FaultError

from ptinspect.checks.context import Context
from ptinspect.checks.model import Finding, NotApplicableError, Severity, Tally
from ptinspect.checks.registry import invariant, not_verified
from ptinspect.kernel.direct_map import virtual_to_physical
from ptinspect.kernel.paging.model import object_or_none
from ptinspect.kernel.paging.x86_64 import X86Paging
from ptinspect.memory import read_blocks
from ptinspect.tables.entries import raw_entries
from ptinspect.tables.spaces import SpaceKind


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
    free = context.without_count
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


@invariant(
    "s390-asce-root",
    severity=Severity.CORRUPTION,
    applies="every mm and every CPU; s390",
    source="init_new_context() (arch/s390/include/asm/mmu_context.h), crst_table_upgrade() "
    "(arch/s390/mm/pgalloc.c)",
    false_positives="crst_table_upgrade() in progress (page_table_lock held)",
    breaks="a write over mm->pgd or mm->context, an upgrade of the root gone wrong",
)
def s390_asce_root(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The ASCE of an mm names its pgd, with the type that its address limit asks for; CPUs have it.

    CPUs go by the ASCE, the kernel by mm->pgd: if they differ, it changes the wrong table.
    """
    story = context.census.stories.asces
    if story.absent is not None:
        raise NotApplicableError(story.absent)
    for what in story.missing:
        tally.miss(what)
    spaces = {
        space.name: number
        for number, space in enumerate(context.tables.spaces)
        if space.kind in (SpaceKind.USER, SpaceKind.KERNEL)
    }
    for asce in story.asces:
        tally.examine(1)
        if not asce.problems:
            continue
        message = f"the ASCE of {asce.name}: {'; '.join(asce.problems)}"
        number = spaces.get(asce.name) if asce.kind == "mm" else None
        if number is None:
            evidence = (("asce", asce.value), ("kept_for", asce.kind))
            yield Finding("cpu", asce.value, message, evidence, asce.name, "summary")
            continue
        busy = context.busy(number)
        if busy:
            tally.leave(busy)
            continue
        yield context.mm_finding(
            number, message, asce=asce.value, pgd=asce.pgd or 0, asce_limit=asce.limit or 0
        )


#: Of a process-table entry (arch/powerpc/include/asm/book3s/64/mmu.h): base, size of the root.
_RPDB_MASK, _RPDS_MASK = 0x0FFFFFFFFFFFFF00, 0x1F
#: MMU_NO_CONTEXT: what destroy_context() leaves.
_NO_CONTEXT = (1 << 64) - 1


@invariant(
    "radix-process-table",
    severity=Severity.CORRUPTION,
    applies="every mm; ppc64 with the radix MMU",
    source="radix__init_new_context(), arch_exit_mmap() (arch/powerpc/mm/book3s64/mmu_context.c)",
    false_positives="an mm that exits: its entry is cleared first; one that fork copied and that "
    "has no id of its own yet; live: an mm that ended, and a new one in its place",
    breaks="a context id used twice, a write over the process table or mm->pgd",
)
def radix_process_table(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The process table names, for the context id of each mm, the root table of that mm.

    The hardware finds the tables of a process there, the kernel in mm->pgd.
    """
    table = object_or_none(context.prog, "process_tb")
    if context.arch != "ppc64" or table is None:
        raise NotApplicableError("only ppc64 with the radix MMU has a process table")
    base = int(table.value_())
    size = context.paging.levels[-1].entries.bit_length() - 1
    #: Entries by context id, of the mms that a task has.
    owned: dict[int, int] = {}
    suspects = []
    for number in np.flatnonzero(context.user_space).tolist():
        mm = context.mm(number)
        assert mm is not None
        id = int(mm.context.id.value_())
        if id == _NO_CONTEXT:
            tally.leave("the mm is being torn down")
            continue
        (entry,) = struct.unpack(">Q", context.prog.read(base + 16 * id, 8))
        tally.examine(1)
        space = context.tables.spaces[number]
        if entry & (_RPDB_MASK | _RPDS_MASK) != space.root.address | size:
            suspects.append((number, id, entry))
        elif space.tasks:
            owned[id] = entry
    for number, id, entry in suspects:
        mm = context.mm(number)
        assert mm is not None
        space = context.tables.spaces[number]
        if virtual_to_physical(context.prog, int(mm.pgd.value_())) != space.root.address:
            # Ids, roots and mms are used again at once, so that each look may see the same.
            tally.leave("the mm has another root than a moment before")
        elif not entry and int(mm.mm_users.counter.value_()) <= 0:
            tally.leave("the mm is being torn down")
        elif not space.tasks and owned.get(id) == entry:
            # dup_mm() copies the parent's id; mm_init() makes the root before the id.
            tally.leave("a copy of an mm that has no context id of its own yet")
        else:
            yield context.mm_finding(
                number, "the process table does not name its pgd", entry=entry, context_id=id
            )


#: Entries of x86 root tables.
_X86_ENTRIES, _X86_KERNEL_HALF, _X86_LDT = 512, 256, 512 - 240
_X86_ACCESSED, _X86_NX = 1 << 5, 1 << 63


def _x86_roots(context: Context) -> tuple[list[int], npt.NDArray[np.uint64]]:
    """Read the whole root tables of all mms: numbers of their spaces, entries."""
    numbers = [
        number
        for number in np.flatnonzero(context.user_space).tolist()
        if context.tables.spaces[number].root.level == len(context.paging.levels) - 1
    ]
    addresses = [context.tables.spaces[number].root.address for number in numbers]
    return numbers, _read_roots(context, addresses)


def _read_roots(context: Context, addresses: list[int]) -> npt.NDArray[np.uint64]:
    blocks = read_blocks(context.prog, np.array(addresses, np.uint64), 8 * _X86_ENTRIES)
    if not blocks.readable.all():
        raise FaultError("a root table", addresses[int(np.argmin(blocks.readable))])
    return raw_entries(blocks.data)


def _root_finding(
    context: Context, number: int, address: int, slot: int, message: str, **evidence: int
) -> Finding:
    return Finding(
        "entry",
        address + 8 * slot,
        f"root entry {slot}: {message}",
        tuple(evidence.items()),
        context.tables.spaces[number].name,
        f"show phys:{address + 8 * slot:#x}",
    )


@invariant(
    "x86-kernel-half",
    severity=Severity.CORRUPTION,
    applies="the root table of every mm; x86_64",
    source="pgd_ctor() copies init_mm's, sync_global_pgds_l4/_l5() and "
    "preallocate_vmalloc_pages() keep them the same (arch/x86/mm/init_64.c)",
    false_positives="live: the kernel's root got an entry between two reads (memory hotplug)",
    breaks="a kernel mapping that was not pushed to all roots, a stray write into a root",
)
def x86_kernel_half(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The kernel half of each root table is that of init_mm, but for the entry of the LDT.

    Otherwise the kernel sees other memory, or faults, depending on the process it runs for.
    """
    if context.arch != "x86_64":
        raise NotApplicableError("only x86 keeps a copy of the kernel's part in every root")
    kernel = context.census.spaces.kernel
    if kernel is None:
        tally.miss("the kernel's root table was not found")
        return
    # Roots that are init_mm's own (tboot) are no copies.
    numbers, roots = _x86_roots(context)
    reference = _read_roots(context, [kernel.root.address])[0]
    mask = np.uint64(~_X86_ACCESSED & (1 << 64) - 1)
    for place, number in enumerate(numbers):
        tally.examine(_X86_KERNEL_HALF)
        differs = (roots[place] & mask) != (reference & mask)
        differs[:_X86_KERNEL_HALF] = False
        differs[_X86_LDT] = False
        address = context.tables.spaces[number].root.address
        for slot in np.flatnonzero(differs).tolist():
            yield _root_finding(
                context,
                number,
                address,
                slot,
                "not what the kernel's own root has there",
                entry=int(roots[place][slot]),
                kernel_entry=int(reference[slot]),
            )


@invariant(
    "x86-pti-user-root",
    severity=Severity.CORRUPTION,
    applies="the second root table of every mm; x86_64 with page-table isolation",
    source="__pti_set_user_pgtbl() (arch/x86/mm/pti.c), clone_pgd_range()",
    false_positives="an entry that is being set: first the user's root, then the kernel's",
    breaks="an entry set in one of the two roots only, a stray write",
)
def x86_pti_user_root(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The root on which user mode runs has the same user half, and of the kernel only the clones.

    More of the kernel there is what page-table isolation is meant to hide; less of the user half
    is a page fault without end.
    """
    if not isinstance(context.paging, X86Paging) or not context.paging.isolated:
        raise NotApplicableError("no page-table isolation")
    spaces = context.tables.spaces
    second = {
        space.mm.address: space.root.address
        for space in spaces
        if space.kind is SpaceKind.ISOLATED and space.mm is not None and space.symbol != "init_mm"
    }
    clones = next(
        (s for s in spaces if s.kind is SpaceKind.ISOLATED and s.symbol == "init_mm"), None
    )
    if clones is None:
        tally.miss("the kernel's second root table was not found")
        return
    reference = _read_roots(context, [clones.root.address])[0]
    numbers, roots = _x86_roots(context)
    for place, number in enumerate(numbers):
        mm = spaces[number].mm
        address = second.get(mm.address) if mm is not None else None
        if address is None:
            continue
        own = _read_roots(context, [address])[0]
        tally.examine(_X86_ENTRIES)
        expected = roots[place].copy()
        expected[_X86_KERNEL_HALF:] = reference[_X86_KERNEL_HALF:]
        ignored = np.full(_X86_ENTRIES, _X86_ACCESSED, np.uint64)
        # The kernel's copy of what user mode executes is made not executable.
        ignored[:_X86_KERNEL_HALF] |= np.uint64(_X86_NX)
        differs = (own & ~ignored) != (expected & ~ignored)
        differs[_X86_LDT] = False
        for slot in np.flatnonzero(differs).tolist():
            busy = context.busy(number)
            if busy:
                tally.leave(busy)
                continue
            yield _root_finding(
                context,
                number,
                address,
                slot,
                "not what page-table isolation puts there",
                entry=int(own[slot]),
                expected=int(expected[slot]),
            )


not_verified(
    "efi-subset",
    "The entries of efi_mm from PAGE_OFFSET on are those of init_mm.",
    "no kernel of the lab runs on EFI firmware, so that it could not be proven; summary and map "
    "show efi_mm",
)
not_verified(
    "empty-user-table",
    "A table of a process has an entry.",
    "healthy kernels keep empty tables: only a zap of a whole table frees one (PT_RECLAIM); "
    "summary and ps count them and their bytes",
)
