# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Reports as JSON and CSV, for programs. docs/json.md describes the JSON.

Rows are written as they come, so that a list of a million descriptors needs no memory for itself.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from typing import TextIO

from ptinspect.faces.escape import escape
from ptinspect.faces.report import Cell, Column, Kind, Report, Table

#: Raised when a field changes its meaning or goes away; new fields do not raise it.
JSON_VERSION = 1


def _head(report: Report) -> dict[str, object]:
    return {
        "schema": "ptinspect",
        "version": JSON_VERSION,
        "command": report.command,
        "target": report.target,
        "complete": not report.missing,
        "missing": list(report.missing),
        "notes": list(report.notes),
        "findings": list(report.findings),
    }


def write_json(report: Report, out: TextIO) -> None:
    """Write a report as one JSON object."""
    out.write(json.dumps(_head(report), indent=1)[:-2] + ',\n "tables": {')
    for index, table in enumerate(report.tables):
        out.write(f"{',' if index else ''}\n  {json.dumps(table.name)}: ")
        if table.single:
            (row,) = table.rows
            out.write(json.dumps(_json_record(table, row)))
        else:
            _write_json_rows(table, out)
    out.write("\n }\n}\n")


def write_jsonl(report: Report, out: TextIO) -> None:
    """Write a report as lines of JSON: one with all but the tables, then one for each row."""
    out.write(json.dumps(_head(report)) + "\n")
    for table in report.tables:
        for row in table.rows:
            line = {"table": table.name, "row": _json_record(table, row)}
            out.write(json.dumps(line) + "\n")


def _write_json_rows(table: Table, out: TextIO) -> None:
    separator = "[\n   "
    for row in table.rows:
        out.write(separator + json.dumps(_json_record(table, row)))
        separator = ",\n   "
    out.write("[]" if separator.startswith("[") else "]")


def _json_record(table: Table, row: Sequence[Cell]) -> dict[str, Cell]:
    return {column.name: _json_value(column, v) for column, v in zip(table.columns, row)}


def _json_value(column: Column, value: Cell) -> Cell:
    if column.kind is Kind.HEX and isinstance(value, int):
        return f"{value:#x}"
    return value


def write_csv(report: Report, out: TextIO) -> None:
    """Write the tables of a report one below the other, an empty line between them."""
    writer = csv.writer(out, lineterminator="\n")
    for index, table in enumerate(report.tables):
        if index:
            out.write("\n")
        writer.writerow([column.name for column in table.columns])
        for row in table.rows:
            writer.writerow([_csv_value(c, value) for c, value in zip(table.columns, row)])


def _csv_value(column: Column, value: Cell) -> str:
    if value is None:
        return ""
    if column.kind is Kind.HEX and isinstance(value, int):
        return f"{value:#x}"
    return escape(value) if isinstance(value, str) else str(value)
