# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shared PMD tables as a report."""

from __future__ import annotations

from collections.abc import Iterator

from ptinspect.census import Census
from ptinspect.faces.racing import doubtful
from ptinspect.faces.report import Cell, Column, Kind, Report, Table
from ptinspect.reached import census_missing
from ptinspect.state.sharing import SharedTable, Sharing


def sharing_report(census: Census, target: str, *, racing: bool) -> Report:
    """Lay out one row for each shared table, and one for each entry that points to it."""
    story = census.stories.sharing
    findings, notes = doubtful(story.findings, racing=racing)
    return Report(
        "sharing",
        target,
        (
            Table(
                "tables",
                (
                    Column("table", Kind.HEX),
                    Column("ptdesc", Kind.HEX),
                    Column("count", Kind.COUNT),
                    Column("parents", Kind.COUNT),
                    Column("verdict"),
                    Column("inode", Kind.COUNT),
                    Column("file"),
                ),
                [_table_row(table) for table in story.tables],
                f"PMD tables that several hugetlb mappings share ({target})",
            ),
            Table(
                "sharers",
                (
                    Column("table", Kind.HEX),
                    Column("space"),
                    Column("mm", Kind.HEX),
                    Column("va", Kind.HEX),
                    Column("entry_at", Kind.HEX),
                ),
                list(_sharers(census, story)),
                "Who shares them",
            ),
        ),
        notes=[*_notes(story), *notes],
        findings=findings,
        missing=[*census_missing(census), *story.missing],
    )


def _notes(story: Sharing) -> Iterator[str]:
    if not story.counted_by:
        yield "This kernel shares no PMD tables: its descriptors do not count any."
    elif story.counted_by == "refcount":
        yield "This kernel has no pt_share_count: count is the page's references beyond the first."
    else:
        yield "count (pt_share_count) is the number of parents beyond the first."


def _table_row(table: SharedTable) -> tuple[Cell, ...]:
    file = table.files[0] if table.files else None
    verdicts = {True: "agrees", False: "wrong count", None: None}
    return (
        table.table,
        table.ptdesc,
        table.count,
        len(table.sharers),
        verdicts[table.agrees],
        None if file is None else file.inode,
        None if file is None else file.path,
    )


def _sharers(census: Census, story: Sharing) -> Iterator[tuple[Cell, ...]]:
    for table in story.tables:
        for sharer in table.sharers:
            space = census.tables.spaces[sharer.space]
            mm = None if space.mm is None else space.mm.address
            yield table.table, space.name, mm, sharer.va, sharer.entry
