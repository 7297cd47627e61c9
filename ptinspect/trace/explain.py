# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A trace beside a census of the same kernel: what orphans are, and where traced tables hang.

Both know a table by the address of its ``struct page``, which is that of its descriptor. The
census is taken while the trace still runs, so a table that the trace does not know is older than
the trace, or was released between the two; whether it is a table still tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ptinspect.census import Census, Holder
from ptinspect.trace.totals import LiveTable, PendingTable


class Explanation(Enum):
    """What a descriptor that nothing holds, or a table that outlived its mm, is."""

    WAITING = "waiting for its release"
    JUST_MADE = "just made"
    RELEASED = "released meanwhile"
    SUSPECT = "suspect: its mm has ended"
    LOST = "suspect: its mm lives and does not reach it"
    OLDER = "older than the trace"
    UNKNOWN = "not known to the trace: older, made after it, or of others than it followed"
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
    live: Sequence[LiveTable],
    pending: Sequence[PendingTable],
    age_ns: int,
    is_table: Callable[[int], bool],
    *,
    unknown: Explanation = Explanation.OLDER,
) -> list[ExplainedTable]:
    """
    Explain every orphan of a census, and every traced table that has outlived its mm.

    :param live: what the trace says are tables, after the census
    :param pending: what it says waits for its release
    :param age_ns: what is younger is just made
    :param is_table: whether a struct page is marked as a page table now
    :param unknown: what a table is that the trace does not know
    """
    return list(
        _explained(
            census,
            {table.page: table for table in live},
            {table.page: table for table in pending},
            age_ns,
            is_table,
            unknown,
        )
    )


def _explained(
    census: Census,
    live: dict[int, LiveTable],
    pending: dict[int, PendingTable],
    age_ns: int,
    is_table: Callable[[int], bool],
    unknown: Explanation,
) -> Iterator[ExplainedTable]:
    orphans = census.scan.addresses[census.unexplained()].tolist()
    for page in orphans:
        table = live.get(page)
        if page in pending:
            yield _row(page, Explanation.WAITING, pending[page], Holder.UNEXPLAINED)
        elif table is None:
            known = unknown if is_table(page) else Explanation.RELEASED
            yield _row(page, known, None, Holder.UNEXPLAINED)
        else:
            yield _row(page, judge(table, age_ns), table, Holder.UNEXPLAINED)
    seen = set(orphans)
    for page, table in live.items():
        ended = table.mm_ended_ns is not None and table.mm_ended_ns >= age_ns
        if page in seen or not ended:
            continue
        holder, space, va = _place(census, page)
        explanation = judge(table, age_ns) if holder is None else Explanation.HELD
        yield _row(page, explanation, table, holder, space, va)


def explain_page(
    page: int,
    census: Census | None,
    live: Mapping[int, LiveTable],
    pending: Mapping[int, PendingTable],
    age_ns: int,
    *,
    unknown: Explanation = Explanation.OLDER,
) -> ExplainedTable:
    """
    Explain one table.

    :param page: address of its struct page
    :param census: where it hangs, if that was looked at
    :param live: what the trace says are tables, by page
    :param pending: what it says waits for its release, by page
    """
    waits = pending.get(page)
    if waits is not None:
        return _row(page, Explanation.WAITING, waits, None)
    table = live.get(page)
    holder, space, va = (None, None, None) if census is None else _place(census, page)
    if holder is not None and holder is not Holder.UNEXPLAINED:
        return _row(page, Explanation.HELD, table, holder, space, va)
    explanation = unknown if table is None else judge(table, age_ns)
    return _row(page, explanation, table, holder, space, va)


def _place(census: Census, page: int) -> tuple[Holder | None, str | None, int | None]:
    """Get what holds a table in a census, and where it hangs; nothing if it is not typed there."""
    addresses = census.scan.addresses
    index = int(np.searchsorted(addresses, np.uint64(page)))
    if index == len(addresses) or int(addresses[index]) != page:
        return None, None, None
    owner = next(census.owners_of(index), None)
    return (
        Holder(int(census.holder[index])),
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
