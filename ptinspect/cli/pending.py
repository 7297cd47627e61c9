# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect pending``."""

from __future__ import annotations

import click

from ptinspect.census import take_census
from ptinspect.cli.output import ProgressLine, emit, format_option, target_heading
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.faces.pending import pending_report
from ptinspect.target import open_target


@click.command("pending", short_help="Tables that wait to be freed, and what they wait for.")
@target_options
@click.option("--tables", "each_table", is_flag=True, help="List every table that waits.")
@format_option
def command(each_table: bool, output_format: str) -> int:
    """
    Tables that are out of their address space but not free yet, and what they wait for.

    RCU callbacks of every CPU by segment, with the tables of their batches; batches that are still
    being gathered on a kernel stack; the kernel's own tables on its list to free.

    Example: ptinspect --sample x86_64-7.3-load pending --tables
    """
    with open_target(chosen_target()) as target:
        progress = ProgressLine("Walking all address spaces")
        try:
            census = take_census(target.prog, leaf_counts=False, walk_progress=progress)
        finally:
            progress.close()
        report = pending_report(
            census.stories.pending,
            census.paging,
            census.tables.spaces,
            target_heading(target),
            each_table=each_table,
            racing=target.racing,
        )
    return emit(report, output_format)
