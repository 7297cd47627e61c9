# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Whose each root table is: ``pt_mm`` of x86's PGDs, set against the mm that it names.

x86 writes the mm into the descriptor of each PGD that pgd_alloc() makes, and never clears it
(pgd_set_mm() in arch/x86/mm/pgtable.c). Other architectures leave the word alone: there the mm is
known only from the side of the mm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Object, Program, offsetof
from drgn.helpers.linux.mm import PageSlab, compound_head

from ptinspect.kernel.descriptor import (
    byte_order,
    descriptors_are_typed,
    ptdesc_dtype,
    ptdesc_has_member,
)
from ptinspect.kernel.direct_map import direct_map_offset
from ptinspect.memory import AddressArray, BoolArray, read_blocks
from ptinspect.state.lists import PGD_LIST, Lists
from ptinspect.state.told import Told
from ptinspect.tables.memmap import Memmap
from ptinspect.tables.scan import compound_orders
from ptinspect.tables.spaces import SpaceKind
from ptinspect.tables.walk import Tables


class Verdict(Enum):
    """Whether a PGD and its mm agree."""

    AGREES = "agrees"
    #: Not x86: nothing is written into the descriptor.
    NOT_RECORDED = "not recorded here"
    NO_MM = "pt_mm is NULL"
    MM_UNREADABLE = "the mm cannot be read"
    OTHER_PGD = "the mm's pgd is another table"
    OTHER_MM = "two mms have this table as their pgd"
    NOT_LISTED = "not on pgd_list"
    DESCRIPTOR_UNREADABLE = "the descriptor cannot be read"


@dataclass(frozen=True)
class PgdOwner:
    """A root table of an mm and what its descriptor says about it."""

    #: Physical address of the table.
    table: int
    #: Address of the ``struct ptdesc``; ``None`` for a small root that is a slab object.
    ptdesc: int | None
    #: Place on pgd_list, from 0; ``None`` if it is not there.
    position: int | None
    #: What ``pt_mm`` says; ``None`` where it is no value.
    pt_mm: int | None
    #: Index into the spaces of the walk; ``None`` if no mm has this table.
    space: int | None
    #: Pages of the allocation: 2 where page-table isolation needs a second root for user mode;
    #: ``None`` for a slab object.
    pages: int | None
    #: Physical address of that second root, if it is in use.
    user_half: int | None
    verdict: Verdict


@dataclass(frozen=True)
class Owners:
    """The root tables of all mms: those on pgd_list in its order, then those that are not."""

    pgds: tuple[PgdOwner, ...]
    #: Whether this kernel writes ``pt_mm``.
    recorded: bool
    missing: tuple[str, ...]
    #: What contradicts itself, in sentences.
    findings: tuple[str, ...]


