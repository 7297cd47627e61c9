# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect sharing``."""

from __future__ import annotations

import click

from ptinspect.cli.census import tree_census
from ptinspect.cli.output import emit, format_option, target_heading
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.faces.sharing import sharing_report
from ptinspect.target import open_target


@click.command("sharing", short_help="PMD tables that hugetlb mappings share (pt_share_count).")
@target_options
@format_option
def command(output_format: str) -> int:
    """
    PMD tables that hugetlb mappings share (pt_share_count), who shares them, and the file.

    Processes that map the same gigabyte of a hugetlbfs file share the PMD table of it. The count
    in the descriptor is set beside the entries that point to the table.

    Example: ptinspect --sample x86_64-7.3 sharing
    """
    with open_target(chosen_target()) as target:
        census = tree_census(target.prog)
        report = sharing_report(census, target_heading(target), racing=target.racing)
    return emit(report, output_format)
