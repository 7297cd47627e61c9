# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Write ptinspect/faces/schema.json from what the commands answer on all samples.

``python tests/samples/draft_schema.py`` (from the repository's root) when a command or a column is
new; what changes otherwise needs another JSON_VERSION.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "ptinspect" / "faces" / "schema.json"

#: Of these the caller chooses the columns.
CHOSEN_COLUMNS = {("list", "descriptors")}

#: A cell, by the kind of its column; null is "no such value here".
CELLS: dict[str, dict[str, Any]] = {
    "hex": {"type": ["string", "null"], "pattern": "^-?0x[0-9a-f]+$"},
    "count": {"type": ["integer", "null"]},
    "text": {"type": ["string", "boolean", "integer", "null"]},
}


def schema_of(commands: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Put the tables of all commands into the frame that they share."""
    words = {"type": "array", "items": {"type": "string"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What a command of ptinspect answers with --format json",
        "type": "object",
        "required": [
            *("schema", "version", "command", "target", "complete"),
            *("missing", "notes", "findings", "tables"),
        ],
        "properties": {
            "schema": {"const": "ptinspect"},
            "version": {"const": 1},
            "command": {"type": "string"},
            "target": {"type": "string"},
            "complete": {"type": "boolean"},
            "missing": words,
            "notes": words,
            "findings": words,
            "tables": {
                "type": "object",
                "additionalProperties": {
                    "anyOf": [
                        {"type": "array", "items": {"$ref": "#/$defs/row"}},
                        {"$ref": "#/$defs/row"},
                    ]
                },
            },
        },
        "additionalProperties": False,
        "allOf": [
            {
                "if": {"properties": {"command": {"const": name}}},
                "then": {"properties": {"tables": {"$ref": f"#/$defs/{name}"}}},
            }
            for name in commands
        ],
        "$defs": {
            **CELLS,
            "row": {
                "type": "object",
                "additionalProperties": {"type": ["string", "integer", "boolean", "null"]},
            },
            **commands,
        },
    }


def tables_of(command: str, reports: list[Any]) -> dict[str, Any]:
    """
    Describe the tables of a command.

    None is required: one that has nothing to do with the question, or could not be made, is left
    out of an answer.
    """
    properties: dict[str, Any] = {}
    for report in reports:
        for table in report.tables:
            row = {
                "type": "object",
                "required": [column.name for column in table.columns],
                "properties": {
                    column.name: {"$ref": f"#/$defs/{column.kind.value}"}
                    for column in table.columns
                },
            }
            if (command, table.name) in CHOSEN_COLUMNS:
                row = {"$ref": "#/$defs/row"}
            whole = row if table.single else {"type": "array", "items": row}
            known = properties.setdefault(table.name, whole)
            if known != whole:
                # Columns differ (levels by name): the common ones are certain.
                _merge(known if table.single else known["items"], row)
    return {"type": "object", "properties": properties}


def _merge(known: dict[str, Any], row: dict[str, Any]) -> None:
    known["required"] = [name for name in known["required"] if name in row["required"]]
    known["properties"].update(row["properties"])


def guest_questions(prog: Any) -> list[list[str]]:
    """Get what the command gmap is asked besides the list of all."""
    from ptinspect.state.gmap import read_gmaps
    from ptinspect.tables.spaces import find_spaces

    guests = read_gmaps(prog, find_spaces(prog, slab=False).spaces).gmaps
    questions = [["--asce"]]
    for gmap in guests[:1]:
        questions += [[gmap.name, "--pgste"], [gmap.name, "0", "--pgste"]]
    return questions


def main() -> None:
    """Ask, and write the file."""
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    from commands import answerable, answering_commands
    from opened import Sample

    from ptinspect.cli import output
    from ptinspect.cli.main import run
    from ptinspect.tables.scan import scan_memmap
    from ptinspect.target import TargetOptions, open_target, sample_names

    said: list[Any] = []

    def keep(report: Any, out: Any) -> None:
        said.append(report)

    output._WRITERS["json"] = keep
    scans = {}
    for sample in sample_names():
        with open_target(TargetOptions(sample=sample)) as target:
            scans[sample] = Sample(sample, target.prog, {}, scan_memmap(target.prog), {})

    def answers(name: str, sample: str) -> Iterator[Any]:
        questions = [answerable(name, scans[sample])]
        if name == "gmap":
            questions += guest_questions(scans[sample].prog)
        for words in questions:
            run(["--sample", sample, name, *words, "--format", "json"])
            yield said[-1]

    commands = {
        name: tables_of(name, [each for sample in sample_names() for each in answers(name, sample)])
        for name in answering_commands()
    }
    SCHEMA.write_text(json.dumps(schema_of(commands), indent=1) + "\n")


if __name__ == "__main__":
    main()
