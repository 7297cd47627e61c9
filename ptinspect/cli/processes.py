# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect ps``."""

from __future__ import annotations

from dataclasses import replace

import click

from ptinspect.cli.output import ProgressLine, emit, format_option, target_heading
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.faces.processes import ps_report
from ptinspect.kernel.paging import paging_of
from ptinspect.state.deposits import read_deposits
from ptinspect.state.gmap import try_gmaps
from ptinspect.state.pmd_tables import read_pmd_tables
from ptinspect.tables.physical import physical_ranges
from ptinspect.tables.resident import resident_pages
from ptinspect.tables.spaces import find_spaces
from ptinspect.tables.usage import space_usage
from ptinspect.tables.walk import walk_spaces
from ptinspect.target import open_target


@click.command("ps", short_help="Each address space: tables, fill, what could be given back.")
@target_options
@click.option(
    "--no-slab",
    is_flag=True,
    help="Do not look for mms without tasks in the slab cache (faster on large machines).",
)
@format_option
def command(no_slab: bool, output_format: str) -> int:
    """
    Who holds the page-table memory, how full it is, and what could be given back.

    One row for each address space, most page-table memory first; on s390 the guests of KVM too,
    whose tables no mm counts.

    Example: ptinspect --sample x86_64-7.3 ps
    """
    with open_target(chosen_target()) as target:
        prog = target.prog
        spaces = find_spaces(prog, slab=not no_slab)
        guests = try_gmaps(prog, spaces.spaces)
        spaces = replace(spaces, spaces=(*spaces.spaces, *guests.spaces))
        progress = ProgressLine("Walking all address spaces")
        try:
            tables = walk_spaces(
                prog,
                paging_of(prog),
                spaces.spaces,
                memory=physical_ranges(prog),
                progress=progress,
            )
        finally:
            progress.close()
        deposits = read_deposits(prog, tables, read_pmd_tables(prog, tables))
        resident = [resident_pages(prog, space) for space in spaces.spaces]
        report = ps_report(
            spaces,
            tables,
            space_usage(tables),
            deposits,
            resident,
            guests.missing,
            target_heading(target),
            racing=target.racing,
        )
    return emit(report, output_format)
