# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every command with arguments that it can answer on a sample, found by walking the click tree."""

from __future__ import annotations

from collections.abc import Iterator

import click
from opened import Sample

from ptinspect.cli.main import cli

#: Commands that do not answer a question about a target; trace only about the kernel it runs on.
NO_ANSWER = frozenset({"shell", "trace"})


def answering_commands() -> list[str]:
    """Names of all commands that print a report."""
    return [name for name in cli.commands if name not in NO_ANSWER]


def required_arguments(command: click.Command) -> Iterator[click.Argument]:
    for parameter in command.params:
        if isinstance(parameter, click.Argument) and parameter.required:
            yield parameter


def answerable(name: str, sample: Sample) -> list[str]:
    """
    Arguments for a command, by what its metavariables are called.

    A new kind of argument has to be entered here, so that the command is tested like the others.
    """
    values = {
        "SPACE": "1",
        "VA": "400000",
        "ADDR": f"pfn:{int(sample.scan.pfns[-1]):#x}",
    }
    return [values[str(a.metavar)] for a in required_arguments(cli.commands[name])]