def read_owners(prog: Program, tables: Tables, lists: Lists) -> Owners:
    """Set each PGD against the mm that it names, and each mm against its PGD."""
    recorded = tables.paging.architecture == "x86_64" and ptdesc_has_member(prog, "pt_mm")
    listed = lists.named(PGD_LIST)
    users = [n for n, space in enumerate(tables.spaces) if space.kind is SpaceKind.USER]
    halves = {
        space.mm.address: space.root.address
        for space in tables.spaces
        if space.kind is SpaceKind.ISOLATED and space.mm is not None
    }
    page_bytes = tables.paging.page_bytes
    on_list = [] if listed is None else [pfn * page_bytes for pfn in listed.pfns]
    by_root = {tables.spaces[n].root.address: n for n in reversed(users)}
    claimed = {by_root[root] for root in on_list if root in by_root}
    # What has the root of another mm, or none on the list, has a row of its own.
    spaces = [*map(by_root.get, on_list), *(n for n in users if n not in claimed)]
    rest = [tables.spaces[n].root.address for n in spaces[len(on_list) :] if n is not None]
    roots = np.array([*on_list, *rest], np.uint64)
    ptdescs, known = Memmap(prog).pages_of(roots)
    dtype = ptdesc_dtype(prog)
    blocks = read_blocks(prog, ptdescs, dtype.itemsize, physical=False)
    descriptors = blocks.data.view(dtype).reshape(-1)
    readable = blocks.readable & known
    pages = _pages(prog, ptdescs, descriptors, readable, recorded)
    named = descriptors["pt_mm"].astype(np.uint64) if recorded else np.zeros(len(roots), np.uint64)
    mm_pgds, mm_readable = _pgds_of(prog, named)
    virtual = roots + np.uint64(direct_map_offset(prog))
    owners = []
    for row, (root, number) in enumerate(zip(roots.tolist(), spaces)):
        space = None if number is None else tables.spaces[number]
        mm = None if space is None else space.mm
        slab = not recorded and bool(readable[row]) and _in_slab(prog, int(ptdescs[row]))
        count = int(pages[row])
        if space is not None:
            # s390's tables and powerpc's roots are larger than a page, and not always compound.
            size = tables.paging.levels[space.root.level].table_bytes
            count = max(count, size // page_bytes)
        verdict = Verdict.NOT_RECORDED
        if not readable[row]:
            verdict = Verdict.DESCRIPTOR_UNREADABLE
        elif recorded:
            verdict = _verdict(
                int(named[row]),
                bool(mm_readable[row]),
                mm_pgds[row] == virtual[row],
                mm is None or mm.address == int(named[row]),
                row < len(on_list),
            )
        owners.append(
            PgdOwner(
                table=root,
                ptdesc=None if slab else int(ptdescs[row]),
                position=row if row < len(on_list) else None,
                pt_mm=int(named[row]) if recorded and readable[row] else None,
                space=number,
                pages=None if slab else count,
                user_half=None if mm is None else halves.get(mm.address),
                verdict=verdict,
            )
        )
    lost = int(np.count_nonzero(~readable))
    missing = (f"{lost} descriptors of PGDs cannot be read",) if lost else ()
    # A list that breaks leaves out PGDs that are on it.
    whole = listed is not None and not listed.problems
    return Owners(tuple(owners), recorded, missing, tuple(_findings(owners, tables, whole)))


def _in_slab(prog: Program, page: int) -> bool:
    """Whether a root lies among others in a slab page (arm64's pgd_cache), without descriptor."""
    try:
        return bool(PageSlab(compound_head(Object(prog, "struct page *", page))))
    except FaultError:
        return False


def _verdict(pt_mm: int, readable: bool, same_pgd: bool, same_mm: bool, listed: bool) -> Verdict:
    if not pt_mm:
        return Verdict.NO_MM
    if not readable:
        return Verdict.MM_UNREADABLE
    if not same_pgd:
        return Verdict.OTHER_PGD
    if not same_mm:
        return Verdict.OTHER_MM
    return Verdict.AGREES if listed else Verdict.NOT_LISTED


def _pgds_of(prog: Program, mms: AddressArray) -> tuple[AddressArray, BoolArray]:
    """Read ``pgd`` of each mm."""
    offset = offsetof(prog.type("struct mm_struct"), "pgd")
    words = read_blocks(prog, mms + np.uint64(offset), 8, physical=False)
    pgds = words.data.reshape(-1).view(f"{byte_order(prog)}u8").astype(np.uint64)
    return pgds, words.readable & (mms != 0)


def _pages(
    prog: Program,
    ptdescs: AddressArray,
    descriptors: npt.NDArray[np.void],
    readable: BoolArray,
    recorded: bool,
) -> npt.NDArray[np.int64]:
    """Get the pages of each PGD's allocation."""
    orders = np.zeros(len(ptdescs), np.int64)
    good = np.flatnonzero(readable)
    orders[good] = compound_orders(prog, ptdescs[good], descriptors[good])[0]
    if recorded and _has_isolation(prog):
        # Before PGDs were typed they were no compound pages, and of two pages whether or not
        # isolation was on (PGD_ALLOCATION_ORDER in arch/x86/include/asm/pgalloc.h of 6.12).
        orders[readable & ~descriptors_are_typed(prog, descriptors)] = 1
    pages: npt.NDArray[np.int64] = np.left_shift(np.int64(1), orders)
    return pages


def _has_isolation(prog: Program) -> bool:
    """Whether the kernel is built with page-table isolation (arch/x86/mm/pti.c)."""
    try:
        prog.symbol("__pti_set_user_pgtbl")
    except LookupError:
        return False
    return True


def _findings(owners: list[PgdOwner], tables: Tables, whole: bool) -> Iterator[str]:
    for owner in owners:
        name = "no mm" if owner.space is None else tables.spaces[owner.space].name
        if owner.verdict in (Verdict.AGREES, Verdict.NOT_RECORDED, Verdict.DESCRIPTOR_UNREADABLE):
            continue
        if owner.verdict is Verdict.NOT_LISTED and not whole:
            continue
        yield (
            f"PGD {owner.table:#x} of {name}, pt_mm {owner.pt_mm or 0:#x}: {owner.verdict.value}"
        )


def tell_owners(story: Owners, tables: Tables, ptdesc: int) -> Iterator[Told]:
    """Say which mm a PGD names, and whether the mm agrees."""
    if not story.recorded:
        return
    for owner in story.pgds:
        if owner.ptdesc == ptdesc:
            space = None if owner.space is None else tables.spaces[owner.space]
            if space is None or space.mm is None:
                yield Told(owner.verdict.value, "pt_mm")
                continue
            users = f"mm_users {space.mm.users}, mm_count {space.mm.count}"
            yield Told(f"mm of {space.name}, {users}; {owner.verdict.value}", "pt_mm")
