# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the members of descriptors may say."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from drgn import FaultError, Object, offsetof

from ptinspect.checks.context import Context
from ptinspect.checks.model import Finding, NotApplicableError, Severity, Tally
from ptinspect.checks.registry import invariant
from ptinspect.kernel.descriptor import flags_bit, page_type_test, ptdesc_is_native, ptdesc_type
from ptinspect.kernel.paging.model import object_or_none
from ptinspect.lists import walk_both_ways
from ptinspect.state.fields import list_poison_name
from ptinspect.tables.spaces import Space, SpaceKind

#: PAGE_FLAGS_CHECK_AT_FREE (include/linux/page-flags.h), without the bits of the multi-gen LRU.
_ILLEGAL_FLAGS = (
    "PG_lru",
    "PG_locked",
    "PG_private",
    "PG_private_2",
    "PG_writeback",
    "PG_reserved",
    "PG_active",
    "PG_unevictable",
    "PG_mlocked",
)
_MEMCG_DATA_OBJEXTS, _MEMCG_DATA_KMEM, _MEMCG_DATA_FLAGS = 1, 2, 7


def _miss_unscanned(context: Context, tally: Tally) -> None:
    """Note the struct pages that the scan could not read: tables may be among them."""
    unreadable = context.census.scan.unreadable_pages
    if unreadable:
        tally.miss(f"{unreadable} struct pages could not be read")


