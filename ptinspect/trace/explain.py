# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A trace beside a census of the same kernel: what orphans are, and where traced tables hang.

Both know a table by the address of its ``struct page``, which is that of its descriptor. The
census is taken while the trace still runs, so a table that the trace does not know is older than
the trace, or was released between the two; whether it is a table still tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ptinspect.census import Census, Holder
from ptinspect.trace.totals import LiveTable, PendingTable, Totals


class Explanation(Enum):
    """What a descriptor that nothing holds, or a table that outlived its mm, is."""

    WAITING = "waiting for its release"
    JUST_MADE = "just made"
    RELEASED = "released meanwhile"
    SUSPECT = "suspect: its mm has ended"
    LOST = "suspect: its mm lives and does not reach it"
    OLDER = "older than the trace"
    HELD = "held"


@dataclass(frozen=True)
class ExplainedTable:
    """One table of the census or the trace, with what the other says of it."""

    page: int
    explanation: Explanation
    #: As the trace saw it; ``None`` if it did not.
    level: str | None
    age_ns: int | None
    maker: str | None
    frames: tuple[str, ...]
    #: Name of what holds it in the census; ``None`` if it is not typed there.
    holder: str | None
    #: Where it hangs, if a tree reaches it.
    space: str | None
    va: int | None


def explain_tables(
    census: Census,
    totals: Totals,
    age_ns: int,
    is_table: Callable[[int], bool],
) -> list[ExplainedTable]:
    """
    Explain every orphan of a census, and every traced table that has outlived its mm.

    :param totals: the trace's last reading, after the census
    :param age_ns: what is younger is just made
    :param is_table: whether a struct page is marked as a page table now
    """
    return list(_explained(census, totals, age_ns, is_table))


def _explained(
    census: Census, totals: Totals, age_ns: int, is_table: Callable[[int], bool]
) -> Iterator[ExplainedTable]:
    pending = {table.page: table for table in totals.pending}
    live = {table.page: table for table in totals.live}
    addresses = census.scan.addresses
    orphans = addresses[census.unexplained()].tolist()
    for page in orphans:
        table = live.get(page)
        if page in pending:
            yield _row(page, Explanation.WAITING, pending[page], Holder.UNEXPLAINED)
        elif table is None:
            known = Explanation.OLDER if is_table(page) else Explanation.RELEASED
            yield _row(page, known, None, Holder.UNEXPLAINED)
        else:
            yield _row(page, judge(table, age_ns), table, Holder.UNEXPLAINED)
    seen = set(orphans)
    for page, table in live.items():
        ended = table.mm_ended_ns is not None and table.mm_ended_ns >= age_ns
        if page in seen or not ended:
            continue
        index = int(np.searchsorted(addresses, np.uint64(page)))
        typed = index < len(addresses) and int(addresses[index]) == page
        if not typed:
            yield _row(page, judge(table, age_ns), table, None)
            continue
        holder = Holder(int(census.holder[index]))
        owner = next(census.owners_of(index), None)
        yield _row(
            page,
            Explanation.HELD,
            table,
            holder,
            None if owner is None else census.tables.spaces[owner.space].name,
            None if owner is None else owner.va,
        )


def judge(table: LiveTable, age_ns: int) -> Explanation:
    """Say what a traced table is that nothing holds."""
    if table.age_ns < age_ns:
        return Explanation.JUST_MADE
    if table.mm_ended_ns is None:
        return Explanation.LOST
    return Explanation.SUSPECT if table.mm_ended_ns >= age_ns else Explanation.JUST_MADE


def _row(
    page: int,
    explanation: Explanation,
    table: PendingTable | LiveTable | None,
    holder: Holder | None,
    space: str | None = None,
    va: int | None = None,
) -> ExplainedTable:
    return ExplainedTable(
        page,
        explanation,
        None if table is None else table.level,
        None if table is None else table.age_ns,
        None if table is None else f"{table.comm}/{table.pid}",
        table.frames if isinstance(table, LiveTable) else (),
        None if holder is None else holder.name.lower(),
        space,
        va,
    )
