# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all commands do with their answer: the format, the exit status, progress on stderr."""

from __future__ import annotations

import io
import shutil
import sys
import time
from typing import Any, Callable, TypeVar

import click

from ptinspect.cli import pager
from ptinspect.errors import ExitStatus
from ptinspect.faces.data import write_csv, write_json, write_jsonl
from ptinspect.faces.escape import escape
from ptinspect.faces.report import Report
from ptinspect.faces.text import write_text
from ptinspect.target import Target

_F = TypeVar("_F", bound=Callable[..., Any])

_WRITERS = {"text": write_text, "json": write_json, "jsonl": write_jsonl, "csv": write_csv}

#: What ``--format`` takes.
FORMATS = tuple(_WRITERS)


def format_option(function: _F) -> _F:
    """Give a command ``--format``; its value arrives as *output_format*."""
    return click.option(
        "--format",
        "output_format",
        type=click.Choice(FORMATS),
        default="text",
        show_default=True,
        help="How to write the answer.",
    )(function)


def walk_option(function: _F) -> _F:
    """Give a command ``--no-walk``; its value arrives as *walk*."""
    return click.option(
        "--walk/--no-walk",
        default=True,
        help="Walk all address spaces (the default), or only scan the memory map.",
    )(function)


def emit(report: Report, output_format: str) -> int:
    """
    Write an answer.

    :return: The exit status that the answer deserves.
    """
    if output_format == "text" and sys.stdout.isatty():
        whole = io.StringIO()
        write_text(report, whole, width=shutil.get_terminal_size().columns)
        pager.show(whole.getvalue())
    else:
        _WRITERS[output_format](report, sys.stdout)
    if output_format == "csv":
        # CSV has no place for it, and silence would pass for a whole and good answer.
        for what in report.findings:
            click.echo(f"ptinspect: finding: {escape(what)}", err=True)
        for what in report.missing:
            click.echo(f"ptinspect: incomplete: {escape(what)}", err=True)
    return status_of(report)


def status_of(report: Report) -> int:
    """
    Get the exit status that an answer deserves.

    What was found is certain, whatever else could not be seen: findings come before that.
    """
    if report.findings:
        return ExitStatus.FINDINGS
    return ExitStatus.INCOMPLETE if report.missing else ExitStatus.OK


def target_heading(target: Target) -> str:
    """Say what an answer is about: the target's name and how it was opened, if that was special."""
    return "; ".join((target.name, *target.notes))


class ProgressLine:
    """A line on a terminal's stderr that shows how far long work has come."""

    #: Seconds before the first line and between two lines.
    _PATIENCE = 1.0
    _INTERVAL = 0.2

    def __init__(self, what: str) -> None:
        self._what = what
        self._shown = False
        self._next = time.monotonic() + self._PATIENCE
        self._enabled = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._enabled or now < self._next:
            return
        self._next = now + self._INTERVAL
        self._shown = True
        click.echo(f"\r{self._what}: {done * 100 // max(total, 1)} %", err=True, nl=False)

    def close(self) -> None:
        """Remove the line."""
        if self._shown:
            click.echo("\r" + " " * (len(self._what) + 8) + "\r", err=True, nl=False)
