# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect frags``."""

from __future__ import annotations

import click
from drgn import Architecture, Program

from ptinspect.cli.census import tree_census
from ptinspect.cli.output import emit, format_option, target_heading
from ptinspect.cli.spaces import SPACE_HELP, choose_space, find_space
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.faces.fragments import frags_report, no_fragments_report
from ptinspect.state.fields import architecture
from ptinspect.state.fragments import has_fragments
from ptinspect.state.halves import has_halves
from ptinspect.target import open_target


@click.command(
    "frags",
    short_help="Pages with several tables, and whether their counts agree.",
    epilog=SPACE_HELP,
)
@target_options
@click.option("--problems", is_flag=True, help="Only pages in which something is wrong.")
@click.option("--space", metavar="SPACE", help="Only pages of one address space.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N pages.")
@format_option
def command(problems: bool, space: str | None, limit: int | None, output_format: str) -> int:
    """
    Pages that hold several tables: which are in use, and whether the page's count agrees.

    On powerpc a page holds many PTE or PMD tables, counted by pt_frag_refcount. On s390 as of 6.1 a
    page holds two PTE tables, kept in the upper byte of its reference count.

    Example: ptinspect --sample ppc64le-6.12 frags
    """
    with open_target(chosen_target()) as target:
        prog, heading = target.prog, target_heading(target)
        if not (has_fragments(prog) or has_halves(prog)):
            if space is not None:
                choose_space(prog, space)  # wrong usage is that everywhere
            return emit(no_fragments_report(_why_not(prog), heading), output_format)
        census = tree_census(prog)
        wanted = None
        if space is not None:
            wanted = census.tables.spaces.index(find_space(census.spaces, space))
        report = frags_report(
            census, heading, racing=target.racing, problems=problems, space=wanted, limit=limit
        )
    return emit(report, output_format)


def _why_not(prog: Program) -> str:
    arch = architecture(prog)
    if arch == Architecture.S390X:
        return (
            "this kernel has one page table in each page "
            "(mm_context_t has no pgtable_list; in 6.1 two shared a page)"
        )
    if arch == Architecture.PPC64:
        return "this kernel does not count fragments (no __pte_frag_nr)"
    return "on this architecture a table has its pages for itself, there is nothing to count"
