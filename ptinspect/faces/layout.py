# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A layout, or two, as a report."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from ptinspect.faces.report import Cell, Column, Kind, Report, Table
from ptinspect.records import Layout, LayoutMember

_MEMBER_COLUMNS = (
    Column("offset", Kind.COUNT),
    Column("size", Kind.COUNT),
    Column("ptdesc_member"),
    Column("ptdesc_type"),
    Column("page_member"),
    Column("page_type"),
)


def layout_report(layout: Layout, name: str, other: tuple[str, Layout] | None) -> Report:
    """Lay out the two structures side by side, and against another kernel's if there is one."""
    tables = [
        Table("members", _MEMBER_COLUMNS, list(_side_by_side(layout)), _title(layout, name)),
        Table(
            "table_match",
            (
                Column("asserted_by"),
                Column("struct_page"),
                Column("struct_ptdesc"),
                Column("page_offset", Kind.COUNT),
                Column("ptdesc_offset", Kind.COUNT),
                Column("verdict"),
            ),
            [
                (
                    m.source,
                    m.page_member,
                    m.ptdesc_member,
                    m.page_offset,
                    m.ptdesc_offset,
                    m.verdict,
                )
                for m in layout.matches
            ],
            "TABLE_MATCH",
        ),
        Table(
            "facts",
            (
                Column("struct_ptdesc"),
                Column("ptdesc_size", Kind.COUNT),
                Column("page_size", Kind.COUNT),
                Column("ptdesc_fits_page"),
                Column("ptl_slot"),
            ),
            [
                (
                    "native" if layout.native else "overlay from struct page",
                    layout.ptdesc_size,
                    layout.page_size,
                    layout.size_fits,
                    layout.ptl,
                )
            ],
            single=True,
        ),
    ]
    if other is not None:
        tables.append(_difference(layout, name, *other))
    return Report("layout", name, tables)


def _title(layout: Layout, name: str) -> str:
    kind = "struct ptdesc" if layout.native else "struct ptdesc (overlay, not in this kernel)"
    return f"{kind} and struct page: {name}"


def _side_by_side(layout: Layout) -> Iterator[tuple[Cell, ...]]:
    """Members of both structures in order of offset and size, equals beside each other."""
    places = sorted(
        {(m.offset, m.size) for m in (*layout.ptdesc_members, *layout.page_members)},
        key=lambda place: (place[0], -place[1]),
    )
    for offset, size in places:
        left = _at(layout.ptdesc_members, offset, size)
        right = _at(layout.page_members, offset, size)
        for mine, theirs in zip_longest(left, right):
            yield (offset, size, *_name_and_type(mine), *_name_and_type(theirs))


def _at(members: tuple[LayoutMember, ...], offset: int, size: int) -> list[LayoutMember]:
    return [m for m in members if (m.offset, m.size) == (offset, size)]


def _name_and_type(member: LayoutMember | None) -> tuple[Cell, Cell]:
    return (None, None) if member is None else (member.name, member.type_name)


def _difference(layout: Layout, name: str, other_name: str, other: Layout) -> Table:
    rows = [
        (struct, *row)
        for struct, mine, theirs in (
            ("ptdesc", layout.ptdesc_members, other.ptdesc_members),
            ("page", layout.page_members, other.page_members),
        )
        for row in _member_differences(mine, theirs)
    ]
    return Table(
        "against",
        (
            Column("struct"),
            Column("member"),
            Column("offset", Kind.COUNT),
            Column("type"),
            Column("other_offset", Kind.COUNT),
            Column("other_type"),
        ),
        rows,
        f"Members that differ: {name} against {other_name}",
    )


def _member_differences(
    mine: tuple[LayoutMember, ...], theirs: tuple[LayoutMember, ...]
) -> Iterator[tuple[Cell, ...]]:
    left = {m.name: m for m in mine}
    right = {m.name: m for m in theirs}
    for member in {**left, **right}:
        a, b = left.get(member), right.get(member)
        if (
            a is None
            or b is None
            or (a.offset, a.size, a.type_name)
            != (
                b.offset,
                b.size,
                b.type_name,
            )
        ):
            yield (member, *_offset_and_type(a), *_offset_and_type(b))


def _offset_and_type(member: LayoutMember | None) -> tuple[Cell, Cell]:
    return (None, None) if member is None else (member.offset, member.type_name)
