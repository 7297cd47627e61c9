# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reports as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TextIO

from tabulate import tabulate

from ptinspect.faces.escape import escape
from ptinspect.faces.report import Cell, Column, Kind, Report, Table


def write_text(report: Report, out: TextIO, *, width: int | None = None) -> None:
    """
    Write a report for a person.

    :param width: Of the terminal, to which sentences are wrapped (tables are not).
    """

    def sentences(texts: Iterable[str], indent: str = "") -> str:
        lines = (escape(text) for text in texts)
        if width is not None:
            lines = (textwrap.fill(line, width, subsequent_indent=indent) for line in lines)
        return "\n".join(lines)

    sections = []
    for table in report.tables:
        rendered = _render(table)
        sections.append(f"{escape(table.title)}\n{rendered}" if table.title else rendered)
    if report.notes:
        sections.append(sentences(report.notes))
    if report.findings:
        sections.append(sentences((f"FINDING: {what}" for what in report.findings), "  "))
    if report.missing:
        sections.append(sentences((f"INCOMPLETE: {what}" for what in report.missing), "  "))
    out.write("\n\n".join(sections) + "\n")


def _render(table: Table) -> str:
    rows = [[_cell(column, value) for column, value in zip(table.columns, r)] for r in table.rows]
    if table.single:
        names = [column.name.replace("_", " ") for column in table.columns]
        return tabulate(list(zip(names, *rows)), tablefmt="plain", disable_numparse=True)
    if not rows:
        return "(none)"
    return tabulate(
        rows,
        headers=[column.name for column in table.columns],
        tablefmt="plain",
        colalign=["left" if c.kind is Kind.TEXT else "right" for c in table.columns],
        disable_numparse=True,
    )


def _cell(column: Column, value: Cell) -> str:
    if value is None:
        return "-"
    if column.kind is Kind.HEX and isinstance(value, int):
        return f"{value:#x}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape(value) if isinstance(value, str) else str(value)
