# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A summary as a report."""

from __future__ import annotations

from collections.abc import Iterator

from ptinspect.faces.report import Cell, Column, Kind, Report, Table
from ptinspect.records import Summary


def summary_report(summary: Summary, target: str, *, racing: bool) -> Report:
    """Lay out a summary: typed pages by node and order, and the reconciliation."""
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
                    Column("counted pages", Kind.COUNT),
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
            Table(
                "accounting",
                (Column("what"), Column("pages", Kind.COUNT)),
                tuple(_accounting(summary)),
                "Accounting",
            ),
            Table(
                "seen",
                (Column("what"), Column("pages", Kind.COUNT)),
                (
                    ("struct pages scanned", summary.scanned_pages),
                    ("struct pages that could not be read", summary.unreadable_pages),
                ),
                "Seen",
            ),
        ),
        notes=tuple(_notes(summary, racing)),
        missing=tuple(_missing(summary)),
    )


def _accounting(summary: Summary) -> Iterator[tuple[Cell, Cell]]:
    yield "typed, as the kernel counts them", summary.counted_pages
    counter = summary.counter
    if counter is None:
        yield "NR_PAGETABLE", None
        return
    yield "NR_PAGETABLE, global (as in /proc/vmstat)", counter.global_pages
    for cpu, pages in sorted(counter.cpu_remainders.items()):
        yield f"NR_PAGETABLE, not yet folded in by CPU {cpu}", pages
    yield "NR_PAGETABLE, exact", counter.exact_pages
    if len(counter.node_pages) > 1:
        for node, pages in sorted(counter.node_pages.items()):
            yield f"NR_PAGETABLE, node {node}", pages
    yield "difference", summary.difference


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


def _missing(summary: Summary) -> Iterator[str]:
    if summary.unreadable_pages:
        yield f"{summary.unreadable_pages} struct pages could not be read"
    if summary.unknown_orders:
        yield f"the order of {summary.unknown_orders} descriptors is unknown: counted as one page"
    if summary.counter is None:
        yield summary.counter_problem or "NR_PAGETABLE could not be read"
