# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A trace as a report, as a live view, and as JSON lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ptinspect.faces.report import Column, Kind, Report, Table
from ptinspect.trace.explain import ExplainedTable
from ptinspect.trace.hooks import LEVELS, WAYS
from ptinspect.trace.reader import EndEvent, TableEvent
from ptinspect.trace.totals import LiveTable, Totals, TraceResult

_LEVELS = LEVELS[1:]


def trace_report(
    result: TraceResult,
    target: str,
    *,
    top: int,
    leak_age_ns: int | None,
    explained: Sequence[ExplainedTable] | None = None,
) -> Report:
    """
    Lay out a trace.

    :param top: rows of each table by process, stack or page
    :param leak_age_ns: tables that are older than this are listed; ``None`` if not asked for
    :param explained: the census's orphans, if one was taken
    """
    totals = result.totals
    return Report(
        "trace",
        target,
        tuple(_tables(result, totals, target, top, leak_age_ns, explained)),
        notes=tuple(_notes(result)),
        missing=tuple(_missing(result)),
    )


def _tables(
    result: TraceResult,
    totals: Totals,
    target: str,
    top: int,
    leak_age_ns: int | None,
    explained: Sequence[ExplainedTable] | None,
) -> Iterator[Table]:
    yield Table(
        "levels",
        (
            Column("level"),
            Column("made", Kind.COUNT),
            Column("gone", Kind.COUNT),
            Column("net", Kind.COUNT),
        ),
        [(level.level, level.made, level.gone, level.net) for level in totals.levels],
        f"Tables that the kernel counted in and out, {result.seconds:.1f} s ({target})",
    )
    if totals.waiting is not None:
        yield Table(
            "ways",
            (
                Column("way"),
                *(Column(level, Kind.COUNT) for level in _LEVELS),
                Column("unknown level", Kind.COUNT),
                Column("wait p50 us", Kind.COUNT),
                Column("wait p99 us", Kind.COUNT),
                Column("wait max us", Kind.COUNT),
            ),
            [
                (
                    way.way,
                    *way.freed[1:],
                    way.freed[0],
                    way.wait_p50_us,
                    way.wait_p99_us,
                    way.wait_max_us,
                )
                for way in totals.ways
            ],
            "Tables released, by way, and how long they waited (at most, by histogram)",
        )
        yield Table(
            "waits",
            (
                Column("way"),
                Column("from us", Kind.COUNT),
                Column("to us", Kind.COUNT),
                Column("tables", Kind.COUNT),
            ),
            [(way.way, *bucket) for way in totals.ways for bucket in way.histogram],
            "Waits from unlinking to release",
        )
    yield _processes(totals, top)
    if totals.stacks:
        yield Table(
            "stacks",
            (
                Column("what"),
                Column("cause"),
                Column("level"),
                Column("tables", Kind.COUNT),
                Column("stack"),
            ),
            [
                (
                    "made" if stack.made else "unlinked",
                    stack.cause,
                    stack.level,
                    stack.count,
                    " < ".join(frame.split("+")[0] for frame in stack.frames),
                )
                for stack in totals.stacks[:top]
            ],
            "Where from: kernel stacks, innermost function first",
        )
    if totals.pending:
        yield Table(
            "pending",
            (
                Column("page", Kind.HEX),
                Column("level"),
                Column("way"),
                Column("age ms", Kind.COUNT),
                Column("unlinked by"),
            ),
            [
                (p.page, p.level, p.way, p.age_ns // 1_000_000, f"{p.comm}/{p.pid}")
                for p in sorted(totals.pending, key=lambda p: -p.age_ns)[:top]
            ],
            "Unlinked and not yet released, oldest first",
        )
    if leak_age_ns is not None:
        yield _left(totals, top, leak_age_ns)
    if explained is not None:
        yield explained_table(explained, top)
    yield _footer(result, totals)


def _processes(totals: Totals, top: int) -> Table:
    followed = totals.waiting is not None
    return Table(
        "processes",
        (
            Column("pid", Kind.COUNT),
            Column("name"),
            *(Column(f"made {level}", Kind.COUNT) for level in _LEVELS),
            Column("made ?", Kind.COUNT),
            Column("live", Kind.COUNT),
            *(Column(way, Kind.COUNT) for way in WAYS[1:]),
        ),
        [
            (
                process.pid,
                process.comm,
                *process.made[1:],
                process.made[0],
                process.live,
                *((process.freed[1:]) if followed else [None] * len(WAYS[1:])),
            )
            for process in totals.processes[:top]
        ],
        f"Processes (the first {top} of {len(totals.processes)}): tables made, still live, and "
        "unlinked by them and released, by way",
    )


def _left(totals: Totals, top: int, age_ns: int) -> Table:
    old = [table for table in totals.live if table.age_ns >= age_ns]
    # What outlived its mm comes first: that is what a leak looks like.
    old.sort(key=lambda table: (table.mm_ended_ns is None, -table.age_ns))
    return Table(
        "left",
        (
            Column("page", Kind.HEX),
            Column("level"),
            Column("age ms", Kind.COUNT),
            Column("mm", Kind.HEX),
            Column("mm ended ms ago", Kind.COUNT),
            Column("verdict"),
            Column("made by"),
            Column("stack"),
        ),
        [
            (
                table.page,
                table.level,
                table.age_ns // 1_000_000,
                table.mm,
                None if table.mm_ended_ns is None else table.mm_ended_ns // 1_000_000,
                verdict(table, age_ns),
                f"{table.comm}/{table.pid}",
                " < ".join(frame.split("+")[0] for frame in table.frames) or None,
            )
            for table in old[:top]
        ],
        f"Made during the trace, older than {age_ns / 1e9:g} s and still tables "
        f"(the first {top} of {len(old)})",
    )


def explained_table(explained: Sequence[ExplainedTable], top: int) -> Table:
    """Lay out what a trace says of tables."""
    return Table(
        "explained",
        (
            Column("page", Kind.HEX),
            Column("explanation"),
            Column("level"),
            Column("age ms", Kind.COUNT),
            Column("by"),
            Column("holder"),
            Column("space"),
            Column("va", Kind.HEX),
            Column("stack"),
        ),
        [
            (
                row.page,
                row.explanation.value,
                row.level,
                None if row.age_ns is None else row.age_ns // 1_000_000,
                row.maker,
                row.holder,
                row.space,
                row.va,
                " < ".join(frame.split("+")[0] for frame in row.frames) or None,
            )
            for row in explained[:top]
        ],
        "Tables that nothing holds in the census, or that outlived their mm "
        f"(the first {top} of {len(explained)})",
    )


def verdict(table: LiveTable, age_ns: int) -> str:
    """Say what an old table is: a suspect if its mm has ended as long ago as the age asked for."""
    if table.mm_ended_ns is None:
        return "in use, as far as the trace knows"
    if table.mm_ended_ns >= age_ns:
        return "suspect: its mm has ended"
    return "its mm has just ended"


def _footer(result: TraceResult, totals: Totals) -> Table:
    counter = result.counter
    return Table(
        "footer",
        (
            Column("pages_made", Kind.COUNT),
            Column("pages_gone", Kind.COUNT),
            Column("net_pages", Kind.COUNT),
            Column("nr_page_table_pages_changed_by", Kind.COUNT),
            Column("waiting", Kind.COUNT),
            Column("missed_calls", Kind.COUNT),
            Column("dropped", Kind.COUNT),
            Column("releases_lost", Kind.COUNT),
            Column("destructors_unseen", Kind.COUNT),
            Column("RCU_batches", Kind.COUNT),
            Column("tables_in_RCU_batches", Kind.COUNT),
            Column("exact", Kind.TEXT),
        ),
        [
            (
                totals.made_pages,
                totals.gone_pages,
                totals.net_pages,
                counter.change,
                totals.waiting,
                result.missed,
                sum(result.dropped.values()),
                totals.lost_releases,
                totals.gone_unseen,
                totals.batches,
                totals.batch_tables,
                result.exact,
            )
        ],
        "Beside the kernel's counter",
        single=True,
    )


def _notes(result: TraceResult) -> Iterator[str]:
    totals, counter = result.totals, result.counter
    if result.exact:
        yield (
            "Exact: nothing was missed or dropped, and nr_page_table_pages changed by as many "
            "pages."
        )
    elif counter.change is not None and counter.change != totals.net_pages and not counter.at_rest:
        yield (
            "Page tables were made or freed while the trace began or ended: "
            f"nr_page_table_pages moved from {counter.before_open} to {counter.after_open} at the "
            f"beginning and from {counter.before_close} to {counter.after_close} at the end."
        )
    if totals.unattributed and result.filtered:
        yield f"{totals.unattributed} tables were made by others than those that were followed."
    yield from (f"Not seen on this kernel: {sentence}." for sentence in result.unseen)


def _missing(result: TraceResult) -> Iterator[str]:
    totals, counter = result.totals, result.counter
    if result.ended_early is not None:
        yield f"the trace ended early: {result.ended_early}"
    if result.missed is None:
        yield "how many calls of the hooks were skipped is not known"
    elif result.missed:
        yield (
            f"up to {result.missed} events were missed (BPF skips a program that interrupts itself)"
        )
    yield from (f"dropped {count}: {what}" for what, count in sorted(result.dropped.items()))
    if totals.lost_releases:
        yield f"the release of {totals.lost_releases} tables was not seen"
    if totals.gone_unseen:
        yield (
            f"{totals.gone_unseen} tables were released without their destructor having been seen"
        )
    if totals.lost_records:
        yield f"{totals.lost_records} waiting or live tables are in no map: it was full"
    if totals.unattributed and not result.filtered:
        yield f"{totals.unattributed} tables are in no row of a process: the map was full"
    if counter.change is None:
        yield "nr_page_table_pages could not be read"
    elif counter.change != totals.net_pages:
        yield (
            f"what was seen differs from nr_page_table_pages by "
            f"{totals.net_pages - counter.change} pages"
        )


def live_lines(totals: Totals, before: Totals | None, top: int) -> Iterator[tuple[str, ...]]:
    """
    Yield the live view's rows, a heading first: what each process does in a second.

    :param before: the reading before, for rates; ``None`` for the first
    """
    seconds = (totals.nsecs - before.nsecs) / 1e9 if before is not None else 0.0
    earlier = {(p.pid, p.comm): p for p in before.processes} if before is not None else {}
    yield ("pid", "name", *(f"{level}/s" for level in _LEVELS), "freed/s", "live")
    rows = []
    for process in totals.processes:
        old = earlier.get((process.pid, process.comm))
        made = [
            n - (old.made[code + 1] if old is not None else 0)
            for code, n in enumerate(process.made[1:])
        ]
        freed = sum(process.freed) - (sum(old.freed) if old is not None else 0)
        rows.append((sum(made) + freed, process, made, freed))
    rows.sort(key=lambda row: (-row[0], -(row[1].live or 0)))
    for _, process, made, freed in rows[:top]:
        rates = [f"{n / seconds:.0f}" if seconds else "-" for n in (*made, freed)]
        live = "-" if process.live is None else str(process.live)
        yield (str(process.pid), process.comm, *rates, live)


def reading_data(totals: Totals, top: int) -> dict[str, Any]:
    """Write a reading for JSON lines; of processes those that made and freed most."""
    return {
        "kind": "reading",
        "nsecs": totals.nsecs,
        "pages_made": totals.made_pages,
        "pages_gone": totals.gone_pages,
        "net_pages": totals.net_pages,
        "waiting": totals.waiting,
        "levels": {
            level.level: {"made": level.made, "gone": level.gone} for level in totals.levels
        },
        "ways": {
            way.way: {
                "freed": sum(way.freed),
                "wait_p50_us": way.wait_p50_us,
                "wait_p99_us": way.wait_p99_us,
            }
            for way in totals.ways
        },
        "processes": [
            {
                "pid": process.pid,
                "comm": process.comm,
                "made": dict(zip(LEVELS, process.made)),
                "live": process.live_by_level and dict(zip(LEVELS, process.live_by_level)),
                "freed": dict(zip(WAYS[1:], process.freed[1:])),
            }
            for process in totals.processes[:top]
        ],
    }


def event_data(event: TableEvent | EndEvent) -> dict[str, Any]:
    """Write an event for JSON lines."""
    if isinstance(event, EndEvent):
        return {"kind": "ended", "nsecs": event.nsecs, "mm": f"{event.mm:#x}"}
    data: dict[str, Any] = {
        "kind": event.kind,
        "nsecs": event.nsecs,
        "page": f"{event.page:#x}",
        "level": event.level,
        "pid": event.pid,
        "comm": event.comm,
    }
    if event.kind == "made":
        data["mm"] = None if event.mm is None else f"{event.mm:#x}"
    else:
        data["way"] = event.way
    if event.kind == "freed":
        data["waited_ns"] = event.waited_ns
    return data


def tables_data(totals: Totals) -> dict[str, Any]:
    """Write all tables that are left at the end of a trace for JSON lines."""
    return {
        "kind": "tables",
        "nsecs": totals.nsecs,
        "pending": [
            {
                "page": f"{table.page:#x}",
                "level": table.level,
                "way": table.way,
                "age_ns": table.age_ns,
                "pid": table.pid,
                "comm": table.comm,
            }
            for table in totals.pending
        ],
        "live": [
            {
                "page": f"{table.page:#x}",
                "level": table.level,
                "age_ns": table.age_ns,
                "mm": None if table.mm is None else f"{table.mm:#x}",
                "mm_ended_ns": table.mm_ended_ns,
                "pid": table.pid,
                "comm": table.comm,
                "stack": list(table.frames),
            }
            for table in totals.live
        ],
    }
