# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The address spaces and what they spend on page tables, as a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ptinspect.faces.racing import RACING_NOTE
from ptinspect.faces.report import Cell, Column, Kind, Report, Table
from ptinspect.state.deposits import Deposits
from ptinspect.tables.spaces import SpaceKind, SpaceList
from ptinspect.tables.usage import SpaceUsage
from ptinspect.tables.walk import Tables


def ps_report(
    spaces: SpaceList,
    tables: Tables,
    usage: SpaceUsage,
    deposits: Deposits,
    resident: Sequence[int | None],
    guests_missing: Sequence[str],
    target: str,
    *,
    racing: bool,
) -> Report:
    """Lay out one row for each space, most page-table memory first."""
    levels = tables.paging.levels
    order = np.argsort(-usage.table_bytes, kind="stable").tolist()
    unread = [spaces.spaces[row].name for row in order if not usage.complete[row]]
    notes = [
        "pgtables KiB is what the kernel counts: walked KiB (tables below the root) and deposited "
        "KiB (spare tables of huge pages), each rounded down. empty KiB could be given back.",
    ]
    if any(space.kind is SpaceKind.GMAP for space in spaces.spaces):
        notes.append(
            "Tables of guests (gmap) are in no pgtables_bytes. Up to 6.x a guest's page tables are "
            "its process's: they stand in both rows."
        )
    if racing:
        notes.append(RACING_NOTE)
    return Report(
        "ps",
        target,
        (
            Table(
                "spaces",
                (
                    Column("pid", Kind.COUNT),
                    Column("space"),
                    Column("kind"),
                    Column("mm", Kind.HEX),
                    Column("found"),
                    *(Column(level.name, Kind.COUNT) for level in levels),
                    Column("table_KiB", Kind.COUNT),
                    Column("walked_KiB", Kind.COUNT),
                    Column("deposited_KiB", Kind.COUNT),
                    Column("pgtables_KiB", Kind.COUNT),
                    Column("rss_KiB", Kind.COUNT),
                    Column("fill_percent", Kind.COUNT),
                    Column("empty_tables", Kind.COUNT),
                    Column("empty_KiB", Kind.COUNT),
                ),
                list(_rows(spaces, tables, usage, deposits, resident, order)),
                f"Page tables by address space ({target})",
            ),
        ),
        notes=notes,
        missing=[
            *(f"{note.source}: {note.message}" for note in spaces.notes),
            *guests_missing,
            *deposits.missing,
            *(f"not all tables of {name} could be read" for name in unread),
        ],
    )


def _rows(
    spaces: SpaceList,
    tables: Tables,
    usage: SpaceUsage,
    deposits: Deposits,
    resident: Sequence[int | None],
    order: Sequence[int],
) -> Iterator[Sequence[Cell]]:
    fill = usage.fill()
    spare = np.zeros(len(spaces.spaces), np.int64)
    for ring in deposits.rings:
        spare[ring.space] += len(ring.tables) * tables.paging.levels[0].table_bytes
    page_kib = tables.paging.page_bytes // 1024
    for row in order:
        space = spaces.spaces[row]
        mm = space.mm
        # The user half of an isolated space is no mm of its own: what the mm has counted and
        # mapped stands in the row of the mm.
        is_mm = mm is not None and space.kind is SpaceKind.USER
        pages = resident[row] if is_mm else None
        yield (
            space.tasks[0].pid if space.tasks else None,
            space.name,
            space.kind.value,
            None if mm is None else mm.address,
            " ".join(found.value for found in space.found),
            *usage.tables[row].tolist(),
            int(usage.table_bytes[row]) // 1024,
            int(usage.accounted_bytes[row]) // 1024 if is_mm else None,
            int(spare[row]) // 1024 if is_mm else None,
            mm.pgtables_bytes // 1024 if is_mm and mm is not None else None,
            None if pages is None else pages * page_kib,
            None if np.isnan(fill[row]) else round(float(fill[row]) * 100),
            int(usage.empty_tables[row].sum()),
            int(usage.empty_bytes[row]) // 1024,
        )
