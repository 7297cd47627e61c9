# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Every command with every kind of wrong argument, found by walking the click tree.

Whatever is wrong: one line that says what, status 2 (3 for a target), and never a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import click
import pytest
from commands import required_arguments

from ptinspect.cli.main import cli, run
from ptinspect.cli.target_options import TargetOption

SAMPLE = ("--sample", "x86_64-7.3")

#: What is no name, no address and no condition of anything.
NONSENSE = ("zork", "", "pfn:", "-", "\x1b[31mred\n", str(1 << 70), "-1")

#: By the metavariable.
VALID = {"SPACE": "1", "VA": "400000", "ADDR": "pfn:0x158"}


#: What may be left out, by name.
OPTIONAL = {"vm": "64", "gaddr": "0", "script": "script.py"}


def target(path: tuple[str, ...]) -> tuple[str, ...]:
    """A target on which the command has something to find, if that is a special one."""
    return ("--sample", "s390x-6.12") if path == ("gmap",) else ()


class Case(NamedTuple):
    arguments: tuple[str, ...]
    #: What the message has to name, if that is certain.
    names: str = ""

    def __str__(self) -> str:
        return ascii(" ".join(self.arguments))


def commands(
    group: click.Group, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def valid(command: click.Command) -> list[str]:
    return [VALID[str(argument.metavar)] for argument in required_arguments(command)]


def malformed() -> Iterator[Case]:
    """Wrong before a target is opened."""
    for path, command in commands(cli):
        good = valid(command)
        yield Case((*path, "--zork", *good), "--zork")
        for count in range(len(good)):
            missing = list(required_arguments(command))[count]
            yield Case((*path, *good[:count]), str(missing.metavar))
        if all(argument.nargs != -1 for argument in command.params):
            most = sum(isinstance(parameter, click.Argument) for parameter in command.params)
            yield Case((*path, *good, *["zork"] * (most - len(good) + 1)), "zork")
        for option in command.params:
            if not isinstance(option, click.Option) or option.is_flag:
                continue
            name = option.opts[-1]
            yield Case((*path, *good, name), name)
            if isinstance(option.type, click.Choice):
                yield Case((*path, *good, name, "zork"), "zork")
            if isinstance(option.type, (click.types.IntParamType, click.types.FloatParamType)):
                yield Case((*path, *good, name, "zork"), name)
            if isinstance(option.type, click.IntRange) and option.type.min is not None:
                yield Case((*path, *good, name, str(option.type.min - 1)), name)


def fails(case: Case, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    status = run(arguments)
    captured = capsys.readouterr()
    error = captured.err
    assert status in (2, 3), error
    assert captured.out == ""
    assert error.startswith("ptinspect")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert error[:-1].isprintable()
    assert case.names in error
    return error


@pytest.mark.parametrize("case", list(malformed()), ids=str)
def test_malformed(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(case, (*SAMPLE, *case.arguments), capsys)
    assert error.endswith(" --help)\n")


def nonsense() -> Iterator[Case]:
    """Text that has no meaning to anything, as each argument and option that takes text."""
    for path, command in commands(cli):
        good = valid(command)
        for position in range(len(good)):
            for text in NONSENSE:
                yield Case((*path, "--", *good[:position], text, *good[position + 1 :]))
        optional = [p.name for p in command.params if isinstance(p, click.Argument)][len(good) :]
        for position, name in enumerate(optional):
            before = [OPTIONAL[str(other)] for other in optional[:position]]
            for text in NONSENSE:
                yield Case((*target(path), *path, "--", *good, *before, text))
            assert str(name) in OPTIONAL
        for option in command.params:
            if isinstance(option, click.Option) and not isinstance(option, TargetOption):
                free = isinstance(option.type, (click.types.StringParamType, click.Path))
                for text in NONSENSE if free and not option.is_flag else ():
                    yield Case((*path, *good, f"{option.opts[-1]}={text}"))


@pytest.mark.parametrize("case", list(nonsense()), ids=str)
def test_nonsense(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    fails(case, (*SAMPLE, *case.arguments), capsys)


def strange_targets() -> Iterator[Case]:
    """Each target option with what is no such target, for one command: all share the code."""
    for option in cli.commands["layout"].params:
        if isinstance(option, TargetOption) and not option.is_flag:
            other = () if option.name in ("core", "qemu", "sample") else SAMPLE
            for text in (*NONSENSE, "/", "/dev/null", __file__):
                # A folder that has no kernel in it is no reason to fail: others may have it.
                if option.name != "kernel_directory":
                    yield Case((*other, f"{option.opts[-1]}={text}", "layout"))


@pytest.mark.parametrize("case", list(strange_targets()), ids=str)
def test_strange_targets(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    fails(case, case.arguments, capsys)


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    run([])
    captured = capsys.readouterr()
    assert "Usage: ptinspect" in captured.out + captured.err
