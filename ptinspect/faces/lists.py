# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lists that descriptors are on, and the owners of root tables, as reports."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ptinspect.census import Census
from ptinspect.faces.racing import doubtful
from ptinspect.faces.report import Cell, Column, Kind, Report, Table
from ptinspect.reached import census_missing
from ptinspect.state.lists import Lists, Role, WordList
from ptinspect.state.owners import Owners, PgdOwner
from ptinspect.tables.spaces import SpaceKind

_ROLE_MEANINGS = {
    Role.STALE: "bytes that the page allocator or another list left",
    Role.PGD_LIST: "node of x86's list of all PGDs",
    Role.FREE_LIST: "node of the list of kernel tables to be freed",
    Role.PGTABLE_LIST: "node of an mm's list of half-free pages",
    Role.DEPOSIT: "node of a ring of tables deposited for huge pages",
    Role.RCU: "pt_rcu_head: waits for a grace period",
    Role.PMD_HUGE_PTE: "the second word is pmd_huge_pte: a PMD table of an mm",
    Role.GMAP: "node of a list of a guest's tables",
    Role.SELF: "its own neighbour: initialised, or a list of one",
    Role.OTHER_LIST: "node of a list that has no name here: both neighbours point back",
}


def lists_report(census: Census, target: str, *, nodes: bool) -> Report:
    """
    Lay out the lists, and what the word is in all typed descriptors.

    :param nodes: Whether to list the nodes of every list, not only those that are to be freed.
    """
    story = census.stories.lists
    return Report(
        "lists",
        target,
        (
            Table(
                "lists",
                (
                    Column("list"),
                    Column("head", Kind.HEX),
                    Column("nodes", Kind.COUNT),
                    Column("before_break", Kind.COUNT),
                    Column("state"),
                ),
                [
                    (
                        found.name,
                        found.head,
                        len(found.pfns),
                        found.before_break if found.problems else None,
                        "broken" if found.problems else "whole",
                    )
                    for found in _shown(story)
                ],
                f"Lists of descriptors, every link checked both ways ({target})",
            ),
            Table(
                "roles",
                (Column("role"), Column("descriptors", Kind.COUNT), Column("meaning")),
                list(_roles(story)),
                "pt_list in the typed descriptors (list --where 'role = ...' shows them)",
            ),
            Table(
                "nodes",
                (
                    Column("list"),
                    Column("position", Kind.COUNT),
                    Column("ptdesc", Kind.HEX),
                    Column("pfn", Kind.HEX),
                    Column("typed"),
                    Column("level"),
                    Column("space"),
                ),
                list(_nodes(census, story, every=nodes)),
                "Their nodes" if nodes else "Kernel tables that wait to be freed",
            ),
        ),
        notes=list(_notes(story)),
        missing=[*census_missing(census), *_new_missing(census, story.missing)],
    )


def _shown(story: Lists) -> Iterator[WordList]:
    """Leave out the lists of mms that are empty, as nearly all of them are."""
    for found in story.lists:
        per_space = found.role in (Role.PGTABLE_LIST, Role.GMAP)
        if found.pfns or found.problems or not per_space:
            yield found


def _new_missing(census: Census, missing: tuple[str, ...]) -> Iterator[str]:
    """Leave out what the census itself said already: it follows pgd_list to find mms."""
    said = set(census_missing(census))
    return (what for what in missing if what not in said)


def _notes(story: Lists) -> Iterator[str]:
    if not story.lists:
        yield "This kernel keeps no list of descriptors (pgd_list is x86's)."
    empty = len(story.lists) - len(list(_shown(story)))
    if empty:
        yield f"{empty} more lists, of mms and gmaps, are empty."
    if story.free_work_pending is not None:
        state = "is queued" if story.free_work_pending else "is not queued"
        yield f"kernel_pgtable_work {state}; tables on its list are not typed any more."


def _roles(story: Lists) -> Iterator[tuple[Cell, ...]]:
    for role in Role:
        count = int(np.count_nonzero(story.roles == role))
        if count:
            yield role.name.lower(), count, _ROLE_MEANINGS[role]


def _nodes(census: Census, story: Lists, *, every: bool) -> Iterator[tuple[Cell, ...]]:
    levels = census.paging.levels
    first_spaces = census.first_spaces()
    # PGDs that are not typed (x86 of 6.12) are not in the scan, but in the spaces.
    roots = {
        space.root.address // census.paging.page_bytes: space
        for space in census.tables.spaces
        if space.kind is not SpaceKind.ISOLATED
    }
    for found in story.lists:
        if not every and found.role is not Role.FREE_LIST:
            continue
        for position, (pfn, ptdesc) in enumerate(zip(found.pfns, found.ptdescs)):
            index = census.index_of_pfn(pfn)
            level = space = None
            if index is not None and first_spaces[index] >= 0:
                level = levels[int(census.level[index])].name
                space = census.tables.spaces[int(first_spaces[index])].name
            elif pfn in roots:
                level, space = levels[roots[pfn].root.level].name, roots[pfn].name
            yield found.name, position, ptdesc, pfn, index is not None, level, space


def pgd_report(census: Census, target: str, *, racing: bool) -> Report:
    """Lay out one row for each root table of an mm."""
    story = census.stories.owners
    findings, notes = doubtful(story.findings, racing=racing)
    return Report(
        "lists",
        target,
        (
            Table(
                "pgds",
                (
                    Column("position", Kind.COUNT),
                    Column("table", Kind.HEX),
                    Column("ptdesc", Kind.HEX),
                    Column("pages", Kind.COUNT),
                    Column("user_half", Kind.HEX),
                    Column("pt_mm", Kind.HEX),
                    Column("space"),
                    Column("mm", Kind.HEX),
                    Column("mm_users", Kind.COUNT),
                    Column("mm_count", Kind.COUNT),
                    Column("found"),
                    Column("verdict"),
                ),
                [_pgd_row(census, owner) for owner in story.pgds],
                f"Root tables of mms ({target})",
            ),
        ),
        notes=[*_pgd_notes(story), *notes],
        findings=findings,
        missing=[
            *census_missing(census),
            *_new_missing(census, (*census.stories.lists.missing, *story.missing)),
        ],
    )


def _pgd_notes(story: Owners) -> Iterator[str]:
    if story.recorded:
        yield (
            "position: place on pgd_list. found: what else leads to the mm. pages: 2 where "
            "page-table isolation has a second root for user mode (user_half)."
        )
    else:
        yield "Only x86 lists its PGDs and writes the mm into their descriptors."
        if any(owner.ptdesc is None for owner in story.pgds):
            yield "Roots without a ptdesc are smaller than a page, and slab objects."


def _pgd_row(census: Census, owner: PgdOwner) -> tuple[Cell, ...]:
    space = None if owner.space is None else census.tables.spaces[owner.space]
    mm = None if space is None else space.mm
    return (
        owner.position,
        owner.table,
        owner.ptdesc,
        owner.pages,
        owner.user_half,
        owner.pt_mm,
        None if space is None else space.name,
        None if mm is None else mm.address,
        None if mm is None else mm.users,
        None if mm is None else mm.count,
        None if space is None else " ".join(found.value for found in space.found),
        owner.verdict.value,
    )
