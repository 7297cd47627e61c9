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
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "ptinspect" / "faces" / "schema.json"

#: Of these the caller chooses the columns.
CHOSEN_COLUMNS = {("list", "descriptors")}

#: Commands that tell what the record of a trace says, in a table of their own.
TRACED = ("list", "show")

#: A cell, by the kind of its column; null is "no such value here".
CELLS: dict[str, dict[str, Any]] = {
    "hex": {"type": ["string", "null"], "pattern": "^-?0x[0-9a-f]+$"},
    "count": {"type": ["integer", "null"]},
    "text": {"type": ["string", "boolean", "integer", "null"]},
}


def _line(kind: str, members: dict[str, Any]) -> dict[str, Any]:
    """Describe a line of ``trace --format jsonl``; it has all of the members and no others."""
    properties = {"kind": {"const": kind}, **members}
    return {
        "type": "object",
        "required": list(properties),
        "properties": properties,
        "additionalProperties": False,
    }


def _object(members: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(members), "properties": members}


def trace_line() -> dict[str, Any]:
    """
    Describe a line of ``trace --format jsonl``.

    Lines are no reports: they are written while the trace runs.
    """
    from ptinspect.trace.hooks import LEVELS, WAYS

    number, integer = {"$ref": "#/$defs/count"}, {"type": "integer"}
    text, address = {"type": "string"}, {"$ref": "#/$defs/hex"}
    level, way = {"enum": list(LEVELS)}, {"enum": [*WAYS, None]}
    table = {"nsecs": integer, "page": address, "level": level, "pid": integer, "comm": text}
    by_level = _object(dict.fromkeys(LEVELS, integer))
    age = {"page": address, "level": level, "age_ns": integer, "pid": integer, "comm": text}

    def keyed(names: tuple[str, ...], members: dict[str, Any]) -> dict[str, Any]:
        each = _object(members)
        return {
            "type": "object",
            "properties": dict.fromkeys(names, each),
            "additionalProperties": False,
        }

    reading = {
        **dict.fromkeys(("nsecs", "pages_made", "pages_gone", "net_pages"), integer),
        "waiting": number,
        "levels": keyed(LEVELS, {"made": integer, "gone": integer}),
        "ways": keyed(WAYS, {"freed": integer, "wait_p50_us": number, "wait_p99_us": number}),
        "processes": {
            "type": "array",
            "items": _object(
                {
                    "pid": integer,
                    "comm": text,
                    "made": by_level,
                    "live": {"anyOf": [{"type": "null"}, by_level]},
                    "freed": _object(dict.fromkeys(WAYS[1:], integer)),
                }
            ),
        },
    }
    begin = {
        "nsecs": integer,
        "release": text,
        "boot_id": {"type": ["string", "null"]},
        "events": {"type": "boolean"},
        "filtered": {"type": "boolean"},
        "young_ns": integer,
    }
    stack = {"type": "array", "items": text}
    left = {
        "nsecs": integer,
        "pending": {"type": "array", "items": _object({**age, "way": way})},
        "live": {
            "type": "array",
            "items": _object({**age, "mm": address, "mm_ended_ns": number, "stack": stack}),
        },
    }
    return {
        "oneOf": [
            _line("begin", begin),
            _line("reading", reading),
            _line("made", {**table, "mm": address}),
            _line("unlinked", {**table, "way": way}),
            _line("freed", {**table, "way": way, "waited_ns": number}),
            _line("ended", {"nsecs": integer, "mm": address}),
            _line("tables", left),
            {"required": ["kind"], "properties": {"kind": {"const": "summary"}}, "$ref": "#"},
        ]
    }


def schema_of(commands: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Put the tables of all commands into the frame that they share."""
    words = {"type": "array", "items": {"type": "string"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:ptinspect:answer",
        "title": "What a command of ptinspect answers with --format json",
        "type": "object",
        "required": [
            *("schema", "version", "command", "target", "complete"),
            *("missing", "notes", "findings", "tables"),
        ],
        "properties": {
            # Of the last line of trace --format jsonl only.
            "kind": {"const": "summary"},
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
            "trace_line": trace_line(),
            **commands,
        },
    }


def trace_tables() -> dict[str, Any]:
    """Describe the tables of trace, from what a program that plays bpftrace said."""
    from test_trace_reader import MAPS, read, result

    from ptinspect.faces.trace import trace_report
    from ptinspect.trace.totals import StackTotal, read_totals

    stacks = (StackTotal(True, "PTE", 1, ("pte_alloc_one",), "fault"),)
    totals = replace(read_totals(read(MAPS)), stacks=stacks)
    traced = replace(result(), totals=totals)
    report = trace_report(traced, "x", top=20, leak_age_ns=0, explained=())
    return tables_of("trace", [report])


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
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(ROOT / "tests" / "unit")]
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
    commands["trace"] = trace_tables()
    for name in TRACED:
        commands[name]["properties"]["explained"] = {"$ref": "#/$defs/trace/properties/explained"}
    SCHEMA.write_text(json.dumps(schema_of(commands), indent=1) + "\n")


if __name__ == "__main__":
    main()
