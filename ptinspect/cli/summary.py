# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect summary``."""

from __future__ import annotations

import click

from ptinspect.cli.census import survey
from ptinspect.cli.output import emit, format_option, target_heading, walk_option
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.faces.summary import summary_report
from ptinspect.state.memcg import memcg_usage, read_memcgs
from ptinspect.summary import summarise
from ptinspect.target import open_target


@click.command("summary", short_help="Page-table memory by node, level and holder; NR_PAGETABLE.")
@target_options
@click.option(
    "--by",
    type=click.Choice(["memcg"]),
    help="Add up by memory cgroup too.",
)
@walk_option
@format_option
def command(by: str | None, walk: bool, output_format: str) -> int:
    """
    Page-table memory in total: by node and order, by level, and beside NR_PAGETABLE.

    \b
    Examples:
      ptinspect --sample x86_64-7.3 summary
      ptinspect --sample x86_64-7.3 summary --no-walk --by memcg
    """
    with open_target(chosen_target()) as target:
        seen = survey(target.prog, walk=walk)
        memcgs = read_memcgs(target.prog, seen.scan) if by == "memcg" else None
        report = summary_report(
            summarise(target.prog, seen.scan),
            seen.reached(),
            target_heading(target),
            problem=seen.problem,
            racing=target.racing,
            memcgs=None if memcgs is None else memcg_usage(seen.scan, memcgs),
            memcgs_missing=() if memcgs is None else memcgs.missing,
        )
    return emit(report, output_format)
