# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The commands that a document shows, and what they print.

As a program it writes what they print now into the document: ``console_blocks.py docs/panic.md``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]

_BLOCK = re.compile(r"(?<=^```console\n)(.*?)(?=^```$)", re.S | re.M)
_COMMAND = re.compile(r"^\$ (.*(?:\n> .*)*)\n", re.M)


class Shown(NamedTuple):
    """A command of a document. Lines of it that begin with ``> `` continue it."""

    command: str
    output: str


def shown(text: str) -> Iterator[Shown]:
    """Get the commands of a document, in order."""
    for block in _BLOCK.findall(text):
        pieces = _COMMAND.split(block)
        assert not pieces[0], f"a block does not begin with a command: {pieces[0]}"
        for command, output in zip(pieces[1::2], pieces[2::2]):
            yield Shown(command.replace("\n> ", "\n"), output)


def printed(command: str) -> str:
    """Run a command as a user would, and get what it prints, without spaces at ends of lines."""
    script = f'ptinspect() {{ "{sys.executable}" -m ptinspect "$@"; }}\n{command}\n'
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def renew(text: str) -> str:
    """Put what the commands print now into a document."""

    def block(match: re.Match[str]) -> str:
        pieces = _COMMAND.split(match[0])
        commands = pieces[1::2]
        return "".join(f"$ {c}\n{printed(c.replace(chr(10) + '> ', chr(10)))}" for c in commands)

    return _BLOCK.sub(block, text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(renew(path.read_text()))
