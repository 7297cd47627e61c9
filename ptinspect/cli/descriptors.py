# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect list`` and ``ptinspect show``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from ptinspect.census import untyped_census
from ptinspect.cli.census import survey
from ptinspect.cli.output import emit, format_option, target_heading, walk_option
from ptinspect.cli.spaces import find_space
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.cli.traced import read_trace, trace_option
from ptinspect.errors import UsageError
from ptinspect.faces.descriptors import list_report, show_report
from ptinspect.faces.orphans import orphans_notes, orphans_table
from ptinspect.faces.report import Table
from ptinspect.listing import (
    CENSUS_COLUMNS,
    COMPUTED_COLUMNS,
    DEFAULT_COLUMNS,
    SCAN_COLUMNS,
    Listing,
)
from ptinspect.locate import locate_ptdesc
from ptinspect.orphans import describe_orphans
from ptinspect.reach import reach_of
from ptinspect.reached import census_missing, scan_missing
from ptinspect.state.fields import describe_ptdesc
from ptinspect.target import open_target

_LEVEL = click.Choice(["PTE", "PMD", "PUD", "P4D", "PGD"], case_sensitive=False)


@click.command("list")
@target_options
@click.option("--node", type=int, metavar="N", help="Only descriptors of this NUMA node.")
@click.option("--order", type=int, metavar="N", help="Only tables of this allocation order.")
@click.option("--level", type=_LEVEL, help="Only tables of this level, where it is known.")
@click.option("--flag", "flags", multiple=True, metavar="PG_NAME", help="Only with this flag set.")
@click.option(
    "--where",
    "conditions",
    multiple=True,
    metavar="COLUMN OP VALUE",
    help="Only where a column compares so: =, !=, <, <=, >, >=, & (any of these bits).",
)
@click.option(
    "--columns",
    metavar="A,B,...",
    help=f"What to show instead of {','.join(DEFAULT_COLUMNS)}: also "
    f"{','.join(sorted({*COMPUTED_COLUMNS, *CENSUS_COLUMNS} - {*DEFAULT_COLUMNS}))}, "
    "any member of struct ptdesc, or raw:MEMBER.",
)
@click.option("--sort", metavar="COLUMN", help="Sort by a column; -COLUMN: largest first.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N rows.")
@click.option("--space", metavar="NAME", help="Only tables that this space reaches: PID or kernel.")
@click.option(
    "--orphan", is_flag=True, help="Only what nothing accounts for, and what is known of it."
)
@click.option(
    "--untyped", is_flag=True, help="Instead, the pages that hold tables but are not typed as such."
)
@trace_option
@walk_option
@format_option
def list_command(
    node: int | None,
    order: int | None,
    space: str | None,
    orphan: bool,
    untyped: bool,
    level: str | None,
    flags: tuple[str, ...],
    conditions: tuple[str, ...],
    columns: str | None,
    sort: str | None,
    limit: int | None,
    trace: Path | None,
    walk: bool,
    output_format: str,
) -> int:
    """
    One row for each page-table descriptor.

    \b
    Examples:
      ptinspect --sample x86_64-7.3 list --limit 10
      ptinspect list --where 'refcount != 1' --columns pfn,refcount,flags
      ptinspect -c vmcore list --node 1 --format csv
      ptinspect -c vmcore list --untyped --columns pfn,level,space,va,pt_index
    """
    conditions += tuple(
        f"{name} = {value}"
        for name, value in (("node", node), ("order", order), ("level", level))
        if value is not None
    )
    conditions += tuple(f"flags & {flag}" for flag in flags)
    if trace is not None and not orphan:
        raise UsageError("--trace explains orphans: it needs --orphan")
    if orphan:
        conditions += ("holder = unexplained",)
    with open_target(chosen_target()) as target:
        if trace is not None:
            read_trace(trace, target)  # what is wrong with it is said before the long work
        seen = survey(target.prog, walk=walk)
        # Once more: a trace that runs shall know all tables that the census found.
        traced = None if trace is None else read_trace(trace, target)
        if untyped:
            if seen.census is None:
                raise UsageError("--untyped needs a walk of the address spaces")
            others = untyped_census(target.prog, seen.census)
            seen = replace(seen, scan=others.scan, census=others)
        listing = Listing(target.prog, seen.scan, seen.census, seen.mapped_nodes)
        names = _column_names(columns, DEFAULT_COLUMNS if seen.census else SCAN_COLUMNS)
        within = None
        if space is not None:
            if seen.census is None:
                raise UsageError("--space needs a walk of the address spaces")
            chosen = find_space(seen.census.spaces, space)
            within = seen.census.reached_by(chosen)
        rows = listing.select(conditions, sort, limit, within)
        for name in names:
            listing.column(name)
        missing = scan_missing(seen.scan) if seen.census is None else census_missing(seen.census)
        if seen.problem is not None:
            missing.append(f"the tables could not be walked: {seen.problem}")
        missing.extend(listing.missing)
        extra: list[Table] = []
        notes: list[str] = []
        if orphan and seen.census is not None:
            known = describe_orphans(target.prog, seen.census)
            extra.append(orphans_table(known))
            notes.extend(orphans_notes(known))
            missing.extend(known.missing)
            if traced is not None:
                extra.append(traced.orphans_table(target.prog, seen.census))
                notes.extend(traced.notes())
                missing.extend(traced.missing())
        report = list_report(
            listing, names, rows, missing, target_heading(target), more=extra, notes=notes
        )
    return emit(report, output_format)


