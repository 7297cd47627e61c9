# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect list`` and ``ptinspect show``."""

from __future__ import annotations

import click

from ptinspect.cli.output import ProgressLine, emit, format_option, target_heading
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.faces.descriptors import list_report, show_report
from ptinspect.listing import DEFAULT_COLUMNS, Listing
from ptinspect.locate import locate_ptdesc
from ptinspect.state.fields import describe_ptdesc
from ptinspect.tables.scan import scan_memmap
from ptinspect.target import open_target


@click.command("list")
@target_options
@click.option("--node", type=int, metavar="N", help="Only descriptors of this NUMA node.")
@click.option("--order", type=int, metavar="N", help="Only tables of this allocation order.")
@click.option("--level", metavar="LEVEL", help="Only tables of this level, where it is known.")
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
    default=",".join(DEFAULT_COLUMNS),
    show_default=True,
    metavar="A,B,...",
    help="What to show: these, any member of struct ptdesc, or raw:MEMBER.",
)
@click.option("--sort", metavar="COLUMN", help="Sort by a column; -COLUMN: largest first.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N rows.")
@format_option
def list_command(
    node: int | None,
    order: int | None,
    level: str | None,
    flags: tuple[str, ...],
    conditions: tuple[str, ...],
    columns: str,
    sort: str | None,
    limit: int | None,
    output_format: str,
) -> int:
    """
    One row for each page-table descriptor.

    \b
    Examples:
      ptinspect --sample x86_64-7.3 list --limit 10
      ptinspect list --where 'refcount != 1' --columns pfn,refcount,flags
      ptinspect -c vmcore list --node 1 --format csv
    """
    conditions += tuple(
        f"{name} = {value}"
        for name, value in (("node", node), ("order", order), ("level", level))
        if value is not None
    )
    conditions += tuple(f"flags & {flag}" for flag in flags)
    with open_target(chosen_target()) as target:
        progress = ProgressLine("Scanning the memory map")
        try:
            scan = scan_memmap(target.prog, progress)
        finally:
            progress.close()
        listing = Listing(target.prog, scan)
        names = [name.strip() for name in columns.split(",") if name.strip()]
        rows = listing.select(conditions, sort, limit)
        report = list_report(listing, scan, names, rows, target_heading(target))
    return emit(report, output_format)


@click.command("show")
@target_options
@click.argument("address", metavar="ADDR")
@click.option("--level", metavar="LEVEL", help="Decode it as a table of this level.")
@format_option
def show_command(address: str, level: str | None, output_format: str) -> int:
    """
    One descriptor: every member, and what it means in this table.

    ADDR is a page frame number, a physical or direct-map address, or the address of a struct page
    or ptdesc; pfn:N, phys:ADDR, page:ADDR, ptdesc:ADDR and virt:ADDR leave no doubt. Members that
    have no meaning in this table are marked stale and shown raw.

    Example: ptinspect --sample x86_64-7.3 show pfn:0x1e2f
    """
    with open_target(chosen_target()) as target:
        located = locate_ptdesc(target.prog, address)
        descriptor = describe_ptdesc(located.ptdesc, level)
        report = show_report(descriptor, located.kind, located.is_tail, target_heading(target))
    return emit(report, output_format)
