# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The options that name a target, the same before and after a command.

They bear the names of drgn's own options.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, TypeVar

import click
from drgn import Program

from ptinspect.target import TargetOptions, sample_names

_F = TypeVar("_F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)
_KEY = "ptinspect.target"


class TargetOption(click.Option):
    """An option that says what to open: of no use where that is settled, as in drgn's shell."""


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Keep an option that was given; the one after the command wins over the one before it."""
    if value is not None and value != () and value is not False:
        context.find_root().meta.setdefault(_KEY, {})[parameter.name] = value
    return value


def _complete_sample(_context: click.Context, _option: click.Parameter, begun: str) -> list[str]:
    return [name for name in sample_names() if name.startswith(begun)]


def _option(*names: str, **attributes: Any) -> Callable[[_F], _F]:
    return click.option(
        *names, cls=TargetOption, callback=_remember, expose_value=False, **attributes
    )


_OPTIONS = (
    _option("-c", "--core", type=_PATH, metavar="FILE", help="A vmcore: ELF or kdump."),
    _option("--qemu", metavar="SOCKET", help="A QEMU guest: its QMP socket, a path or HOST:PORT."),
    _option(
        "--sample",
        metavar="NAME",
        shell_complete=_complete_sample,
        help="A small real dump that comes with ptinspect.",
    ),
    _option(
        "-s",
        "--symbols",
        type=_PATH,
        multiple=True,
        metavar="FILE",
        help="A vmlinux or .ko file with debug information. May be repeated.",
    ),
    _option(
        "--kernel-directory",
        type=_PATH,
        multiple=True,
        metavar="DIR",
        help="Where to look for vmlinux and modules. May be repeated.",
    ),
    _option("--vmcoreinfo", type=_PATH, metavar="FILE", help="VMCOREINFO, if the target has none."),
    _option("--architecture", metavar="ARCH", help="x86_64, s390x, ppc64le, aarch64 or riscv64."),
    _option("--pause", is_flag=True, help="Stop the QEMU guest while it is read."),
)


def target_options(function: _F) -> _F:
    """Give a command the options that name a target."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def settle_target(context: click.Context, prog: Program) -> None:
    """Have a command look into a program that is open already."""
    context.find_root().meta[_KEY] = {"program": prog}


def chosen_target() -> TargetOptions:
    """
    Get the target that the options of the current command name.

    :raises click.UsageError: if they contradict each other
    """
    context = click.get_current_context()
    given = context.find_root().meta.get(_KEY, {})
    targets = [name for name in ("core", "qemu", "sample") if name in given]
    if len(targets) > 1:
        names = " and ".join(f"--{name}" for name in targets)
        raise click.UsageError(f"{names} name different targets: give one of them", context)
    if given.get("pause") and "qemu" not in given:
        raise click.UsageError("--pause needs --qemu: only a guest can be stopped", context)
    return TargetOptions(**given)
