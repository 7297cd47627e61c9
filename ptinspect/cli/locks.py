# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect locks``."""

from __future__ import annotations

import click

from ptinspect.cli.census import tree_census
from ptinspect.cli.output import emit, format_option, target_heading
from ptinspect.cli.spaces import SPACE_HELP, find_space
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.faces.locks import locks_report
from ptinspect.target import open_target


@click.command(
    "locks", short_help="Page-table locks (ptl): who has one, who waits.", epilog=SPACE_HELP
)
@target_options
@click.option("--all", "show_all", is_flag=True, help="Also the locks that nobody has or wants.")
@click.option("--space", metavar="SPACE", help="Only locks of one address space.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N locks.")
@format_option
def command(show_all: bool, space: str | None, limit: int | None, output_format: str) -> int:
    """
    Page-table locks: which guards what here, who has one, who waits, and words that are none.

    A lock's word names its holder on s390 and powerpc only; elsewhere a CPU that runs on the tables
    in question is called plausible.

    Example: ptinspect --sample x86_64-7.3 locks
    """
    with open_target(chosen_target()) as target:
        census = tree_census(target.prog)
        wanted = None
        if space is not None:
            wanted = census.tables.spaces.index(find_space(census.spaces, space))
        report = locks_report(
            census,
            target_heading(target),
            racing=target.racing,
            every=show_all,
            space=wanted,
            limit=limit,
        )
    return emit(report, output_format)
