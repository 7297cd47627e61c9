# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line before any target is open: usage, exit statuses, one line for an error."""

from __future__ import annotations

import pytest

from ptinspect import __version__
from ptinspect.cli.main import run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--core", "a", "--sample", "b", "summary"], "--core and --sample name different targets"),
        (["--qemu", "a", "summary", "-c", "b"], "--core and --qemu name different targets"),
        (["--pause", "summary"], "--pause needs --qemu"),
        (["summary", "--format", "yaml"], "'yaml' is not one of"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["show"], "Missing argument 'ADDR'"),
        (["list", "--limit", "-1"], "not in the range"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_target_that_cannot_be_opened(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--sample", "no-such-sample", "summary"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("ptinspect: ")
    assert "no-such-sample" in error
    assert error.count("\n") == 1


def test_options_after_the_command_win(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--sample", "first-name", "summary", "--sample", "second-name"]) == 3
    error = capsys.readouterr().err
    assert "second-name" in error
    assert "first-name" not in error


def test_a_name_with_control_characters_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-c", "/nonexistent/\x1b[31mred", "summary"]) == 3
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert "\\x1b[31mred" in error


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    for command in ("summary", "list", "show", "layout"):
        assert run([command, "--help"]) == 0
        assert "Example" in capsys.readouterr().out
