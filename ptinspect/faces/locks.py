# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Page-table locks as a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ptinspect.census import Census
from ptinspect.faces.racing import doubtful
from ptinspect.faces.report import Cell, Column, Kind, Report, Table
from ptinspect.reached import census_missing
from ptinspect.state.lock_queues import CpuTask
from ptinspect.state.locks import LOCK_PROBLEMS, UNKNOWN_LEVEL, LockKind, Locks

#: Findings that are told in full; of the others only the number.
_MOST_FINDINGS = 20


def locks_report(
    census: Census,
    target: str,
    *,
    racing: bool,
    every: bool = False,
    space: int | None = None,
    limit: int | None = None,
) -> Report:
    """
    Lay out the locks of one target.

    :param every: Whether to list the locks that nobody has or wants, too.
    :param space: Index of the only space that is wanted.
    :param limit: The most locks to list.
    """
    locks = census.stories.locks
    rows = locks.notable()
    if every:
        rows = np.concatenate((rows, np.setdiff1d(np.arange(len(locks)), rows)))
    if space is not None:
        rows = rows[locks.space[rows] == space]
    rows = rows[:limit]
    findings, doubts = doubtful(list(_findings(locks)), racing=racing)
    notes = [f"{len(rows)} of {len(locks)} locks", *doubts]
    if len(locks.kernel_used):
        notes.append(
            f"The ptl of {len(locks.kernel_used)} kernel tables is not empty, though this kernel "
            "does not use it there."
        )
    return Report(
        "locks",
        target,
        (
            Table(
                "facts",
                (Column("table_locks"), Column("lock"), Column("split")),
                [
                    (
                        locks.home.value,
                        "unknown" if locks.type is None else locks.type.text,
                        locks.split.reason,
                    )
                ],
                f"Page-table locks ({target})",
                single=True,
            ),
            Table(
                "levels",
                (Column("level"), Column("user_tables"), Column("kernel_tables")),
                locks.levels,
                "Which lock guards the entries of which level",
            ),
            Table(
                "states",
                (Column("lock"), Column("level"), Column("state"), Column("locks", Kind.COUNT)),
                list(_states(locks)),
                "Locks by state",
            ),
            Table(
                "locks",
                (
                    Column("lock"),
                    Column("pfn", Kind.HEX),
                    Column("level"),
                    Column("space"),
                    Column("address", Kind.HEX),
                    Column("word", Kind.HEX),
                    Column("state"),
                    Column("held_by"),
                    Column("certainty"),
                    Column("waiting", Kind.COUNT),
                    Column("waiters"),
                    Column("problem"),
                ),
                _rows(locks, rows),
                "Locks, contended ones first",
            ),
        ),
        notes=notes,
        missing=tuple(dict.fromkeys((*census_missing(census), *locks.missing))),
        findings=findings,
    )


def _kind_name(locks: Locks, row: int) -> str:
    return "ptl" if locks.kind[row] == LockKind.TABLE else "page_table_lock"


def _level_name(locks: Locks, row: int) -> str | None:
    level = int(locks.level[row])
    return None if level == UNKNOWN_LEVEL else locks.tables.paging.levels[level].name


def _states(locks: Locks) -> Iterator[Sequence[Cell]]:
    states = locks.states()
    keys = np.rec.fromarrays((locks.kind, locks.level, states))
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    for row, count in zip(first.tolist(), counts.tolist()):
        yield _kind_name(locks, row), _level_name(locks, row), str(states[row]), count


def _rows(locks: Locks, rows: npt.NDArray[np.intp]) -> Iterator[Sequence[Cell]]:
    states = locks.states()
    has_word = locks.type is not None and locks.type.word is not None
    for row in rows.tolist():
        holding = locks.holding(row)
        space = int(locks.space[row])
        pfn = int(locks.pfn[row])
        there = bool(locks.readable[row]) and has_word
        waiters = [f"CPU {cpu}" for cpu in holding.waiting_cpus]
        yield (
            _kind_name(locks, row),
            pfn if locks.kind[row] == LockKind.TABLE else None,
            _level_name(locks, row),
            None if space < 0 else locks.tables.spaces[space].name,
            int(locks.address[row]) or None,
            int(locks.word[row]) if there else None,
            str(states[row]),
            ", ".join(_task_text(task) for task in holding.holders) or None,
            holding.certainty or None,
            holding.waiting,
            ", ".join([*waiters, *holding.waiting_tasks]) or None,
            LOCK_PROBLEMS[int(locks.problem[row])] or None,
        )


def _task_text(task: CpuTask) -> str:
    where = f" on CPU {task.cpu}" if task.cpu >= 0 else ""
    return f"{task.comm}/{task.pid}{where}"


def _findings(locks: Locks) -> Iterator[str]:
    rows = np.flatnonzero(locks.problem)
    for row in rows[:_MOST_FINDINGS].tolist():
        of = f"page {int(locks.pfn[row]):#x}"
        if locks.kind[row] == LockKind.MM:
            of = locks.tables.spaces[int(locks.space[row])].name
        yield (
            f"{_kind_name(locks, row)} of {of} is no lock: "
            f"{LOCK_PROBLEMS[int(locks.problem[row])]} "
            f"(at {int(locks.address[row]):#x}, word {int(locks.word[row]):#x})"
        )
    if len(rows) > _MOST_FINDINGS:
        yield f"{len(rows) - _MOST_FINDINGS} more locks that are none"
