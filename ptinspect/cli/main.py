# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``ptinspect`` command: its group, and how errors become one line and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click
from drgn import FaultError, ObjectNotFoundError

from ptinspect import __version__
from ptinspect.cli import (
    check,
    deposits,
    descriptors,
    fragments,
    gmap,
    layout,
    lists,
    locks,
    pending,
    processes,
    sharing,
    shell,
    summary,
    trace,
    translate,
)
from ptinspect.cli.target_options import target_options
from ptinspect.errors import ExitStatus, PtinspectError, explain
from ptinspect.faces.escape import escape


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ptinspect")
@target_options
def cli() -> None:
    """
    Look inside the page tables of a Linux kernel, live or dead.

    Without a target option the running kernel is read through /proc/kcore (as root). Target
    options may stand before or after the command.

    \b
    Exit status: 0 fine, 1 findings (whatever could not be seen), 2 wrong usage, 3 the target
    cannot be opened, 4 nothing found but the answer is incomplete (the dump lacks memory, or it
    went away while reading).
    """


for _command in (
    layout.command,
    summary.command,
    descriptors.list_command,
    descriptors.show_command,
    translate.walk_command,
    translate.map_command,
    translate.owner_command,
    processes.command,
    lists.command,
    deposits.command,
    sharing.command,
    check.command,
    pending.command,
    gmap.command,
    fragments.command,
    locks.command,
    shell.command,
    trace.command,
):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors become one line on stderr and an exit status."""
    try:
        status = cli.main(args=arguments, prog_name="ptinspect", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        if isinstance(error, _NO_ARGUMENTS):
            error.show()
            return error.exit_code
        return _fail(_usage_message(error), error.exit_code)
    except click.exceptions.Abort:
        return _fail("interrupted", 128 + 2)
    except (PtinspectError, FaultError, ObjectNotFoundError) as error:
        return _fail(*explain(error))
    except BrokenPipeError:
        # The reader (head, a pager) has seen enough. What is still buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.OK
    return int(status or 0)


#: What click raises for a group without a command, where it does not just print the help (8.2).
_NO_ARGUMENTS: tuple[type[Exception], ...] = tuple(
    getattr(click.exceptions, name)
    for name in ("NoArgsIsHelpError",)
    if hasattr(click.exceptions, name)
)


def _usage_message(error: click.ClickException) -> str:
    """Say in one line what was wrong, in which command, and where to read more."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context is not None else "ptinspect"
    where = path.removeprefix("ptinspect").lstrip()
    return f"{where}: {message} ({path} --help)" if where else f"{message} ({path} --help)"


def _fail(message: str, status: int) -> int:
    click.echo(f"ptinspect: {escape(message)}", err=True)
    return status
