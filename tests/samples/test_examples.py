# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The examples of every command's help, run as they stand but for the target."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import drgn
import pytest

from ptinspect.cli.main import cli, run
from ptinspect.target.samples import open_sample

#: Stands for targets that a reader has: the kernel that runs, a dump.
SAMPLE = "x86_64-7.3"
OFFERS = Path(__file__).parents[1] / "unit" / "trace" / "x86_64-6.12.offers.json"


def examples() -> Iterator[tuple[str, str]]:
    for name, command in cli.commands.items():
        found = re.findall(r"^ *(?:Example: )?ptinspect (.*)$", command.help or "", re.M)
        assert found, f"the help of {name} has no example"
        yield from ((name, line) for line in found)


@pytest.mark.parametrize(("name", "line"), list(examples()), ids=lambda text: text.split()[-1])
def test_example(
    name: str,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = shlex.split(line)
    assert name in words
    monkeypatch.chdir(tmp_path)
    if name == "trace":
        words += ["--print-script", "--offers", str(OFFERS)]
    elif name == "layout":
        # Files of one's own, by their places in the line.
        symbols = iter(("x86_64-7.3", "x86_64-6.1"))
        words = [str(open_sample(next(symbols)).symbols) if "vmlinux" in w else w for w in words]
    elif "-c" in words:
        place = words.index("-c")
        words[place : place + 2] = ["--sample", SAMPLE]
    elif "--sample" not in words:
        words[:0] = ["--sample", SAMPLE]
    if name == "shell":
        # It leaves these as the script's.
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        monkeypatch.setattr(sys, "path", list(sys.path))
        (tmp_path / "count.py").write_text("print(len(scan_memmap(prog).pfns))\n")
        words += ["count.py"] * (words[-1] == "shell")
    status = run(words)
    drgn.set_default_prog(None)
    assert status == 0
    captured = capsys.readouterr()
    assert captured.out
    assert captured.err == ""
