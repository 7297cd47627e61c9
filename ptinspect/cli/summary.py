# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect summary``."""

from __future__ import annotations

import click

from ptinspect.cli.output import ProgressLine, emit, format_option, target_heading
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.faces.summary import summary_report
from ptinspect.summary import summarise
from ptinspect.tables.scan import scan_memmap
from ptinspect.target import open_target


@click.command("summary")
@target_options
@format_option
def command(output_format: str) -> int:
    """
    Page-table memory in total: typed pages by node and order, beside NR_PAGETABLE.

    Example: ptinspect --sample x86_64-7.3 summary
    """
    with open_target(chosen_target()) as target:
        progress = ProgressLine("Scanning the memory map")
        try:
            scan = scan_memmap(target.prog, progress)
        finally:
            progress.close()
        report = summary_report(
            summarise(target.prog, scan), target_heading(target), racing=target.racing
        )
    return emit(report, output_format)
