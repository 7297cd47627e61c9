# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect shell``."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import click
import drgn
from drgn.cli import default_globals, run_interactive, version_header

import ptinspect
from ptinspect.cli.output import target_heading
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.errors import ExitStatus, UsageError
from ptinspect.target import Target, open_target
from ptinspect.target.program import remember_target


@click.command(
    "shell",
    short_help="drgn's shell, or a script, on the target.",
    context_settings={"allow_interspersed_args": False},
)
@target_options
@click.argument("script", nargs=-1, type=click.UNPROCESSED, metavar="[SCRIPT [ARGUMENT]...]")
def command(script: tuple[str, ...]) -> int:
    """
    drgn's shell on the target, with ptinspect's helpers and %pt commands at hand.

    With SCRIPT that is run instead, as drgn would run it: `prog` is the target. Options of the
    script's own follow it. Without a terminal the script is read from standard input.

    \b
    Examples:
      ptinspect --sample x86_64-7.3 shell
      ptinspect -c vmcore shell count.py
    """
    if script and not Path(script[0]).is_file():
        raise UsageError(f"{script[0]}: there is no such script")
    with open_target(chosen_target()) as target:
        remember_target(target)
        # drgn loads its plugins itself, but only from installed packages.
        importlib.import_module("ptinspect.drgn_plugin")
        if not script and sys.stdin.isatty():
            click.echo(version_header(), err=True)
            run_interactive(target.prog, lambda text: _banner(text, target), _with_ptinspect)
            return ExitStatus.OK
        try:
            _run_script(target, script)
        except BrokenPipeError:
            raise
        except Exception:
            # It is the script's own error, so its author wants to see where.
            traceback.print_exc()
            return 1
    return ExitStatus.OK


def _with_ptinspect(names: dict[str, Any]) -> dict[str, Any]:
    return {**names, **{name: getattr(ptinspect, name) for name in ptinspect.__all__}}


def _banner(text: str, target: Target) -> str:
    return (
        f"{text}\n>>> from ptinspect import *\n"
        f"ptinspect {ptinspect.__version__} on {target_heading(target)}: "
        "%ptsummary, %ptps, %ptwalk --help, ...; help(ptinspect)"
    )


def _run_script(target: Target, script: tuple[str, ...]) -> None:
    drgn.set_default_prog(target.prog)
    names = _with_ptinspect(default_globals(target.prog))
    if not script:
        exec(compile(sys.stdin.read(), "<stdin>", "exec"), names)
        return
    sys.argv = list(script)
    sys.path.insert(0, os.path.dirname(os.path.abspath(script[0])))
    runpy.run_path(script[0], init_globals=names, run_name="__main__")
