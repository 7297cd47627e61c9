# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Deposits: the PTE tables that wait beside a huge page for the day when it is split.

They hang on a ring without a head, which begins at ``pmd_huge_pte`` of the PMD table's descriptor
(of the mm where PMD tables have no lock of their own). The node is ``lru`` of the spare table's
struct page, or, where ``pgtable_t`` is the address of a table, the first 16 bytes of the table.
Radix powerpc with 64K pages has one ring for all PMD tables of a page. (Hash powerpc keeps its
spare tables in the second half of the PMD table; its tables are not walked at all.)
Sources: pgtable_trans_huge_deposit() in mm/pgtable-generic.c, arch/s390/mm/pgtable.c and
arch/powerpc/mm/book3s64/radix_pgtable.c; pmd_huge_pte() in include/linux/mm.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from drgn import Object, Program, TypeKind, offsetof

from ptinspect.errors import IncompleteError
from ptinspect.kernel.descriptor import (
    descriptors_are_typed,
    ptdesc_dtype,
    ptdesc_has_member,
    ptdesc_member,
    ptdesc_type,
)
from ptinspect.kernel.direct_map import direct_map_offset
from ptinspect.kernel.paging.model import object_or_none
from ptinspect.lists import BreakReason, ListBreak, walk_list_at
from ptinspect.memory import AddressArray, BoolArray, among, read_blocks
from ptinspect.state.huge_leaves import HugePage, read_huge_leaves
from ptinspect.state.pmd_tables import PmdTables
from ptinspect.state.told import Told
from ptinspect.tables.memmap import Memmap
from ptinspect.tables.walk import Tables


@dataclass(frozen=True)
class DepositRing:
    """The spare tables on one PMD table, or whatever else has a ring, beside what needs them."""

    #: Index into the spaces of the walk: the mm that the PMD table belongs to.
    space: int
    #: Address of the ``struct ptdesc`` that the ring begins at; ``None`` if it begins at the mm.
    ptdesc: int | None
    #: Physical addresses of the PMD tables whose huge pages the ring serves.
    pmd_tables: tuple[int, ...]
    #: Physical addresses of the spare tables; the first is the next to be withdrawn.
    tables: tuple[int, ...]
    #: Entries of the PMD tables that map huge pages, by :class:`HugePage`.
    huge: tuple[int, int, int, int]
    #: Where the ring is broken or wrong; ``None`` if it is whole.
    problem: str | None
    #: Whether it could be read where the ring begins; if not, there may be one that is not seen.
    known: bool = True

    @property
    def needed(self) -> int:
        """Huge pages that surely need a deposited table."""
        return self.huge[HugePage.ANONYMOUS] + self.huge[HugePage.ZERO]

    @property
    def undecided(self) -> int:
        """Huge pages that may or may not need one."""
        return self.huge[HugePage.UNDECIDED]

    @property
    def agrees(self) -> bool | None:
        """Whether there are as many tables as are needed; ``None`` if not all could be seen."""
        if self.problem is not None or not self.known:
            return None
        return self.needed <= len(self.tables) <= self.needed + self.undecided


@dataclass(frozen=True)
class Deposits:
    """All deposited tables of a target."""

    #: Where there is a deposited table or a huge page that may need one, in order of the walk.
    rings: tuple[DepositRing, ...]
    #: Whether this kernel has transparent huge pages at all.
    supported: bool
    #: Whether the rings begin at the mms (no split PMD locks).
    in_mm: bool
    #: Whether the list nodes lie in the tables themselves (s390, powerpc).
    node_in_table: bool
    #: uint64: page frames of the spare tables.
    held_pfns: npt.NDArray[np.uint64]
    #: What could not be seen, in sentences; broken rings are among it.
    missing: tuple[str, ...]
    #: Rings with more or fewer tables than are needed, in sentences.
    findings: tuple[str, ...]

    @property
    def unseen(self) -> tuple[str, ...]:
        """What could not be seen, apart from what lies behind a break of a ring."""
        problems = {ring.problem for ring in self.rings if ring.problem is not None}
        return tuple(
            what for what in self.missing if not any(problem in what for problem in problems)
        )


