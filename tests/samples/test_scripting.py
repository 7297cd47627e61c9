# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guides for scripts: their code runs on every sample, and prints what they say there."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import drgn
import pytest
from drgn.cli import default_globals
from opened import Sample

import ptinspect

DOCS = Path(__file__).parents[2] / "docs"

#: The sample whose answers are shown where a block of text does not name another.
SHOWN = "x86_64-7.3"

_BLOCK = re.compile(r"```python\n(.*?)```\n(?:```text(?: (\S+))?\n(.*?)```)?", re.S)


class Block(NamedTuple):
    code: str
    #: The sample on which it prints *expected*; on others it only has to run.
    shown: str
    expected: str | None


def blocks(guide: Path) -> Iterator[Block]:
    text = guide.read_text()
    found = _BLOCK.findall(text)
    assert text.count("```python\n") == len(found)
    for code, shown, expected in found:
        yield Block(code, shown or SHOWN, expected or None)


@pytest.mark.parametrize(("guide", "least"), [("scripting.md", 10), ("stories.md", 4)])
def test_guide(sample: Sample, guide: str, least: int) -> None:
    """Run a guide from its beginning to its end."""
    assert run_blocks(sample, list(blocks(DOCS / guide))) >= least


def test_stories_of_a_moving_kernel(moving: Sample) -> None:
    """What is shown of a kernel under load is run on it; the rest wants one at rest."""
    first, *more = blocks(DOCS / "stories.md")
    shown = [block for block in more if block.shown == moving.name]
    assert run_blocks(moving, [first, *shown]) >= 3


def run_blocks(sample: Sample, wanted: list[Block]) -> int:
    names: dict[str, Any] = default_globals(sample.prog)
    names.update({name: getattr(ptinspect, name) for name in ptinspect.__all__})
    drgn.set_default_prog(sample.prog)
    try:
        for block in wanted:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block.code, "guide", "exec"), names)
            if block.expected is not None and sample.name == block.shown:
                assert out.getvalue() == block.expected
    finally:
        drgn.set_default_prog(None)
    return len(wanted)