def _column_names(text: str | None, default: Sequence[str]) -> Sequence[str]:
    if text is None:
        return default
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("--columns names no column")
    return names


@click.command("show", short_help="One descriptor: every member, and what it means here.")
@target_options
@click.argument("address", metavar="ADDR")
@click.option("--level", type=_LEVEL, help="Decode it as a table of this level.")
@click.option(
    "--entries",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    metavar="N",
    help="List at most N entries that are not empty.",
)
@trace_option
@walk_option
@format_option
def show_command(
    address: str,
    level: str | None,
    entries: int,
    trace: Path | None,
    walk: bool,
    output_format: str,
) -> int:
    """
    One descriptor: every member and what it means in this table, what reaches it, what it holds.

    ADDR is a page frame number, a physical or direct-map address, or the address of a struct page
    or ptdesc; pfn:N, phys:ADDR, page:ADDR, ptdesc:ADDR and virt:ADDR leave no doubt. Members that
    have no meaning in this table are marked stale and shown raw.

    Example: ptinspect --sample x86_64-7.3 show pfn:0x1e2f
    """
    with open_target(chosen_target()) as target:
        located = locate_ptdesc(target.prog, address)
        if trace is not None:
            read_trace(trace, target)
        descriptor = describe_ptdesc(located.ptdesc, level)
        seen = survey(target.prog, walk=walk, leaf_counts=False)
        reach = None
        missing: Sequence[str] = ()
        if seen.problem is not None:
            missing = (f"the tables could not be walked: {seen.problem}",)
        if seen.census is not None:
            reach = reach_of(
                target.prog, seen.census, descriptor.pfn, descriptor.ptdesc, descriptor.order
            )
            descriptor = describe_ptdesc(
                located.ptdesc, level or reach.level, of_kernel=reach.of_kernel, told=reach.told
            )
            missing = reach.missing
        more: list[Table] = []
        notes: list[str] = []
        if trace is not None:
            traced = read_trace(trace, target)
            more.append(traced.page_table(target.prog, descriptor.ptdesc, seen.census))
            notes.extend(traced.notes())
            missing = (*missing, *traced.missing())
        report = show_report(
            descriptor,
            located.kind,
            located.is_tail,
            reach,
            missing,
            target_heading(target),
            entries=entries,
            more=more,
            more_notes=notes,
        )
    return emit(report, output_format)
