# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every command in every format: against the published schema, and each format against JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pytest
from commands import answerable, answering_commands
from jsonschema import Draft202012Validator
from opened import Sample

import ptinspect.faces
from ptinspect.cli import output
from ptinspect.cli.main import run
from ptinspect.faces.data import write_csv, write_json, write_jsonl
from ptinspect.faces.report import Report

SCHEMA = json.loads((Path(ptinspect.faces.__file__).parent / "schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)


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


def written(report: Report, write: Callable[[Report, TextIO], None]) -> str:
    out = io.StringIO()
    write(report, out)
    return out.getvalue()


@pytest.mark.parametrize("name", answering_commands())
def test_every_answer(name: str, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[Report] = []
    monkeypatch.setitem(output._WRITERS, "json", lambda report, _: reports.append(report))
    run(["--sample", sample.name, name, *answerable(name, sample), "--format", "json"])
    (lazy,) = reports
    report = replace(lazy, tables=[replace(table, rows=list(table.rows)) for table in lazy.tables])

    answer = json.loads(written(report, write_json))
    VALIDATOR.validate(answer)
    assert answer["command"] == name

    head, *lines = map(json.loads, written(report, write_jsonl).splitlines())
    tables: dict[str, list[Any]] = {key: [] for key in answer["tables"]}
    for line in lines:
        assert set(line) == {"table", "row"}
        tables[line["table"]].append(line["row"])
    assert {**head, "tables": {}} == {**answer, "tables": {}}
    assert tables == {
        key: rows if isinstance(rows, list) else [rows] for key, rows in answer["tables"].items()
    }

    text = written(report, write_csv).rstrip("\n")
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
def test_other_answers(
    arguments: list[str], sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--sample", sample.name, *arguments, "--format", "json"]) in (0, 4)
    VALIDATOR.validate(json.loads(capsys.readouterr().out))
