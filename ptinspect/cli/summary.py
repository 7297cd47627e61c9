# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect summary``."""

from __future__ import annotations

import click

from ptinspect.cli.census import survey
from ptinspect.cli.output import emit, format_option, target_heading, walk_option
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.faces.summary import summary_report
from ptinspect.summary import summarise
from ptinspect.target import open_target


@click.command("summary")
@target_options
@walk_option
@format_option
def command(walk: bool, output_format: str) -> int:
    """
    Page-table memory in total: by node and order, by level, and beside NR_PAGETABLE.

    Example: ptinspect --sample x86_64-7.3 summary
    """
    with open_target(chosen_target()) as target:
        seen = survey(target.prog, walk=walk)
        report = summary_report(
            summarise(target.prog, seen.scan),
            seen.reached(),
            target_heading(target),
            problem=seen.problem,
            racing=target.racing,
        )
    return emit(report, output_format)