@invariant(
    "desc-refcount-one",
    severity=Severity.CORRUPTION,
    applies="every typed page",
    source="pagetable_alloc() gives one reference, pagetable_free() drops it; s390 6.1 keeps the "
    "state of its two halves in the upper 8 bits (arch/s390/mm/pgalloc.c)",
    false_positives="somebody looks at the page by its number just now (compaction, "
    "memory failure); before pt_share_count, sharers of hugetlb tables were references",
    breaks="a reference leaked or dropped once too often by a walker of page frames",
)
def desc_refcount_one(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A page-table page has exactly one reference.

    With none it is free while it is used; with more it stays when its table is freed.
    """
    count = context.columns("__page_refcount") & np.uint64(0xFFFFFFFF)
    shown = count.copy()
    if context.arch == "s390x" and not ptdesc_is_native(context.prog):
        count &= np.uint64(0xFFFFFF)
    _miss_unscanned(context, tally)
    tally.examine(len(count))
    for index in np.flatnonzero(count != 1).tolist():
        if not context.has_column("pt_share_count") and _shared(context, index) == count[index]:
            continue
        yield context.descriptor_finding(
            index, f"{int(shown[index])} references, not 1", refcount=int(shown[index])
        )


def _shared(context: Context, index: int) -> int:
    """Get the number of entries that point to a PMD table; 0 for other tables."""
    rows = context.census.rows_of(index)
    rows = rows[(context.tables.parent[rows] >= 0) & context.user_space[context.tables.space[rows]]]
    return len(rows) if len(rows) and (context.tables.level[rows] == 1).all() else 0


@invariant(
    "desc-mapping-zero",
    severity=Severity.CORRUPTION,
    applies="every typed page",
    source="page_expected_state() in mm/page_alloc.c; no writer in 6.1, 6.12, 7.3",
    false_positives="none known",
    breaks="a page used for file or anonymous memory while it is a table",
)
def desc_mapping_zero(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The word of a descriptor that is page->mapping is zero.

    The allocator takes any other value for a bad page when the table is freed.
    """
    if not context.has_column("__page_mapping"):
        raise NotApplicableError("this kernel's descriptor has no __page_mapping")
    mapping = context.columns("__page_mapping")
    _miss_unscanned(context, tally)
    tally.examine(len(mapping))
    for index in np.flatnonzero(mapping).tolist():
        value = int(mapping[index])
        yield context.descriptor_finding(index, "mapping is not zero", mapping=value)


@invariant(
    "desc-flags-legal",
    severity=Severity.CORRUPTION,
    applies="every typed page",
    source="PAGE_FLAGS_CHECK_AT_FREE (include/linux/page-flags.h); powerpc since 6.6 marks a "
    "table that waits for RCU with PG_active (arch/powerpc/mm/pgtable-frag.c)",
    false_positives="none known",
    breaks="a page that is locked, cached or reclaimed while it is a table",
)
def desc_flags_legal(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A descriptor has none of the flags that only pages of files, processes or firmware have.

    The allocator takes each of them for a bad page when the table is freed.
    """
    illegal = 0
    for name in _ILLEGAL_FLAGS:
        if name == "PG_active" and context.arch == "ppc64" and ptdesc_is_native(context.prog):
            continue
        illegal |= flags_bit(context.prog, name) or 0
    flags = context.columns("pt_flags")
    _miss_unscanned(context, tally)
    tally.examine(len(flags))
    for index in np.flatnonzero(flags & np.uint64(illegal)).tolist():
        value = int(flags[index])
        names = [n for n in _ILLEGAL_FLAGS if value & illegal & (flags_bit(context.prog, n) or 0)]
        yield context.descriptor_finding(
            index, f"flags that no table has: {' '.join(names)}", flags=value, illegal=illegal
        )


@invariant(
    "desc-type-canonical",
    severity=Severity.CORRUPTION,
    applies="every typed page",
    source="__folio_set_pgtable() and __SetPageTable() (include/linux/page-flags.h)",
    false_positives="none known",
    breaks="a write over page_type, which is also the mapcount of mapped pages",
)
def desc_type_canonical(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The page type of a table is written by one function, which leaves no other bits.

    Other bits there mean that somebody counted mappings of the page.
    """
    canonical = page_type_test(context.prog).canonical
    types = context.columns("__page_type") & np.uint64(0xFFFFFFFF)
    _miss_unscanned(context, tally)
    tally.examine(len(types))
    for index in np.flatnonzero(types != canonical).tolist():
        yield context.descriptor_finding(
            index, "page_type has other bits too", page_type=int(types[index]), expected=canonical
        )


@invariant(
    "pt-kernel-agrees",
    severity=Severity.CORRUPTION,
    applies="tables of mms; kernels with PT_kernel (7.x)",
    source="ptdesc_set_kernel() (include/linux/mm.h) is called for init_mm only",
    false_positives="none known",
    breaks="a table of init_mm linked into a process, a stray write over the flags",
)
def pt_kernel_agrees(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    No table that a process reaches is marked as a kernel table.

    A marked table is freed by another way, after other flushes. The reverse is not claimed: some
    kernel tables are made without the mark.
    """
    bit = flags_bit(context.prog, "PT_kernel")
    if bit is None:
        raise NotApplicableError("this kernel does not mark kernel tables (no PT_kernel)")
    flags = context.columns("pt_flags")
    reached = context.descriptors_of(context.user_space)
    tally.examine(len(reached))
    for index in reached[(flags[reached] & np.uint64(bit)) != 0].tolist():
        value = int(flags[index])
        yield context.descriptor_finding(
            index, "a process reaches a table that is marked PT_kernel", flags=value
        )


@invariant(
    "x86-pgd-mm",
    severity=Severity.CORRUPTION,
    applies="every pgd on pgd_list and every mm; x86_64",
    source="pgd_ctor(), pgd_set_mm(), pgd_dtor() (arch/x86/mm/pgtable.c)",
    false_positives="an mm that is being built or freed just now",
    breaks="a freed mm whose pgd stayed on the list, a write over pt_mm or mm->pgd",
)
def x86_pgd_mm(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Each pgd on pgd_list names the mm whose pgd it is, and the pgd of each mm is on the list.

    New kernel mappings are written into all pgds of the list, under the lock of the mm that each
    names.
    """
    prog = context.prog
    head = object_or_none(prog, "pgd_list")
    if context.arch != "x86_64" or head is None:
        raise NotApplicableError("only x86 keeps a list of its pgds")
    offset = offsetof(ptdesc_type(prog), "pt_list")
    walk = walk_both_ways(prog, head.address_of_().value_())
    listed = np.array([node - offset for node in walk.nodes], np.uint64)
    if walk.lost:
        tally.miss(f"pgd_list breaks: {walk.breaks[0]}")
    pfns, known = context.page_reader.pfns(listed)
    records = context.page_reader.read(pfns)
    roots: dict[int, Space] = {}
    for space in context.tables.spaces:
        if space.kind is SpaceKind.USER and space.mm is not None:
            roots[space.root.address // context.paging.page_bytes] = space
    for n, address in enumerate(listed.tolist()):
        if not known[n] or not records.readable[n]:
            tally.miss(f"the node of pgd_list in {address:#x} is in no struct page")
            continue
        tally.examine(1)
        pfn = int(pfns[n])
        mm = int(records.records["pt_mm"][n])
        named = roots.get(pfn)
        if named is not None and named.mm is not None and named.mm.address == mm:
            continue
        yield from _judge_pgd(context, tally, address, pfn, mm)
    on_list = {int(pfn) for pfn, there in zip(pfns, known) if there}
    for pfn, space in roots.items():
        tally.examine(1)
        if pfn not in on_list and not walk.lost:
            number = context.tables.spaces.index(space)
            yield context.mm_finding(number, "its pgd is not on pgd_list", pgd_pfn=pfn)


def _judge_pgd(
    context: Context, tally: Tally, address: int, pfn: int, mm: int
) -> Iterator[Finding]:
    """Look at a pgd on the list that is no known mm's."""
    evidence = {"pfn": pfn, "pt_mm": mm}
    message = "a pgd on pgd_list names no mm"
    try:
        named = Object(context.prog, "struct mm_struct *", mm)
        pgd = int(named.pgd.value_())
        evidence["pgd_of_mm"] = pgd
        users, count = int(named.mm_users.counter), int(named.mm_count.counter)
        page = context.paging.page_bytes
        if pgd and context.paging.virtual_to_physical(context.prog, pgd) // page == pfn:
            return
        if users == 1 and count == 1 and int(named.map_count) == 0:
            # mm_init() puts the pgd on the list before it is the mm's.
            tally.leave("an mm is being built")
            return
        message = "a pgd on pgd_list names an mm that has another pgd"
    except FaultError:
        if context.in_a_hole(mm):
            tally.miss(f"the mm at {mm:#x} cannot be read")
            return
        evidence["pgd_of_mm"] = 0
    yield Finding("ptdesc", address, message, tuple(evidence.items()), look=f"show pfn:{pfn:#x}")


@invariant(
    "share-count",
    severity=Severity.CORRUPTION,
    applies="PMD tables of mms; kernels that count sharers in pt_share_count",
    source="huge_pmd_share(), huge_pmd_unshare() (mm/hugetlb.c), pagetable_pmd_ctor()",
    false_positives="huge_pmd_share() counts before it links (i_mmap_rwsem held)",
    breaks="a sharer that went without counting, or was counted twice",
)
def share_count(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A PMD table is shared by one mm more than its count of sharers says.

    With a count that is too low the table is freed while another mm uses it; with one that is
    too high it is never freed.
    """
    if not context.has_column("pt_share_count"):
        raise NotApplicableError("this kernel's descriptor has no pt_share_count")
    tables = context.tables
    rows = np.flatnonzero(
        context.user_space[tables.space] & (tables.level == 1) & (tables.parent >= 0)
    )
    rows = rows[context.census.descriptor[rows] >= 0]
    index, parents = np.unique(context.census.descriptor[rows], return_counts=True)
    counted = context.columns("pt_share_count")[index].astype(np.int64)
    tally.examine(len(index))
    whole = not context.census.spaces.notes and tables.complete
    for place in np.flatnonzero(counted != parents - 1).tolist():
        if counted[place] > parents[place] - 1 and not whole:
            tally.miss("not every space could be walked: some sharers may be unseen")
            continue
        busy = context.busy(int(tables.space[context.census.rows_of(int(index[place]))[0]]))
        if busy:
            tally.leave(busy)
            continue
        yield context.descriptor_finding(
            int(index[place]),
            f"{int(parents[place])} entries point here, "
            f"but pt_share_count says {int(counted[place])} besides the first",
            pt_share_count=int(counted[place]),
            entries=int(parents[place]),
        )


@invariant(
    "memcg-data-sane",
    severity=Severity.ACCOUNTING,
    applies="every typed page; kernels with memory cgroups",
    source="__memcg_kmem_charge_page() (mm/memcontrol.c), enum page_memcg_data_flags",
    false_positives="none known",
    breaks="a write over memcg_data, a cgroup that was freed while pages were charged to it",
)
def memcg_data_sane(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A table is charged to nobody, or as kernel memory to an object cgroup that belongs to a cgroup.

    Uncharging follows the pointer when the table is freed.
    """
    if not context.has_column("pt_memcg_data"):
        raise NotApplicableError("this kernel has no memory cgroups")
    subsystem = object_or_none(context.prog, "memory_cgrp_subsys")
    data = context.columns("pt_memcg_data")
    _miss_unscanned(context, tally)
    tally.examine(len(data))
    flags = data & np.uint64(_MEMCG_DATA_FLAGS)
    charged = data != 0
    wrong = charged & (flags != _MEMCG_DATA_KMEM)
    for index in np.flatnonzero(wrong).tolist():
        yield context.descriptor_finding(
            index, "charged, but not as kernel memory", memcg_data=int(data[index])
        )
    if subsystem is None:
        return
    address = subsystem.address_of_().value_()
    pointers = data & np.uint64(~_MEMCG_DATA_FLAGS & (1 << 64) - 1)
    for pointer in np.unique(pointers[charged & ~wrong]).tolist():
        problem = _objcg_problem(context, tally, pointer, address)
        if problem:
            for index in np.flatnonzero(charged & ~wrong & (pointers == pointer)).tolist():
                yield context.descriptor_finding(index, problem, memcg_data=int(data[index]))


def _objcg_problem(context: Context, tally: Tally, pointer: int, subsystem: int) -> str:
    """Say what is wrong with an obj_cgroup; empty if nothing is."""
    try:
        objcg = Object(context.prog, "struct obj_cgroup *", pointer)
        memcg = objcg.memcg.read_()
        if not memcg:
            return "charged to an object cgroup without a cgroup"
        if memcg.css.ss.value_() != subsystem:
            return "charged to what is no object cgroup"
    except FaultError:
        if context.in_a_hole(pointer):
            tally.miss(f"the object cgroup at {pointer:#x} cannot be read")
            return ""
        return "charged to an address that cannot be read"
    return ""


@invariant(
    "pmd-huge-pte-user-only",
    severity=Severity.SUSPICIOUS,
    applies="typed PMD tables of the kernel; kernels with transparent huge pages",
    source="pagetable_pmd_ctor(), pmd_ptlock_init() (include/linux/mm.h): 7.x leaves the word of "
    "kernel tables as the allocator left it, older kernels clear it",
    false_positives="none known",
    breaks="a huge kernel mapping treated as one of a process",
)
def pmd_huge_pte_user_only(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    No PMD table of the kernel has deposited tables.

    Nothing would ever withdraw them.
    """
    thp = object_or_none(context.prog, "transparent_hugepage_flags")
    if thp is None or not context.has_column("pmd_huge_pte"):
        raise NotApplicableError("this kernel has no transparent huge pages")
    bare = flags_bit(context.prog, "PT_kernel") is not None
    words = context.columns("pmd_huge_pte")
    index = context.descriptors_of(context.kernel_space, level=1)
    tally.examine(len(index))
    for one in index[words[index] != 0].tolist():
        value = int(words[one])
        if bare and list_poison_name(value) == "LIST_POISON2":
            continue
        yield context.descriptor_finding(
            one, "a PMD table of the kernel seems to have deposited tables", pmd_huge_pte=value
        )
