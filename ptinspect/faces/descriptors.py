# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors as reports: many in rows, one in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from ptinspect.faces.report import Cell, Column, Kind, Report, Table
from ptinspect.faces.translate import kind_name
from ptinspect.kernel.paging import EntryClass
from ptinspect.listing import Listing
from ptinspect.locate import AddressKind
from ptinspect.reach import Reach
from ptinspect.records import Descriptor, Field

#: Rows that become Python objects at a time.
_BATCH = 10_000


def list_report(
    listing: Listing,
    names: Sequence[str],
    rows: npt.NDArray[np.intp],
    missing: Sequence[str],
    target: str,
    *,
    more: Sequence[Table] = (),
    notes: Sequence[str] = (),
) -> Report:
    """
    Lay out chosen columns of chosen descriptors.

    :param more: Tables that belong to the answer.
    :param notes: Sentences that do.
    """
    columns = [Column(name, _kind(listing, name)) for name in names]
    return Report(
        "list",
        target,
        (Table("descriptors", columns, _rows(listing, names, rows)), *more),
        notes=(f"{len(rows)} of {len(listing)} descriptors ({target})", *notes),
        missing=missing,
    )


def _kind(listing: Listing, name: str) -> Kind:
    column = listing.column(name)
    if column.is_hex:
        return Kind.HEX
    return Kind.TEXT if column.values.dtype.kind == "U" else Kind.COUNT


def _rows(
    listing: Listing, names: Sequence[str], rows: npt.NDArray[np.intp]
) -> Iterator[Sequence[Cell]]:
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        cells: list[list[Cell]] = []
        for name in names:
            column = listing.column(name)
            values: list[Cell] = column.values[batch].tolist()
            present = column.present[batch]
            if not present.all():
                values = [v if p else None for v, p in zip(values, present.tolist())]
            cells.append(values)
        yield from zip(*cells)


def show_report(
    descriptor: Descriptor,
    kind: AddressKind,
    is_tail: bool,
    reach: Reach | None,
    missing: Sequence[str],
    target: str,
    *,
    entries: int,
    more: Sequence[Table] = (),
    more_notes: Sequence[str] = (),
) -> Report:
    """
    Lay out one descriptor in full.

    :param reach: What reaches its tables and what they hold; ``None`` if there was no walk.
    :param missing: What could not be seen.
    :param entries: How many entries to list.
    :param more: Tables that belong to the answer.
    :param more_notes: Sentences that do.
    """
    notes = []
    if is_tail:
        notes.append("The address lies in a tail page: this is the descriptor of its head page.")
    if not descriptor.typed:
        notes.append("This page is not typed as a page table: the members are just its bytes.")
    return Report(
        "show",
        target,
        (
            Table(
                "descriptor",
                (
                    Column("given_as"),
                    Column("pfn", Kind.HEX),
                    Column("ptdesc", Kind.HEX),
                    Column("physical", Kind.HEX),
                    Column("address", Kind.HEX),
                    Column("typed"),
                    Column("level"),
                    Column("order", Kind.COUNT),
                    Column("node", Kind.COUNT),
                ),
                [
                    (
                        kind.value,
                        descriptor.pfn,
                        descriptor.ptdesc,
                        descriptor.physical,
                        descriptor.address,
                        descriptor.typed,
                        descriptor.level,
                        descriptor.order,
                        descriptor.node,
                    )
                ],
                f"Page-table descriptor ({target})",
                single=True,
            ),
            Table(
                "members",
                (
                    Column("offset", Kind.COUNT),
                    Column("member"),
                    Column("type"),
                    Column("raw"),
                    Column("state"),
                    Column("meaning"),
                ),
                [_member_row(field) for field in descriptor.fields],
                "Members",
            ),
            *(() if reach is None else _reach_tables(reach, entries)),
            *more,
        ),
        notes=[*notes, *_told(reach), *more_notes],
        missing=missing,
    )


def _told(reach: Reach | None) -> Iterator[str]:
    for what in () if reach is None else reach.told:
        if not what.member:
            yield f"{what.text}."


def _reach_tables(reach: Reach, entries: int) -> Iterator[Table]:
    paging, spaces = reach.paging, reach.spaces
    yield Table(
        "parents",
        (
            Column("table", Kind.HEX),
            Column("level"),
            Column("space"),
            Column("va", Kind.HEX),
            Column("entry_at", Kind.HEX),
        ),
        [
            (
                owner.table,
                paging.levels[owner.level].name,
                spaces[owner.space].name,
                owner.va,
                owner.entry_address,
            )
            for owner in reach.owners
        ],
        f"Reached by (holder: {reach.holder or 'none'}); a root has no entry",
    )
    yield Table(
        "contents",
        (Column("table", Kind.HEX), Column("class"), Column("entries", Kind.COUNT)),
        [
            (contents.address, kind_name(kind), count)
            for contents in reach.contents
            for kind, count in contents.counts().items()
        ],
        "Entries by class",
    )
    if entries:
        yield Table(
            "entries",
            (
                Column("table", Kind.HEX),
                Column("index", Kind.COUNT),
                Column("entry", Kind.HEX),
                Column("class"),
            ),
            list(islice(_entries(reach), entries)),
            f"Entries that are not empty, the first {entries}",
        )


def _entries(reach: Reach) -> Iterator[tuple[Cell, ...]]:
    for contents in reach.contents:
        for index in np.flatnonzero(contents.kinds != EntryClass.NONE).tolist():
            kind = EntryClass(int(contents.kinds[index]))
            yield contents.address, index, int(contents.values[index]), kind_name(kind)


def _member_row(field: Field) -> tuple[Cell, ...]:
    raw = " ".join(f"{word:#x}" for word in field.raw) if field.raw else None
    return (field.offset, field.name, field.type_name or None, raw, field.state.value, field.text)
