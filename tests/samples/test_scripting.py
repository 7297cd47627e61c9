# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/scripting.md: its code runs on every sample, and prints what it says there."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import drgn
from drgn.cli import default_globals
from opened import Sample

import ptinspect

GUIDE = Path(__file__).parents[2] / "docs" / "scripting.md"

#: The sample whose answers are shown.
SHOWN = "x86_64-7.3"

_BLOCK = re.compile(r"```python\n(.*?)```\n```text\n(.*?)```", re.S)


def answers(sample: Sample) -> list[tuple[str, str, str]]:
    """Run the guide from its beginning to its end: code, what it should print, what it prints."""
    names: dict[str, Any] = default_globals(sample.prog)
    names.update({name: getattr(ptinspect, name) for name in ptinspect.__all__})
    text = GUIDE.read_text()
    assert text.count("```python\n") == len(_BLOCK.findall(text))
    found = []
    for code, expected in _BLOCK.findall(text):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, str(GUIDE), "exec"), names)
        found.append((code, expected, out.getvalue()))
    return found


def test_guide(sample: Sample) -> None:
    drgn.set_default_prog(sample.prog)
    try:
        found = answers(sample)
    finally:
        drgn.set_default_prog(None)
    assert len(found) > 10
    if sample.name == SHOWN:
        for _, expected, printed in found:
            assert printed == expected