class _Shape(NamedTuple):
    """How this kernel links deposited tables."""

    in_mm: bool
    #: Offset of the list node in ``struct page``; ``None`` if it is in the table.
    node_offset: int | None


def _shape(prog: Program) -> _Shape | None:
    """Get the shape, or ``None`` if this kernel deposits nothing."""
    # Without CONFIG_TRANSPARENT_HUGEPAGE the member is never initialised.
    if object_or_none(prog, "transparent_hugepage_flags") is None:
        return None
    # CONFIG_SPLIT_PMD_PTLOCKS (USE_SPLIT_PMD_PTLOCKS before 6.12) is a macro; mm_struct has the
    # member if it is not set (include/linux/mm_types.h).
    in_mm = prog.type("struct mm_struct").has_member("pmd_huge_pte")
    if not in_mm and not ptdesc_has_member(prog, "pmd_huge_pte"):
        return None
    target = prog.type("pgtable_t").unaliased()
    is_page = (
        target.kind == TypeKind.POINTER
        and target.type.unaliased().kind == TypeKind.STRUCT
        and target.type.unaliased().tag == "page"
    )
    return _Shape(in_mm, offsetof(prog.type("struct page"), "lru") if is_page else None)


def read_deposits(prog: Program, tables: Tables, pmds: PmdTables) -> Deposits:
    """
    Follow every ring, and count the huge pages beside it.

    :param pmds: The PMD tables of *tables*.
    """
    shape = _shape(prog)
    if shape is None:
        return Deposits((), False, False, False, np.empty(0, np.uint64), (), ())
    site, firsts, known, missing = _ring_starts(prog, tables, pmds, shape)
    leaves = read_huge_leaves(prog, tables, pmds)
    kinds = len(HugePage)
    huge = np.bincount(
        site[leaves.table] * kinds + leaves.kind, minlength=len(firsts) * kinds
    ).reshape(len(firsts), kinds)
    if leaves.unreadable_tables:
        missing.append(f"{leaves.unreadable_tables} PMD tables of processes could not be read")
    wanted = (firsts != 0) | (huge[:, : HugePage.OTHER].sum(axis=1) > 0)
    wanted |= huge[:, HugePage.UNDECIDED] > 0
    ring_reader = _RingReader(prog, tables, shape)
    rings = []
    by_site = np.argsort(site, kind="stable")
    starts = np.searchsorted(site[by_site], np.arange(len(firsts) + 1))
    for number in np.flatnonzero(wanted).tolist():
        members = by_site[starts[number] : starts[number + 1]]
        rows = pmds.rows[members]
        spare, problem = ring_reader.read(int(firsts[number]))
        rings.append(
            DepositRing(
                space=int(tables.space[rows[0]]),
                ptdesc=None if shape.in_mm else int(pmds.ptdescs[pmds.page[members[0]]]),
                pmd_tables=tuple(sorted(tables.address[rows].tolist())),
                tables=spare,
                huge=tuple(huge[number].tolist()),
                problem=problem,
                known=bool(known[number]),
            )
        )
    rings = list(_without_crossings(rings, tables))
    for ring in rings:
        if ring.problem is not None:
            missing.append(f"deposits of {ring_name(ring, tables)}: {ring.problem}")
    held = np.array([t for ring in rings for t in ring.tables], np.uint64)
    return Deposits(
        rings=tuple(rings),
        supported=True,
        in_mm=shape.in_mm,
        node_in_table=shape.node_offset is None,
        held_pfns=np.unique(held // np.uint64(tables.paging.page_bytes)),
        missing=tuple(missing),
        findings=tuple(_mismatches(rings, tables)),
    )


def ring_name(ring: DepositRing, tables: Tables) -> str:
    """Name what a ring hangs on, for people."""
    space = tables.spaces[ring.space]
    if ring.ptdesc is None:
        return space.name
    if len(ring.pmd_tables) > 1:
        return f"the PMD tables from {ring.pmd_tables[0]:#x} on ({space.name})"
    return f"PMD table {ring.pmd_tables[0]:#x} ({space.name})"


def _mismatches(rings: list[DepositRing], tables: Tables) -> Iterator[str]:
    for ring in rings:
        if ring.agrees is False:
            maybe = f", {ring.undecided} more may" if ring.undecided else ""
            yield (
                f"{ring_name(ring, tables)}: {len(ring.tables)} tables deposited, "
                f"{ring.needed} huge pages need one{maybe}"
            )


def _ring_starts(
    prog: Program, tables: Tables, pmds: PmdTables, shape: _Shape
) -> tuple[npt.NDArray[np.intp], AddressArray, BoolArray, list[str]]:
    """
    Get where the rings begin.

    :return: The ring's number of each PMD table, the first ``pgtable_t`` of each ring, whether that
        is known, what is missing.
    """
    missing = []
    if not shape.in_mm:
        lost = int(np.count_nonzero(~pmds.readable))
        if lost:
            missing.append(f"{lost} descriptors of PMD tables could not be read")
        # The descriptor of a page that is freed meanwhile is somebody else's.
        typed = descriptors_are_typed(prog, pmds.descriptors)
        gone = int(np.count_nonzero(pmds.readable & ~typed))
        if gone:
            missing.append(f"{gone} PMD tables of mms are in pages that are not typed")
        known = pmds.readable & typed
        firsts = np.where(known, pmds.descriptors["pmd_huge_pte"], 0)
        return pmds.page, firsts, known, missing
    offset = offsetof(prog.type("struct mm_struct"), "pmd_huge_pte")
    spaces, site = np.unique(tables.space[pmds.rows], return_inverse=True)
    mms = [space.mm.address if space.mm is not None else 0 for space in tables.spaces]
    words = read_blocks(
        prog, np.array(mms, np.uint64)[spaces] + np.uint64(offset), 8, physical=False
    )
    lost = int(np.count_nonzero(~words.readable))
    if lost:
        missing.append(f"pmd_huge_pte of {lost} mms could not be read")
    order = ptdesc_dtype(prog)["pmd_huge_pte"].byteorder
    firsts = words.data.reshape(-1).view(f"{order}u8").astype(np.uint64)
    firsts[~words.readable] = 0
    return site.reshape(-1).astype(np.intp), firsts, words.readable, missing


class _RingReader:
    """Follows rings and tells page-table pages from other memory."""

    def __init__(self, prog: Program, tables: Tables, shape: _Shape) -> None:
        self._prog = prog
        self._paging = tables.paging
        self._node_offset = shape.node_offset
        self._memmap = Memmap(prog)
        # More than all entries of all PMD tables that can share a ring.
        self._limit = 1 << 16 if not shape.in_mm else 1 << 24

    def read(self, first: int) -> tuple[tuple[int, ...], str | None]:
        """Get the physical addresses of the tables on a ring, and where it is wrong."""
        if not first:
            return (), None
        nodes, broken = _ring_nodes(self._prog, first, self._node_offset, self._limit)
        tables, good = self._tables(np.array(nodes, np.uint64))
        if not good.all():
            wrong = int(np.argmin(good))
            before = f" behind node {nodes[wrong - 1]:#x}" if wrong else " in pmd_huge_pte"
            problem = f"node {nodes[wrong]:#x}{before} is not in a page table"
            return tuple(tables[:wrong].tolist()), problem
        return tuple(tables.tolist()), None if broken is None else str(broken)

    def _tables(self, nodes: AddressArray) -> tuple[AddressArray, npt.NDArray[np.bool_]]:
        """Get the tables of nodes, and whether each lies in a page that is typed as one."""
        page_bytes = np.uint64(self._paging.page_bytes)
        if self._node_offset is not None:
            pages = nodes - np.uint64(self._node_offset)
            pfns, good = self._memmap.pfns(pages)
            tables = pfns * page_bytes
        else:
            tables = nodes - np.uint64(direct_map_offset(self._prog))
            pages, good = self._memmap.addresses(tables // page_bytes)
            good &= tables % np.uint64(self._paging.levels[0].table_bytes) == 0
        dtype = ptdesc_dtype(self._prog)
        blocks = read_blocks(self._prog, pages, dtype.itemsize, physical=False)
        descriptors = blocks.data.view(dtype).reshape(-1)
        good &= blocks.readable & descriptors_are_typed(self._prog, descriptors)
        return tables, good


def _ring_nodes(
    prog: Program, first: int, node_offset: int | None, limit: int
) -> tuple[list[int], ListBreak | None]:
    """Get the list nodes on the ring that begins with a ``pgtable_t``, and where it breaks."""
    # A ring has no head: its first node serves as one.
    node = (first + (node_offset or 0)) % (1 << 64)
    walk = walk_list_at(prog, node, limit=limit)
    broken = walk.broken
    if broken is not None and broken.reason is BreakReason.UNREADABLE and broken.next == node:
        # Not even the first node could be read.
        return [], broken
    return [node, *walk.nodes], broken


def _without_crossings(rings: list[DepositRing], tables: Tables) -> Iterator[DepositRing]:
    """Mark rings that have a table of another ring, or one that is linked in a tree."""
    every = np.array([table for ring in rings for table in ring.tables], np.uint64)
    distinct, counts = np.unique(every, return_counts=True)
    twice = set(distinct[counts > 1].tolist())
    linked = among(distinct, tables.address[tables.level == 0])
    for ring in rings:
        crossed = [table for table in ring.tables if table in twice]
        in_tree = [table for table in ring.tables if table in linked]
        problem = ring.problem
        if crossed and problem is None:
            problem = f"table {crossed[0]:#x} is on another ring too"
        elif in_tree and problem is None:
            problem = f"table {in_tree[0]:#x} is linked in a page-table tree too"
        yield ring if problem is ring.problem else replace(ring, problem=problem)


def tell_deposits(story: Deposits, tables: Tables, pfn: int, ptdesc: int) -> Iterator[Told]:
    """Say what a descriptor's page has to do with deposits."""
    page_bytes = tables.paging.page_bytes
    for ring in story.rings:
        name = ring_name(ring, tables)
        if ring.ptdesc == ptdesc:
            text = f"first of {len(ring.tables)} deposited tables, {ring.needed} needed"
            if not ring.known:
                text = f"where its deposited tables begin cannot be read; {ring.needed} needed"
            elif ring.problem is not None:
                text += f"; broken: {ring.problem}"
            yield Told(text, "pmd_huge_pte")
        for position, table in enumerate(ring.tables):
            if table // page_bytes == pfn:
                text = f"deposited for {name} at ring position {position}"
                if story.node_in_table:
                    yield Told(f"table {table:#x} in it is {text}")
                else:
                    yield Told(text, "pt_list")


def for_each_deposited_pgtable(pt: Object) -> Iterator[Object]:
    """
    Iterate over the page tables that are deposited on a PMD table, the next to be withdrawn first.

    :param pt: ``struct ptdesc *`` of a user mm's PMD table
    :return: Iterator of ``pgtable_t`` objects: ``struct page *``; on s390 and powerpc ``pte_t *``
    :raises LookupError: if this kernel keeps no deposits in its descriptors
    :raises IncompleteError: at the place where the ring is broken
    """
    prog = pt.prog_
    shape = _shape(prog)
    if shape is None or shape.in_mm:
        raise LookupError("this kernel has no deposits on PMD tables")
    first = int(ptdesc_member(pt, "pmd_huge_pte").value_())
    if not first:
        return
    offset = shape.node_offset or 0
    type_ = ptdesc_type(prog).member("pmd_huge_pte").type
    nodes, broken = _ring_nodes(prog, first, shape.node_offset, 1 << 16)
    for node in nodes:
        yield Object(prog, type_, node - offset)
    if broken is not None:
        raise IncompleteError(f"the ring of deposited tables is broken: {broken}")
