# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect layout``."""

from __future__ import annotations

from pathlib import Path

import click

from ptinspect.cli.output import emit, format_option, target_heading
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.errors import DebugInfoError, ExitStatus
from ptinspect.faces.layout import layout_report
from ptinspect.kernel.layout import ptdesc_layout
from ptinspect.records import Layout
from ptinspect.target import TargetOptions, open_symbols, open_target


@click.command("layout", short_help="struct ptdesc against struct page; two kernels compared.")
@target_options
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="VMLINUX",
    help="Compare with the layout of another kernel.",
)
@format_option
def command(against: Path | None, output_format: str) -> int:
    """
    struct ptdesc against struct page: offsets, sizes, and each TABLE_MATCH with its verdict.

    Needs no target: with only -s VMLINUX the types of that file are shown.

    Example: ptinspect layout -s vmlinux --against /boot/vmlinux-6.1
    """
    name, layout = _layout_of(chosen_target())
    other = None
    if against is not None:
        other = (str(against), _layout_of_file((against,), None))
    report = layout_report(layout, name, other)
    status = emit(report, output_format)
    broken = any(match.verdict == "MISMATCH" for match in layout.matches) or not layout.size_fits
    return status or (ExitStatus.FINDINGS if broken else ExitStatus.OK)


def _layout_of(options: TargetOptions) -> tuple[str, Layout]:
    if options.symbols and not (options.core or options.qemu or options.sample):
        names = ", ".join(str(path) for path in options.symbols)
        return names, _layout_of_file(options.symbols, options.architecture)
    with open_target(options) as target:
        return target_heading(target), ptdesc_layout(target.prog)


def _layout_of_file(symbols: tuple[Path, ...], architecture: str | None) -> Layout:
    try:
        return ptdesc_layout(open_symbols(symbols, architecture))
    except LookupError as error:
        raise DebugInfoError(f"{symbols[0]}: {error}: not a kernel's debug information?") from error
