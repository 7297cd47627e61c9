# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a command answers about a target in whose memory something has been damaged."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import NamedTuple

from drgn import Program

from ptinspect.census import Census, take_census
from ptinspect.cli.output import emit
from ptinspect.faces.report import Report


class Answer(NamedTuple):
    status: int
    text: str
    report: Report
    census: Census

    def line_with(self, *words: str) -> str:
        """Get the only line of the text that has all words."""
        (line,) = (a for a in self.text.splitlines() if all(word in a for word in words))
        return line


def ask(prog: Program, report_of: Callable[[Census], Report]) -> Answer:
    """Take a census of a target as it is now and write a report on it as text."""
    census = take_census(prog, leaf_counts=False)
    report = report_of(census)
    with redirect_stdout(io.StringIO()) as out:
        status = emit(report, "text")
    return Answer(status, out.getvalue(), report, census)
