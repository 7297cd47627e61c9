# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect check``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from ptinspect.checks import CheckResults, Severity, invariants, run_checks, unverified
from ptinspect.checks.run import excused, persisting
from ptinspect.cli.output import FORMATS, ProgressLine, emit, target_heading
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.cli.traced import read_trace, trace_option
from ptinspect.errors import ExitStatus, UsageError
from ptinspect.faces.check import check_report, explain, list_report, write_junit
from ptinspect.target import TargetKind, TargetOptions, open_target

#: Seconds that a guest runs on between two looks at it.
_RUN_ON = 0.3


@click.command("check", short_help="Check the invariants that every healthy kernel keeps.")
@target_options
@click.option("--list", "list_", is_flag=True, help="Show all invariants; no target needed.")
@click.option("--explain", "explained", metavar="ID", help="Say what an invariant claims, and why.")
@click.option("--only", multiple=True, metavar="ID", help="Run this invariant or family only.")
@click.option("--skip", multiple=True, metavar="ID", help="Leave out this invariant or family.")
@click.option(
    "--severity",
    type=click.Choice([severity.name.lower() for severity in Severity]),
    default="suspicious",
    show_default=True,
    help="What counts as a finding: this and what is worse.",
)
@click.option("--max", "most", default=20, show_default=True, help="Findings of each to show.")
@click.option(
    "--one-instant",
    is_flag=True,
    help="With --pause: do not let the guest run on to look again at what is found.",
)
@trace_option
@click.option(
    "--format",
    "output_format",
    type=click.Choice([*FORMATS, "junit"]),
    default="text",
    show_default=True,
    help="How to write the answer.",
)
def command(
    list_: bool,
    explained: str | None,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    severity: str,
    most: int,
    one_instant: bool,
    trace: Path | None,
    output_format: str,
) -> int:
    """
    Check that page tables and their descriptors agree with each other and with what is counted.

    On a target that runs, what is found is looked at again, and kept only if it is still the same.
    A guest that is stopped for it (--pause) runs on for a moment in between: what a CPU was in the
    middle of is no finding. With --trace, neither is a table that the trace knows to wait for its
    release, or to be just made.

    Example: ptinspect --sample x86_64-7.3 check
    """
    if list_:
        return _emit_list(output_format)
    if explained is not None:
        return _emit_explanation(explained)
    options = chosen_target()
    with open_target(options) as target:
        if trace is not None:
            read_trace(trace, target)  # what is wrong with it is said before the long work
        progress = ProgressLine("Checking")
        try:
            results = run_checks(
                target.prog, only=only, skip=skip, racing=target.racing, progress=progress
            )
        finally:
            progress.close()
        heading, racing = target_heading(target), target.racing
        if trace is not None:
            results = excused(results, read_trace(trace, target).excuse)
        stopped = target.kind is TargetKind.QEMU and options.pause
    if stopped and results.findings and not one_instant:
        results = _look_again(options, results)
    return _emit(results, heading, Severity[severity.upper()], most, racing, output_format)


def _look_again(options: TargetOptions, results: CheckResults) -> CheckResults:
    """Let a guest run on, stop it again, and keep what is still the same."""
    time.sleep(_RUN_ON)
    only = {finding.invariant for finding in results.findings}
    with open_target(options) as target:
        return persisting(results, run_checks(target.prog, only=only))


def _emit(
    results: CheckResults,
    heading: str,
    severity: Severity,
    most: int,
    racing: bool,
    output_format: str,
) -> int:
    if output_format == "junit":
        write_junit(results, heading, severity, sys.stdout)
        status: int = ExitStatus.INCOMPLETE if results.incomplete else ExitStatus.OK
    else:
        report = check_report(
            results,
            heading,
            severity=severity,
            most=most,
            racing=racing,
            table=output_format != "text",
        )
        status = emit(report, output_format)
    worst = results.worst()
    return ExitStatus.FINDINGS if worst is not None and worst >= severity else status


def _emit_list(output_format: str) -> int:
    if output_format == "junit":
        raise click.UsageError("--list has no JUnit form")
    return emit(list_report(invariants(), unverified()), output_format)


def _emit_explanation(wanted: str) -> int:
    for one in invariants():
        if one.id == wanted:
            click.echo(explain(one))
            return ExitStatus.OK
    for other in unverified():
        if other.id == wanted:
            click.echo(f"{other.id} (not checked)\n\n{other.claim}\n{other.reason}")
            return ExitStatus.OK
    raise UsageError(f"there is no invariant {wanted!r}: see ptinspect check --list")
