# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tables deposited for huge pages as a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ptinspect.census import Census
from ptinspect.faces.racing import doubtful
from ptinspect.faces.report import Cell, Column, Kind, Report, Table
from ptinspect.reached import census_missing
from ptinspect.state.deposits import DepositRing, Deposits
from ptinspect.state.huge_leaves import HugePage


def deposits_report(
    census: Census, target: str, *, racing: bool, each: bool, space: int | None
) -> Report:
    """
    Lay out one row for each ring.

    :param each: Whether to list every deposited table too.
    :param space: Index of the only space that is wanted.
    """
    story = census.stories.deposits
    rings = [ring for ring in story.rings if space is None or ring.space == space]
    tables = [
        Table(
            "rings",
            (
                Column("pmd_table", Kind.HEX),
                Column("ptdesc", Kind.HEX),
                Column("space"),
                Column("deposited", Kind.COUNT),
                Column("needed", Kind.COUNT),
                Column("anonymous", Kind.COUNT),
                Column("zero_page", Kind.COUNT),
                Column("undecided", Kind.COUNT),
                Column("other_huge", Kind.COUNT),
                Column("verdict"),
            ),
            [_ring_row(census, ring) for ring in rings],
            f"Deposited tables and the huge pages that need them ({target})",
        )
    ]
    if each:
        tables.append(
            Table(
                "tables",
                (
                    Column("table", Kind.HEX),
                    Column("position", Kind.COUNT),
                    Column("pmd_table", Kind.HEX),
                    Column("space"),
                ),
                list(_each_table(census, rings)),
                "Each of them; the first of a ring is the next to be withdrawn",
            )
        )
    findings, notes = doubtful(story.findings, racing=racing)
    return Report(
        "deposits",
        target,
        tables,
        notes=[*_notes(story), *notes],
        findings=findings,
        missing=[*census_missing(census), *_undecided(rings)],
    )


def _undecided(rings: Sequence[DepositRing]) -> Iterator[str]:
    count = sum(ring.undecided for ring in rings)
    if count:
        yield (
            f"{count} huge pages may or may not need a deposited table: they are being moved, or "
            "what tells it cannot be read"
        )


def _notes(story: Deposits) -> Iterator[str]:
    if not story.supported:
        yield "This kernel has no transparent huge pages: it deposits no tables."
        return
    where = "the mm (pmd_huge_pte)" if story.in_mm else "the descriptor of the PMD table"
    node = "the table itself" if story.node_in_table else "the page's lru"
    yield f"A ring begins at {where}; its nodes are in {node}."
    yield (
        "needed: anonymous huge pages and the huge zero page. Those of files, of hugetlb and of "
        "devices (other_huge) have no deposited table."
    )


def _ring_row(census: Census, ring: DepositRing) -> tuple[Cell, ...]:
    return (
        ring.pmd_tables[0],
        ring.ptdesc,
        census.tables.spaces[ring.space].name,
        len(ring.tables),
        ring.needed,
        ring.huge[HugePage.ANONYMOUS],
        ring.huge[HugePage.ZERO],
        ring.undecided,
        ring.huge[HugePage.OTHER],
        _verdict(ring),
    )


def _verdict(ring: DepositRing) -> str:
    if not ring.known:
        return "unreadable"
    if ring.agrees is None:
        return "broken"
    if ring.agrees:
        return "agrees"
    return "too few" if len(ring.tables) < ring.needed else "too many"


def _each_table(census: Census, rings: Sequence[DepositRing]) -> Iterator[tuple[Cell, ...]]:
    for ring in rings:
        for position, table in enumerate(ring.tables):
            name = census.tables.spaces[ring.space].name
            yield table, position, ring.pmd_tables[0], name
