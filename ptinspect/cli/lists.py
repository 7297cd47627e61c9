# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect lists``."""

from __future__ import annotations

import click

from ptinspect.cli.census import tree_census
from ptinspect.cli.output import emit, format_option, target_heading
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.faces.lists import lists_report, pgd_report
from ptinspect.target import open_target


@click.command("lists", short_help="Lists that descriptors are on (pt_list); whose each PGD is.")
@target_options
@click.option("--pgd", is_flag=True, help="Each root table: whose it says it is, and whether so.")
@click.option("--nodes", is_flag=True, help="List the nodes of every list.")
@format_option
def command(pgd: bool, nodes: bool, output_format: str) -> int:
    """
    The lists that descriptors are on (pt_list), and whose each PGD is (--pgd, pt_mm).

    Lists are followed both ways. Where one is broken, what is on either side of the break is shown,
    and the break with the addresses on both sides.

    \b
    Examples:
      ptinspect --sample x86_64-7.3 lists
      ptinspect --sample x86_64-7.3 lists --pgd
    """
    with open_target(chosen_target()) as target:
        census = tree_census(target.prog)
        heading = target_heading(target)
        if pgd:
            report = pgd_report(census, heading, racing=target.racing)
        else:
            report = lists_report(census, heading, nodes=nodes)
    return emit(report, output_format)
