# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
PMD tables that several entries point to: hugetlb mappings of one file, in as many processes.

``pt_share_count`` counts those beyond the first (huge_pmd_share() and huge_pmd_unshare() in
mm/hugetlb.c). Older kernels, which lack it, took a reference to the page for each (6.1 too, before
the change came to its stable kernels). x86_64, arm64 and riscv64 share PMD tables, others never.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from drgn import Program

from ptinspect.kernel.descriptor import ptdesc_has_member
from ptinspect.state.mappings import MappedFile, Mappings, is_hugetlb, mapped_file
from ptinspect.state.pmd_tables import PMD_LEVEL, PmdTables, user_rows
from ptinspect.state.told import Told
from ptinspect.tables.walk import Tables

#: Those that select ARCH_WANT_HUGE_PMD_SHARE (arch/*/Kconfig).
_SHARING_ARCHITECTURES = frozenset({"x86_64", "arm64", "riscv64"})


class Sharer(NamedTuple):
    """One entry that points to a shared table."""

    #: Index into the spaces of the walk.
    space: int
    #: First virtual address that the table translates there.
    va: int
    #: Physical address of the entry.
    entry: int


@dataclass(frozen=True)
class SharedTable:
    """A PMD table with more than one parent entry, or whose count says so."""

    #: Physical address.
    table: int
    #: Address of its ``struct ptdesc``.
    ptdesc: int
    #: How many share it beyond the first, as the descriptor says; ``None`` if it has no count.
    count: int | None
    #: Every entry that was found.
    sharers: tuple[Sharer, ...]
    #: The files that the mappings are of, each once: one, if all is well.
    files: tuple[MappedFile, ...]
    #: Whether all mappings are of hugetlb; ``None`` if that cannot be told.
    hugetlb: bool | None

    @property
    def expected(self) -> int:
        """What the count should be."""
        return len(self.sharers) - 1

    @property
    def agrees(self) -> bool | None:
        """Whether the count is right; ``None`` if there is none."""
        return None if self.count is None else self.count == self.expected


@dataclass(frozen=True)
class Sharing:
    """All shared PMD tables of a target."""

    tables: tuple[SharedTable, ...]
    #: Name of what counts the sharers here, ``pt_share_count`` or ``refcount``; empty if nothing.
    counted_by: str
    #: What could not be seen, in sentences.
    missing: tuple[str, ...]
    #: Counts and files that contradict the mappings, in sentences.
    findings: tuple[str, ...]


def read_sharing(prog: Program, tables: Tables, pmds: PmdTables) -> Sharing:
    """
    Find every shared PMD table, who shares it and what its descriptor counts.

    :param pmds: The PMD tables of *tables*.
    """
    counted_by = ""
    counts = np.zeros(len(pmds.pfns), np.int64)
    if ptdesc_has_member(prog, "pt_share_count"):
        counted_by = "pt_share_count"
        counts = pmds.descriptors["pt_share_count"].astype(np.int64)
    elif tables.paging.architecture in _SHARING_ARCHITECTURES:
        counted_by = "refcount"
        counts = pmds.descriptors["__page_refcount"].astype(np.int64) - 1
    counts[~pmds.readable] = 0
    rows = user_rows(tables, PMD_LEVEL)
    rows = rows[np.argsort(tables.address[rows], kind="stable")]
    address = tables.address[pmds.rows]
    begin = np.searchsorted(tables.address[rows], address, side="left")
    end = np.searchsorted(tables.address[rows], address, side="right")
    several = end - begin > 1
    if counted_by == "pt_share_count":
        several |= counts[pmds.page] != 0
    # A reference beyond the first alone is somebody's who looks at the page for a moment.
    wanted = np.flatnonzero(several)
    mappings = Mappings(prog)
    shared = []
    missing = []
    for number in wanted[np.argsort(address[wanted], kind="stable")].tolist():
        page = int(pmds.page[number])
        parents = rows[begin[number] : end[number]]
        sharers = tuple(
            Sharer(space, va, entry)
            for space, va, entry in zip(
                tables.space[parents].tolist(),
                tables.va[parents].tolist(),
                tables.entry_address[parents].tolist(),
            )
        )
        readable = bool(pmds.readable[page])
        if not readable:
            missing.append(f"the descriptor of PMD table {int(address[number]):#x} is unreadable")
        files, hugetlb, unseen = _mapped(mappings, tables, sharers)
        if len(sharers) > 1:
            # Else it is a wrong count, and the mapping may be of anything.
            missing.extend(unseen)
        shared.append(
            SharedTable(
                table=int(address[number]),
                ptdesc=int(pmds.ptdescs[page]),
                count=int(counts[page]) if counted_by and readable else None,
                sharers=sharers,
                files=files,
                hugetlb=hugetlb,
            )
        )
    findings = tuple(f for table in shared for f in _contradictions(table, counted_by, tables))
    return Sharing(tuple(shared), counted_by, tuple(missing), findings)


def _mapped(
    mappings: Mappings, tables: Tables, sharers: tuple[Sharer, ...]
) -> tuple[tuple[MappedFile, ...], bool | None, list[str]]:
    """Get the files behind a table, whether all mappings are hugetlb's, what was not readable."""
    files: dict[int, MappedFile] = {}
    kinds: set[bool | None] = set()
    missing = []
    for sharer in sharers:
        space = tables.spaces[sharer.space]
        vma = mappings.at(space, sharer.va)
        file = None if vma is None else mapped_file(vma)
        if file is None:
            missing.append(f"no mapping of a file can be read at {sharer.va:#x} of {space.name}")
        else:
            files.setdefault(file.address, file)
        kinds.add(None if vma is None else is_hugetlb(vma))
    hugetlb = False if False in kinds else None if None in kinds else True
    return tuple(files.values()), hugetlb, missing


def _contradictions(table: SharedTable, counted_by: str, tables: Tables) -> Iterator[str]:
    names = ", ".join(tables.spaces[sharer.space].name for sharer in table.sharers)
    if table.agrees is False:
        yield (
            f"PMD table {table.table:#x}: {counted_by} counts {table.count} sharers beyond the "
            f"first, {len(table.sharers)} entries point to it ({names})"
        )
    if len(table.sharers) > 1 and not counted_by:
        yield f"PMD table {table.table:#x} has {len(table.sharers)} parents, none shares here"
    if len(table.files) > 1:
        files = ", ".join(file.name for file in table.files)
        yield f"PMD table {table.table:#x} is shared by mappings of several files: {files}"
    if table.hugetlb is False and len(table.sharers) > 1:
        yield f"PMD table {table.table:#x} is shared by mappings that are not hugetlb's ({names})"


def tell_sharing(story: Sharing, tables: Tables, ptdesc: int) -> Iterator[Told]:
    """Say who shares a PMD table."""
    for table in story.tables:
        if table.ptdesc != ptdesc:
            continue
        names = ", ".join(tables.spaces[sharer.space].name for sharer in table.sharers)
        file = f", the table of {table.files[0].name}" if table.files else ""
        count = "no count" if table.count is None else f"count says {table.count} beyond the first"
        text = f"{len(table.sharers)} entries point to it ({names}), {count}{file}"
        member = "pt_share_count" if story.counted_by == "pt_share_count" else ""
        yield Told(text, member)
