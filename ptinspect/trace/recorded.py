# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A trace that was written down (``trace --format jsonl``): which of its tables wait and live.

One that has ended says so in one line. One that still runs is replayed from its events.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptinspect.errors import UsageError
from ptinspect.trace.totals import LiveTable, PendingTable


@dataclass(frozen=True)
class Recorded:
    """What a record says, at the moment of its last line."""

    release: str
    #: Of the boot that was traced; ``None`` if that machine did not tell.
    boot_id: str | None
    #: Nanoseconds after boot: the gate was opened, and the last line was written.
    began_ns: int
    until_ns: int
    #: What is younger counts as just made.
    young_ns: int
    #: Whether the trace has ended: what was made since, it does not know.
    ended: bool
    #: Whether it followed only some processes.
    filtered: bool
    #: Of the trace: why it is not exact, in sentences.
    missing: tuple[str, ...]
    pending: tuple[PendingTable, ...]
    live: tuple[LiveTable, ...]

    def aged(self, now_ns: int) -> Recorded:
        """Get the same with the ages that its tables have at another moment."""
        more = max(0, now_ns - self.until_ns)
        return replace(
            self,
            until_ns=self.until_ns + more,
            pending=tuple(replace(t, age_ns=t.age_ns + more) for t in self.pending),
            live=tuple(
                replace(
                    t,
                    age_ns=t.age_ns + more,
                    mm_ended_ns=None if t.mm_ended_ns is None else t.mm_ended_ns + more,
                )
                for t in self.live
            ),
        )


def read_record(path: Path) -> Recorded:
    """
    Read what ``ptinspect trace --format jsonl`` wrote; the trace may still be running.

    :raises UsageError: if it cannot be read, or does not tell tables one by one
    """
    try:
        with path.open() as lines:
            return _read(_lines(lines, path), path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is no record of a trace: {error!r}") from error


def _lines(lines: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.endswith("\n"):
            return  # it is just being written
        yield json.loads(line)


@dataclass
class _Replay:
    """The tables of a trace that runs, by page."""

    live: dict[int, dict[str, Any]]
    pending: dict[int, dict[str, Any]]
    ended: dict[int, int]

    def take(self, line: dict[str, Any]) -> None:
        kind = line["kind"]
        if kind == "ended":
            self.ended[int(line["mm"], 16)] = line["nsecs"]
            return
        page = int(line["page"], 16)
        self.live.pop(page, None)
        if kind == "made":
            self.pending.pop(page, None)
            self.live[page] = line
        elif kind == "unlinked":
            self.pending[page] = line
        else:
            self.pending.pop(page, None)


def _read(lines: Iterator[dict[str, Any]], path: Path) -> Recorded:
    begin = next(lines, {})
    if begin.get("kind") != "begin":
        raise UsageError(f"{path} is no record of a trace: it has no beginning")
    replay = _Replay({}, {}, {})
    now = int(begin["nsecs"])
    tables: dict[str, Any] | None = None
    missing: tuple[str, ...] = ()
    for line in lines:
        kind = line["kind"]
        if kind in ("made", "unlinked", "freed", "ended"):
            replay.take(line)
        elif kind == "tables":
            tables = line
        elif kind == "summary":
            missing = tuple(line["missing"])
        now = max(now, int(line.get("nsecs", 0)))
    if tables is None and not begin["events"]:
        raise UsageError(
            f"{path} does not tell tables one by one: trace with --leaks AGE and let it end, or "
            "with --events, then it may still run"
        )
    common = Recorded(
        release=str(begin["release"]),
        boot_id=begin["boot_id"],
        began_ns=int(begin["nsecs"]),
        until_ns=now,
        young_ns=int(begin["young_ns"]),
        ended=tables is not None,
        filtered=bool(begin["filtered"]),
        missing=missing,
        pending=(),
        live=(),
    )
    if tables is not None:
        return replace(
            common,
            until_ns=int(tables["nsecs"]),
            pending=tuple(_pending(row, row["age_ns"]) for row in tables["pending"]),
            live=tuple(
                _live(row, row["age_ns"], row["mm_ended_ns"], tuple(row["stack"]))
                for row in tables["live"]
            ),
        )
    return replace(
        common,
        pending=tuple(_pending(row, now - row["nsecs"]) for row in replay.pending.values()),
        live=tuple(_replayed(row, now, replay.ended) for row in replay.live.values()),
    )


def _replayed(row: dict[str, Any], now: int, ended: dict[int, int]) -> LiveTable:
    end = None if row["mm"] is None else ended.get(int(row["mm"], 16))
    # An mm may have the address of one that ended before this table was made.
    since = None if end is None or end <= row["nsecs"] else now - end
    return _live(row, now - row["nsecs"], since, ())


def _pending(row: dict[str, Any], age_ns: int) -> PendingTable:
    return PendingTable(
        int(row["page"], 16),
        str(row["level"]),
        str(row["way"]),
        int(age_ns),
        int(row["pid"]),
        str(row["comm"]),
    )


def _live(
    row: dict[str, Any], age_ns: int, ended_ns: int | None, stack: tuple[str, ...]
) -> LiveTable:
    return LiveTable(
        int(row["page"], 16),
        str(row["level"]),
        int(age_ns),
        None if row["mm"] is None else int(row["mm"], 16),
        None if ended_ns is None else int(ended_ns),
        int(row["pid"]),
        str(row["comm"]),
        stack,
    )
