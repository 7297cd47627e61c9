# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Translations, maps and owners as reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ptinspect.census import Census
from ptinspect.faces.report import Cell, Column, Kind, Report, Table
from ptinspect.kernel.paging import EntryClass, Paging, Permission
from ptinspect.reached import census_missing
from ptinspect.tables.lookup import Outcome, PageOwner, TableOwner, Translation
from ptinspect.tables.ranges import Repeated, SpaceMap, fold_ranges
from ptinspect.tables.spaces import Space
from ptinspect.tables.steps import DescribedStep

_LETTERS = (
    (Permission.READ, "r"),
    (Permission.WRITE, "w"),
    (Permission.EXECUTE_USER, "x"),
    (Permission.EXECUTE_KERNEL, "X"),
    (Permission.USER, "u"),
)

#: How many ways of being reached are listed; the notes give the whole number.
MOST_OWNERS = 10_000


def permission_letters(permissions: Permission | None) -> str | None:
    """Write permissions as ``rwxXu``: x for user mode, X for the kernel, u for user access."""
    if permissions is None:
        return None
    return "".join(letter if permissions & bit else "-" for bit, letter in _LETTERS)


PERMISSION_LEGEND = "Permissions: r read, w write, x user executes, X kernel executes, u user."


def level_name(paging: Paging, level: int) -> str:
    """The kernel's name of a level, with the architecture's own where it differs."""
    names = paging.levels[level]
    if names.own_name and names.own_name != names.name:
        return f"{names.name} ({names.own_name})"
    return names.name


def kind_name(kind: EntryClass | None) -> str | None:
    """Write the class of an entry."""
    return None if kind is None else kind.name.lower().replace("_", " ")


def walk_report(
    paging: Paging,
    space: Space,
    translation: Translation,
    steps: Sequence[DescribedStep],
    target: str,
) -> Report:
    """Lay out one address's way through the levels."""
    missing = []
    if translation.outcome is Outcome.UNREADABLE:
        missing.append(f"the table at {translation.steps[-1].table:#x} cannot be read")
    return Report(
        "walk",
        target,
        (
            Table(
                "steps",
                (
                    Column("level"),
                    Column("table", Kind.HEX),
                    Column("ptdesc", Kind.HEX),
                    Column("typed"),
                    Column("index", Kind.COUNT),
                    Column("entry_at", Kind.HEX),
                    Column("entry", Kind.HEX),
                    Column("kind"),
                    Column("permits"),
                ),
                [
                    (
                        level_name(paging, described.step.level),
                        described.step.table,
                        described.ptdesc,
                        described.typed,
                        described.step.index,
                        described.step.entry_address,
                        described.step.value,
                        kind_name(described.step.kind),
                        permission_letters(described.step.permissions),
                    )
                    for described in steps
                ],
                f"{translation.address:#x} in {space.name}, {paging.mode} ({target})",
            ),
            Table(
                "result",
                (
                    Column("outcome"),
                    Column("physical", Kind.HEX),
                    Column("page_bytes", Kind.COUNT),
                    Column("permissions"),
                ),
                [
                    (
                        translation.outcome.value,
                        translation.physical,
                        translation.page_bytes,
                        permission_letters(translation.permissions),
                    )
                ],
                single=True,
            ),
        ),
        notes=(PERMISSION_LEGEND,) if translation.permissions is not None else (),
        missing=missing,
    )


def map_report(paging: Paging, mapped: SpaceMap, target: str, *, fold: bool = False) -> Report:
    """
    Lay out an address space.

    :param fold: Whether to write what repeats at equal distances as one row.
    """
    ranges = fold_ranges(mapped.ranges) if fold else (Repeated(r, 1, 0) for r in mapped.ranges)
    repeated = list(ranges)
    folds = any(each.times > 1 for each in repeated)
    notes = [PERMISSION_LEGEND]
    if folds:
        notes.insert(
            0,
            "times: the same memory is mapped again so often, every_KiB apart; --no-fold writes "
            "each.",
        )
    return Report(
        "map",
        target,
        (
            Table(
                "ranges",
                (
                    Column("start", Kind.HEX),
                    Column("end", Kind.HEX),
                    Column("KiB", Kind.COUNT),
                    Column("level"),
                    Column("page_KiB", Kind.COUNT),
                    Column("kind"),
                    Column("permissions"),
                    Column("attributes"),
                    Column("first_physical", Kind.HEX),
                    *((Column("times", Kind.COUNT), Column("every_KiB", Kind.COUNT)) * folds),
                ),
                (
                    (
                        r.start,
                        r.end,
                        (r.end - r.start) // 1024,
                        paging.levels[r.level].name,
                        r.page_bytes // 1024,
                        kind_name(r.kind),
                        permission_letters(r.permissions),
                        " ".join(r.attributes),
                        r.physical,
                        *((times if distance else None, distance // 1024 or None) * folds),
                    )
                    for r, times, distance in repeated
                ),
                f"{mapped.space.name}, {paging.mode} ({target})",
            ),
        ),
        notes=notes,
        missing=[
            f"{hole.start:#x}-{hole.end:#x}: {level_name(paging, hole.level)} table "
            f"{hole.state.name.lower()}"
            for hole in mapped.unseen
        ],
    )


def owner_report(
    census: Census,
    physical: int,
    tables: Sequence[TableOwner],
    pages: Sequence[PageOwner],
    target: str,
) -> Report:
    """Lay out all ways in which a page is reached."""
    index = census.index_of_pfn(physical // census.paging.page_bytes)
    notes = [
        f"{physical:#x} is {'' if index is not None else 'not '}in a page typed as page table; "
        f"{len(tables)} entries or roots reach it as a table, {len(pages)} map it as memory."
    ]
    if len(tables) + len(pages) > MOST_OWNERS:
        notes.append(f"Only the first {MOST_OWNERS} of each are listed.")
    return Report(
        "owner",
        target,
        (
            Table(
                "owners",
                (
                    Column("as"),
                    Column("space"),
                    Column("level"),
                    Column("va", Kind.HEX),
                    Column("entry_at", Kind.HEX),
                    Column("entry", Kind.HEX),
                    Column("permissions"),
                ),
                list(_owners(census, tables[:MOST_OWNERS], pages[:MOST_OWNERS])),
                f"Who reaches {physical:#x} ({target})",
            ),
        ),
        notes=notes,
        missing=census_missing(census),
    )


def _owners(
    census: Census, tables: Sequence[TableOwner], pages: Sequence[PageOwner]
) -> Iterator[tuple[Cell, ...]]:
    spaces = census.tables.spaces
    levels = census.paging.levels
    for owner in tables:
        name, level = spaces[owner.space].name, levels[owner.level].name
        yield "table", name, level, owner.va, owner.entry_address, None, None
    for page in pages:
        yield (
            kind_name(page.kind),
            spaces[page.space].name,
            levels[page.level].name,
            page.va,
            page.entry_address,
            page.value,
            permission_letters(page.permissions),
        )
