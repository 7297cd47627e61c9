# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors as reports: many in rows, one in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ptinspect.faces.report import Cell, Column, Kind, Report, Table
from ptinspect.listing import Listing
from ptinspect.locate import AddressKind
from ptinspect.records import Descriptor, Field
from ptinspect.tables.scan import MemmapScan

#: Rows that become Python objects at a time.
_BATCH = 10_000


def list_report(
    listing: Listing,
    scan: MemmapScan,
    names: Sequence[str],
    rows: npt.NDArray[np.intp],
    target: str,
) -> Report:
    """Lay out chosen columns of chosen descriptors."""
    columns = [Column(name, _kind(listing, name)) for name in names]
    missing = []
    if scan.unreadable_pages:
        missing.append(
            f"{scan.unreadable_pages} struct pages could not be read: descriptors may be missing"
        )
    unknown = int(np.count_nonzero(~scan.order_known))
    if unknown:
        missing.append(f"the order of {unknown} descriptors is unknown")
    return Report(
        "list",
        target,
        (Table("descriptors", columns, _rows(listing, names, rows)),),
        notes=(f"{len(rows)} of {len(listing)} descriptors ({target})",),
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


def show_report(descriptor: Descriptor, kind: AddressKind, is_tail: bool, target: str) -> Report:
    """Lay out one descriptor in full."""
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
        ),
        notes=notes,
    )


def _member_row(field: Field) -> tuple[Cell, ...]:
    raw = " ".join(f"{word:#x}" for word in field.raw) if field.raw else None
    return (field.offset, field.name, field.type_name or None, raw, field.state.value, field.text)
