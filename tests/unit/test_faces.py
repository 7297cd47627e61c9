# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text, JSON and CSV of reports; names from the kernel never reach a terminal raw."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptinspect.cli.output import emit
from ptinspect.faces.data import write_csv, write_json
from ptinspect.faces.escape import escape
from ptinspect.faces.report import Column, Kind, Report, Table
from ptinspect.faces.text import write_text

HOSTILE = "evil\x1b[31m\n\u202ename\x00\udcff"


def report(**attributes: object) -> Report:
    table = Table(
        "things",
        (Column("address", Kind.HEX), Column("count", Kind.COUNT), Column("comm")),
        [(0xFFFF888000001000, 3, HOSTILE), (None, None, None), (0, 0, "")],
        "Things",
    )
    single = Table(
        "one", (Column("flag"), Column("pfn", Kind.HEX)), [(True, 16)], "One", single=True
    )
    return Report("test", "a target", (table, single), **attributes)  # type: ignore[arg-type]


def rendered(write: object, **attributes: object) -> str:
    out = io.StringIO()
    write(report(**attributes), out)  # type: ignore[operator]
    return out.getvalue()


def test_text() -> None:
    text = rendered(write_text, notes=["A note."], missing=["3 pages"])
    lines = text.splitlines()
    assert lines[0] == "Things"
    assert lines[1].split() == ["address", "count", "comm"]
    assert lines[2].split()[:2] == ["0xffff888000001000", "3"]
    assert lines[3].split() == ["-", "-", "-"]
    assert lines[4].split() == ["0x0", "0"]
    assert "pfn   0x10" in text
    assert "flag  yes" in text
    assert "A note." in text
    assert text.endswith("INCOMPLETE: 3 pages\n")
    assert rendered(write_text, findings=["a\nb"]).endswith("FINDING: a\\nb\n")


@pytest.mark.parametrize("output_format", ["text", "json", "csv"])
def test_exit_status(output_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert emit(report(), output_format) == 0
    assert emit(report(findings=[HOSTILE]), output_format) == 1
    assert emit(report(findings=["f"], missing=["m"]), output_format) == 1
    assert emit(report(missing=["m"]), output_format) == 4
    told = capsys.readouterr().err
    lines = ["finding: " + escape(HOSTILE), "finding: f", "incomplete: m", "incomplete: m"]
    expected = [f"ptinspect: {line}\n" for line in lines] if output_format == "csv" else []
    assert told == "".join(expected)


@pytest.mark.parametrize("write", [write_text, write_csv])
def test_nothing_hostile_reaches_a_terminal(write: object) -> None:
    text = rendered(write)
    assert all(c == "\n" or c.isprintable() for c in text)
    assert "evil\\x1b[31m\\n\\u202ename\\x00" in text


def test_json() -> None:
    answer = json.loads(rendered(write_json, missing=["3 pages"]))
    assert answer["schema"] == "ptinspect"
    assert answer["version"] == 1
    assert answer["complete"] is False
    assert answer["missing"] == ["3 pages"]
    assert answer["findings"] == []
    assert answer["tables"]["things"] == [
        {"address": "0xffff888000001000", "count": 3, "comm": HOSTILE},
        {"address": None, "count": None, "comm": None},
        {"address": "0x0", "count": 0, "comm": ""},
    ]
    assert answer["tables"]["one"] == {"flag": True, "pfn": "0x10"}


def test_csv() -> None:
    things, one = rendered(write_csv).split("\n\n")
    rows = list(csv.reader(io.StringIO(things)))
    assert rows[0] == ["address", "count", "comm"]
    assert rows[1][:2] == ["0xffff888000001000", "3"]
    assert rows[2] == ["", "", ""]
    assert list(csv.reader(io.StringIO(one))) == [["flag", "pfn"], ["True", "0x10"]]


@given(st.text())
def test_escape_is_printable_and_leaves_the_printable_alone(text: str) -> None:
    assert escape(text).isprintable()
    if text.isprintable():
        assert escape(text) == text
