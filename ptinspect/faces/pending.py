# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tables that wait to be freed, as a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ptinspect.faces.report import Cell, Column, Kind, Report, Table
from ptinspect.kernel.paging import Paging
from ptinspect.state.pending import NO_LEVEL, Pending, Way
from ptinspect.tables.spaces import Space


def pending_report(
    pending: Pending,
    paging: Paging,
    spaces: Sequence[Space],
    target: str,
    *,
    each_table: bool,
    racing: bool,
) -> Report:
    """
    Lay out what waits: RCU's lists, each callback and batch that frees tables, the tables.

    :param spaces: Names the mms whose tables are gathered.
    :param each_table: Whether to list every table.
    """
    counts = pending.table_counts().tolist()
    names = {space.mm.address: space.name for space in spaces if space.mm is not None}
    tables = [
        _total(pending),
        *_lists(pending, counts),
        Table(
            "frees",
            (
                Column("way"),
                Column("segment"),
                Column("cpu", Kind.COUNT),
                Column("at", Kind.HEX),
                Column("function"),
                Column("tables", Kind.COUNT),
                Column("typed", Kind.COUNT),
                Column("on_stack_of"),
                Column("space"),
            ),
            list(_frees(pending, counts, names)),
            "Callbacks, batches and list nodes that free tables",
        ),
    ]
    if each_table:
        tables.append(_tables(pending, paging))
    return Report(
        "pending", target, tables, tuple(_notes(pending, racing, target)), pending.missing
    )


def _total(pending: Pending) -> Table:
    gp = None if pending.rcu is None else pending.rcu.grace_period
    return Table(
        "total",
        (
            Column("tables", Kind.COUNT),
            Column("typed_tables", Kind.COUNT),
            Column("gp_seq", Kind.HEX),
            Column("grace_period_in_progress"),
            Column("began_jiffies_ago", Kind.COUNT),
        ),
        [
            (
                len(pending.pfns),
                int(pending.typed.sum()),
                *(
                    (None, None, None)
                    if gp is None
                    else (gp.gp_seq, gp.in_progress, gp.started_ago)
                ),
            )
        ],
        "Tables that wait to be freed",
        single=True,
    )


def _lists(pending: Pending, counts: Sequence[int]) -> Iterator[Table]:
    if pending.rcu is None:
        return
    freeing: Counter[tuple[object, object]] = Counter()
    tables: Counter[tuple[object, object]] = Counter()
    for free, count in zip(pending.frees, counts):
        if free.way is Way.RCU:
            freeing[free.segment, free.cpu] += 1
            tables[free.segment, free.cpu] += count
    yield Table(
        "callbacks",
        (
            Column("cpu", Kind.COUNT),
            Column("segment"),
            Column("callbacks", Kind.COUNT),
            Column("free_tables", Kind.COUNT),
            Column("tables", Kind.COUNT),
            Column("wanted_gp_seq", Kind.HEX),
            Column("periods_to_go", Kind.COUNT),
            Column("jiffies_at_least", Kind.COUNT),
            Column("jiffies_at_most", Kind.COUNT),
        ),
        [
            (
                each.cpu,
                each.segment.value,
                len(each.heads),
                freeing[each.segment, each.cpu],
                tables[each.segment, each.cpu],
                each.wanted_gp_seq,
                each.grace_periods_to_go,
                each.waited_at_least,
                each.waited_at_most,
            )
            for each in pending.rcu.lists
        ],
        "RCU callbacks of any kind; free_tables: those that free tables",
    )


def _frees(
    pending: Pending, counts: Sequence[int], names: dict[int, str]
) -> Iterator[Sequence[Cell]]:
    typed = Counter(pending.free[pending.typed].tolist())
    for number, free in enumerate(pending.frees):
        yield (
            free.way.value,
            None if free.segment is None else free.segment.value,
            free.cpu,
            free.address,
            free.function or None,
            counts[number],
            typed[number],
            free.task or None,
            None if free.mm is None else names.get(free.mm, f"mm {free.mm:#x}"),
        )


def _tables(pending: Pending, paging: Paging) -> Table:
    rows = []
    for pfn, address, number, level, typed in zip(
        pending.pfns.tolist(),
        pending.addresses.tolist(),
        pending.free.tolist(),
        pending.level.tolist(),
        pending.typed.tolist(),
    ):
        free = pending.frees[number]
        name = None if level == NO_LEVEL else paging.levels[level].name
        rows.append((pfn, address, name, typed, free.way.value, free.address))
    return Table(
        "tables",
        (
            Column("pfn", Kind.HEX),
            Column("physical", Kind.HEX),
            Column("level"),
            Column("typed"),
            Column("way"),
            Column("freed_by", Kind.HEX),
        ),
        rows,
        "Each table",
    )


def _notes(pending: Pending, racing: bool, target: str) -> Iterator[str]:
    yield f"{len(pending.pfns)} tables wait in {len(pending.frees)} places ({target})"
    yield (
        "A table that only a CPU's registers name, between its tree and a batch, is not seen; "
        "stacks are searched for batches, not unwound."
    )
    if not pending.batched:
        yield (
            "This kernel frees unmapped tables together with other pages, without RCU: those on "
            "their way are not told from other pages, and are not typed any more."
        )
    if racing:
        yield "The target was running while it was read: lists change, and breaks are no finding."
