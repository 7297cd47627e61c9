# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Orphans as a table of a report."""

from __future__ import annotations

from collections.abc import Iterator

from ptinspect.faces.report import Cell, Column, Kind, Table
from ptinspect.orphans import Orphan, Orphans, UsedAs
from ptinspect.state.page_owner import PageOwner


def orphans_table(orphans: Orphans) -> Table:
    """Lay out what is known of each orphan."""
    shown = len(orphans.orphans)
    rest = f"; the first {shown} of {orphans.total}" if shown < orphans.total else ""
    return Table(
        "orphans",
        (
            Column("pfn", Kind.HEX),
            Column("page_before"),
            Column("page_after"),
            Column("holds"),
            Column("named_by"),
            Column("allocated_by"),
        ),
        list(_rows(orphans.orphans)),
        f"What is known of them{rest}",
    )


def _rows(orphans: tuple[Orphan, ...]) -> Iterator[tuple[Cell, ...]]:
    for orphan in orphans:
        yield (
            orphan.pfn,
            orphan.before or None,
            orphan.after or None,
            _holds(orphan.used_as),
            "; ".join(orphan.on_stacks) or None,
            _allocated(orphan.owner),
        )


def _allocated(owner: PageOwner | str | None) -> str | None:
    if owner is None or isinstance(owner, str):
        return owner
    freed = "" if owner.allocated else ", freed since"
    return (
        f"{owner.comm}/{owner.pid}, {owner.when / 1e9:.3f} s after boot{freed}: "
        f"{' < '.join(owner.stack)}"
    )


def _holds(used_as: tuple[UsedAs, ...]) -> str | None:
    """What it holds at each level at which it makes sense; one word where all say the same."""
    if not used_as:
        return None
    if not any(each.used for each in used_as):
        return "nothing"
    sensible = [each for each in used_as if not each.bad] or list(used_as)
    return ", ".join(f"as {each.level} {each.used} of {each.entries}" for each in sensible)


def orphans_notes(orphans: Orphans) -> Iterator[str]:
    """Say what may have become of those that no stack explains."""
    unnamed = sum(not orphan.on_its_way for orphan in orphans.orphans)
    if not unnamed:
        return
    busy = orphans.at_work or orphans.running
    if busy:
        work = "; ".join(busy)
        yield (
            f"{unnamed} of them are explained by no stack. {work}: a table on its way may be named "
            "by a register alone, which only ELF dumps have. What is still there later is leaked."
        )
    else:
        yield (
            f"{unnamed} of them are explained by no stack, and no CPU runs a task: "
            "leaked, it seems."
        )
