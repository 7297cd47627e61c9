# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What trace writes, as JSON and line by line, against the published schema."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from test_trace_reader import MAPS, read
from test_trace_recorded import BEGIN
from test_trace_runner import command, fake

import ptinspect.faces
from ptinspect.faces.trace import event_data, reading_data, tables_data
from ptinspect.trace.reader import EndEvent, TableEvent
from ptinspect.trace.totals import read_totals

assert fake  # a fixture

SCHEMA = json.loads((Path(ptinspect.faces.__file__).parent / "schema.json").read_text())
ANSWER = Draft202012Validator(SCHEMA)
LINE = Draft202012Validator(
    {"$ref": f"{SCHEMA['$id']}#/$defs/trace_line"},
    registry=Registry().with_resource(SCHEMA["$id"], Resource.from_contents(SCHEMA)),
)


def test_what_the_command_writes(fake: str) -> None:
    options = ("--duration", "1s", "--leaks", "5s", "--stacks")
    out, errors = command(fake, *options, "--format", "json").communicate(timeout=60)
    answer = json.loads(out)
    ANSWER.validate(answer)
    assert set(answer["tables"]) <= set(SCHEMA["$defs"]["trace"]["properties"]), errors
    assert answer["tables"]["left"]
    out, errors = command(fake, *options, "--events", "--format", "jsonl").communicate(timeout=60)
    lines = [json.loads(line) for line in out.splitlines()]
    assert {line["kind"] for line in lines} == {"begin", "reading", "tables", "summary"}, errors
    for line in lines:
        LINE.validate(line)


TOTALS = read_totals(read(MAPS))
WRITTEN: dict[str, dict[str, Any]] = {
    "begin": BEGIN,
    "reading": reading_data(TOTALS, 20),
    "counts only": reading_data(read_totals(read({"made": {"1": 5}, "made_pages": 5})), 20),
    "made": event_data(TableEvent("made", 5, 0xFFD40000, "PTE", 42, "sh", mm=0x40)),
    "made by nobody": event_data(TableEvent("made", 5, 0xFFD40000, "?", 0, "")),
    "unlinked": event_data(TableEvent("unlinked", 8, 0x40, "PTE", 42, "sh", way="gather")),
    "freed": event_data(TableEvent("freed", 9, 0x40, "PMD", 42, "sh", way="?")),
    "ended": event_data(EndEvent(7, 0x40)),
    "tables": tables_data(TOTALS),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_each_line(what: str) -> None:
    line = json.loads(json.dumps(WRITTEN[what]))
    LINE.validate(line)
    assert not LINE.is_valid({**line, "kind": "zork"})
    assert not LINE.is_valid({name: line[name] for name in line if name != "nsecs"})
    assert not LINE.is_valid({**line, "nsecs": "now"})
