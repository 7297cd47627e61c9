# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect deposits``."""

from __future__ import annotations

import click

from ptinspect.cli.census import tree_census
from ptinspect.cli.output import emit, format_option, target_heading
from ptinspect.cli.spaces import SPACE_HELP, find_space
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.faces.deposits import deposits_report
from ptinspect.target import open_target


@click.command(
    "deposits",
    short_help="Spare tables of huge pages (pmd_huge_pte), and who needs them.",
    epilog=SPACE_HELP,
)
@target_options
@click.option("--tables", "each", is_flag=True, help="List each deposited table too.")
@click.option("--space", metavar="SPACE", help="Only those of one address space.")
@format_option
def command(each: bool, space: str | None, output_format: str) -> int:
    """
    The spare tables of huge pages (pmd_huge_pte), beside the huge pages that need one.

    For each anonymous huge page, and each use of the huge zero page, a page table is deposited on
    the PMD table, so that the page can be split without any memory. A missing one crashes the
    kernel at the next split; one too many is never freed.

    Example: ptinspect --sample x86_64-7.3 deposits --tables
    """
    with open_target(chosen_target()) as target:
        census = tree_census(target.prog)
        wanted = None
        if space is not None:
            wanted = census.tables.spaces.index(find_space(census.spaces, space))
        report = deposits_report(
            census, target_heading(target), racing=target.racing, each=each, space=wanted
        )
    return emit(report, output_format)
