# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""On a terminal: pager, no colours, completion, help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import on_terminal

from ptinspect.cli.main import cli, run

LONG = ("--sample", "x86_64-7.3", "list")


@pytest.fixture
def pager(tmp_path: Path) -> Path:
    """A pager that says that it was here, and with which settings."""
    script = tmp_path / "pager"
    script.write_text('#!/bin/sh\necho "PAGED $LESS $1"\nhead -n 3\n')
    script.chmod(0o755)
    return script


def test_long_answers_are_paged(pager: Path) -> None:
    status, seen = on_terminal(*LONG, PAGER=f"{pager} x", LESS="FRX")
    assert status == 0
    assert seen.startswith("PAGED FRX x\r\n")
    assert "0x100" in seen
    assert seen.count("\n") == 4


def test_an_incomplete_answer_keeps_its_status_in_a_pager(pager: Path) -> None:
    script = pager.with_name("quit")
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    assert on_terminal(*LONG, PAGER=str(script)) == (0, "")


@pytest.mark.parametrize("chosen", ["", "cat", "no-such-pager-anywhere"])
def test_without_a_pager(chosen: str) -> None:
    status, seen = on_terminal(*LONG, PAGER=chosen)
    assert status == 0
    assert seen.count("\n") > 400


def test_sentences_are_wrapped_and_tables_are_not() -> None:
    status, seen = on_terminal("--sample", "x86_64-7.3", "pending", PAGER="cat")
    assert status == 0
    prose = seen[seen.index("A table that only") :]
    lines = prose.rstrip().split("\r\n")
    assert len(lines) > 1
    assert all(len(line) <= 80 for line in lines)
    status, seen = on_terminal("--sample", "x86_64-7.3", "ps", PAGER="cat")
    assert max(map(len, seen.split("\r\n"))) > 80


def test_short_answers_are_not_paged(pager: Path) -> None:
    walk = ("--sample", "x86_64-7.3", "walk", "1", "400000")
    assert "PAGED" not in on_terminal(*walk, PAGER=str(pager))[1]
    assert "PAGED" in on_terminal(*walk, lines=5, PAGER=str(pager))[1]
    assert "PAGED" not in on_terminal(*walk, lines=5, PAGER=str(pager), TERM="dumb")[1]
    assert "PAGED" not in on_terminal(*LONG, "--format", "csv", PAGER=str(pager))[1]


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}])
def test_no_colours(env: dict[str, str]) -> None:
    for arguments in (("--help",), ("summary", "--sample", "x86_64-7.3"), ("zork",)):
        assert "\x1b" not in on_terminal(*arguments, PAGER="cat", **env)[1]


def complete(words: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "ptinspect"],
        env={
            **os.environ,
            "_PTINSPECT_COMPLETE": "bash_complete",
            "COMP_WORDS": f"ptinspect {words}",
            "COMP_CWORD": str(len(words.split())),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_completion() -> None:
    assert complete("summ") == ["summary"]
    found = complete("--sample x86")
    assert {"x86_64-6.1", "x86_64-7.3"} <= set(found)
    assert all(name.startswith("x86") for name in found)
    assert "--format" in complete("summary --f")
    assert "json" in complete("summary --format j")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_each_shell(shell: str) -> None:
    def ask(what: str, **env: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "ptinspect"],
            env={**os.environ, "_PTINSPECT_COMPLETE": f"{shell}_{what}", **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout

    script = ask("source")
    assert f"{shell}_complete" in script
    # fish names the word itself, the others its number.
    word = "summ" if shell == "fish" else "1"
    assert "summary" in ask("complete", COMP_WORDS="ptinspect summ", COMP_CWORD=word)


def test_the_list_of_commands_fits_a_terminal() -> None:
    status, seen = on_terminal("--help")
    assert status == 0
    listed = seen[seen.index("Commands:") :]
    assert listed.count("\r\n") == len(cli.commands) + 1
    assert "..." not in listed


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_shows_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"ptinspect {name}" in text or f"{name} " in text.partition("Example")[2]
    assert "Example" in text
