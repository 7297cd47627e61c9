# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A summary as a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ptinspect.faces.report import Column, Kind, Report, Table
from ptinspect.records import CounterReading, ReachedSummary, Summary
from ptinspect.state.memcg import MemcgUsage


def summary_report(
    summary: Summary,
    reached: ReachedSummary | None,
    target: str,
    *,
    problem: str | None,
    racing: bool,
    memcgs: Sequence[MemcgUsage] | None = None,
    memcgs_missing: Sequence[str] = (),
) -> Report:
    """
    Lay out a summary: typed pages by node and order, tables by level, and the reconciliation.

    :param reached: ``None`` if there was no walk; *problem* says why, unless none was wanted.
    :param memcgs: Page tables by memory cgroup, if that was asked for.
    """
    return Report(
        command="summary",
        target=target,
        tables=(
            Table(
                "typed",
                (
                    Column("node", Kind.COUNT),
                    Column("order", Kind.COUNT),
                    Column("descriptors", Kind.COUNT),
                    Column("pages", Kind.COUNT),
                    Column("KiB", Kind.COUNT),
                    Column("counted_pages", Kind.COUNT),
                ),
                [
                    (
                        count.node,
                        count.order,
                        count.descriptors,
                        count.pages,
                        count.pages * summary.page_bytes // 1024,
                        count.counted_pages,
                    )
                    for count in summary.typed
                ],
                f"Pages typed as page tables ({target})",
            ),
            *(() if reached is None else _reached(reached)),
            *(() if memcgs is None else (_memcgs(memcgs, summary.page_bytes),)),
            _accounting(summary),
            *_counter_parts(summary.counter),
            Table(
                "seen",
                (
                    Column("struct_pages_scanned", Kind.COUNT),
                    Column("struct_pages_unreadable", Kind.COUNT),
                ),
                [(summary.scanned_pages, summary.unreadable_pages)],
                "Seen",
                single=True,
            ),
        ),
        notes=tuple(_notes(summary, racing)),
        missing=(*_missing(summary, reached, problem), *memcgs_missing),
    )


def _reached(reached: ReachedSummary) -> Iterator[Table]:
    yield Table(
        "levels",
        (
            Column("level"),
            Column("of"),
            Column("typed", Kind.COUNT),
            Column("untyped", Kind.COUNT),
            Column("KiB", Kind.COUNT),
            Column("fill_percent", Kind.COUNT),
            Column("empty_tables", Kind.COUNT),
            Column("empty_KiB", Kind.COUNT),
        ),
        [
            (
                level.level,
                level.owner,
                level.typed,
                level.untyped,
                level.table_bytes // 1024,
                level.used_entries * 100 // level.all_entries if level.all_entries else None,
                level.empty_tables,
                level.empty_bytes // 1024,
            )
            for level in reached.levels
        ],
        "Tables that the address spaces reach, each once",
    )
    yield Table(
        "reached",
        (
            Column("address_spaces", Kind.COUNT),
            Column("typed_but_not_reached", Kind.COUNT),
            Column("empty_user_KiB", Kind.COUNT),
        ),
        [
            (
                reached.spaces,
                reached.unreached,
                sum(level.empty_bytes for level in reached.levels if level.owner == "user") // 1024,
            )
        ],
        single=True,
    )
    yield Table(
        "holders",
        (
            Column("holder"),
            Column("descriptors", Kind.COUNT),
            Column("pages", Kind.COUNT),
            Column("KiB", Kind.COUNT),
        ),
        [(h.holder, h.descriptors, h.pages, h.bytes // 1024) for h in reached.holders],
        "What holds the typed pages; list --orphan shows what is unexplained",
    )
    if reached.placement:
        yield Table(
            "placement",
            (
                Column("table_node", Kind.COUNT),
                Column("page_node", Kind.COUNT),
                Column("entries", Kind.COUNT),
            ),
            [(p.table_node, p.page_node, p.entries) for p in reached.placement],
            "Mapped pages by the node of their table and their own",
        )


def _memcgs(memcgs: Sequence[MemcgUsage], page_bytes: int) -> Table:
    return Table(
        "memcgs",
        (
            Column("cgroup"),
            Column("descriptors", Kind.COUNT),
            Column("pages", Kind.COUNT),
            Column("KiB", Kind.COUNT),
            Column("KiB_with_below", Kind.COUNT),
        ),
        [
            (
                usage.path,
                usage.descriptors,
                usage.pages,
                usage.pages * page_bytes // 1024,
                usage.pages_with_below * page_bytes // 1024,
            )
            for usage in memcgs
        ],
        "By memory cgroup; the last row, without a name, is charged to none",
    )


def _accounting(summary: Summary) -> Table:
    counter = summary.counter
    return Table(
        "accounting",
        (
            Column("typed_pages_as_counted", Kind.COUNT),
            Column("nr_pagetable_global", Kind.COUNT),
            Column("nr_pagetable_exact", Kind.COUNT),
            Column("difference", Kind.COUNT),
        ),
        [
            (
                summary.counted_pages,
                None if counter is None else counter.global_pages,
                None if counter is None else counter.exact_pages,
                summary.difference,
            )
        ],
        "Accounting in pages (/proc/vmstat shows the global part)",
        single=True,
    )


def _counter_parts(counter: CounterReading | None) -> Iterator[Table]:
    """Where NR_PAGETABLE lies: what CPUs have not folded in yet, and the nodes."""
    if counter is None:
        return
    yield Table(
        "cpu_remainders",
        (Column("cpu", Kind.COUNT), Column("pages", Kind.COUNT)),
        sorted(counter.cpu_remainders.items()),
        "NR_PAGETABLE not yet folded in",
    )
    if len(counter.node_pages) > 1:
        yield Table(
            "nodes",
            (Column("node", Kind.COUNT), Column("pages", Kind.COUNT)),
            sorted(counter.node_pages.items()),
            "NR_PAGETABLE by node",
        )


def _notes(summary: Summary, racing: bool) -> Iterator[str]:
    difference = summary.difference
    if difference is None:
        return
    if difference == 0:
        yield "Typed pages and NR_PAGETABLE agree to the page."
    elif racing:
        yield "The target was running while it was read: a small difference is no finding."
    elif not summary.complete:
        yield "The difference may be due to what could not be seen."
    else:
        yield "Typed pages and NR_PAGETABLE disagree: tables leaked, or were freed uncounted."


def _missing(
    summary: Summary, reached: ReachedSummary | None, problem: str | None
) -> Iterator[str]:
    if problem is not None:
        yield f"the tables could not be walked: {problem}"
    if reached is not None:
        yield from reached.missing
    else:
        if summary.unreadable_pages:
            yield f"{summary.unreadable_pages} struct pages could not be read"
        if summary.unknown_orders:
            yield f"the order of {summary.unknown_orders} descriptors is unknown"
    if summary.counter is None:
        yield summary.counter_problem or "NR_PAGETABLE could not be read"
