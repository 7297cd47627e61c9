# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every command in every format: against the published schema, and each format against JSON."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from commands import answerable, answering_commands
from jsonschema import Draft202012Validator
from opened import Sample

import ptinspect.faces
from ptinspect.cli.main import run

SCHEMA = json.loads((Path(ptinspect.faces.__file__).parent / "schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)

Capture = pytest.CaptureFixture[str]


def said(sample: Sample, arguments: list[str], capsys: Capture, form: str) -> str:
    assert run(["--sample", sample.name, *arguments, "--format", form]) in (0, 1, 4)
    return capsys.readouterr().out


def test_the_schema_itself() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    good = {
        **{"schema": "ptinspect", "version": 1, "command": "list", "target": "x", "complete": True},
        **{"missing": [], "notes": [], "findings": [], "tables": {}},
    }
    assert VALIDATOR.is_valid(good)
    assert not VALIDATOR.is_valid({**good, "version": 2})
    assert not VALIDATOR.is_valid({**good, "tables": {"descriptors": [{"pfn": [1]}]}})
    row = {"outcome": "mapped", "physical": 1, "page_bytes": 4096, "permissions": None}
    assert not VALIDATOR.is_valid({**good, "command": "walk", "tables": {"result": row}})
    row["physical"] = "0x1"
    assert VALIDATOR.is_valid({**good, "command": "walk", "tables": {"result": row}})
    del row["outcome"]
    assert not VALIDATOR.is_valid({**good, "command": "walk", "tables": {"result": row}})


@pytest.mark.parametrize("name", answering_commands())
def test_every_answer(name: str, sample: Sample, capsys: Capture) -> None:
    arguments = [name, *answerable(name, sample)]
    answer = json.loads(said(sample, arguments, capsys, "json"))
    VALIDATOR.validate(answer)
    assert answer["command"] == name

    head, *lines = map(json.loads, said(sample, arguments, capsys, "jsonl").splitlines())
    tables: dict[str, list[Any]] = {key: [] for key in answer["tables"]}
    for line in lines:
        assert set(line) == {"table", "row"}
        tables[line["table"]].append(line["row"])
    assert {**head, "tables": {}} == {**answer, "tables": {}}
    assert tables == {
        key: rows if isinstance(rows, list) else [rows] for key, rows in answer["tables"].items()
    }

    text = said(sample, arguments, capsys, "csv").rstrip("\n")
    blocks = text.split("\n\n") if text else []
    assert len(blocks) == len(answer["tables"])
    for block, rows in zip(blocks, tables.values()):
        parsed = list(csv.DictReader(io.StringIO(block)))
        assert len(parsed) == len(rows)
        for ours, theirs in zip(parsed, rows):
            assert list(ours) == list(theirs)


@pytest.mark.parametrize(
    "arguments",
    [
        ["summary", "--no-walk"],
        ["list", "--columns", "pfn,pt_mm,raw:pt_mm,flags,space,remote"],
        ["walk", "kernel", "0"],
        ["map", "1", "--all"],
        ["ps", "--no-slab"],
    ],
)
def test_other_answers(arguments: list[str], sample: Sample, capsys: Capture) -> None:
    VALIDATOR.validate(json.loads(said(sample, arguments, capsys, "json")))
