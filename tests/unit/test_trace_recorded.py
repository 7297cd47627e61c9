# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The record of a trace that still runs: its events are replayed."""

import json
from pathlib import Path
from typing import Any

import pytest

from ptinspect.errors import UsageError
from ptinspect.trace.recorded import read_record

BEGIN = {
    "kind": "begin",
    "nsecs": 100,
    "release": "6.12",
    "boot_id": None,
    "events": True,
    "filtered": False,
    "young_ns": 5,
}


def event(kind: str, nsecs: int, page: int, **more: Any) -> dict[str, Any]:
    common = {"page": hex(page), "level": "PTE", "pid": 7, "comm": "sh"}
    extra = {"mm": "0x40"} if kind == "made" else {"way": "gather+RCU"}
    return {"kind": kind, "nsecs": nsecs, **common, **extra, **more}


def record(folder: Path, *lines: Any, end: str = "\n") -> Path:
    path = folder / "record"
    path.write_text("\n".join(json.dumps(line) for line in lines) + end)
    return path


def test_replays_events(tmp_path: Path) -> None:
    path = record(
        tmp_path,
        BEGIN,
        event("made", 110, 1),
        event("made", 111, 2),
        event("made", 112, 3),
        event("unlinked", 120, 2),
        event("unlinked", 121, 3),
        {"kind": "reading", "nsecs": 122},
        event("freed", 123, 3),
        event("made", 124, 3, mm=None),
        event("unlinked", 125, 9),
        {"kind": "ended", "nsecs": 130, "mm": "0x40"},
        event("made", 140, 4),
    )
    recorded = read_record(path)
    assert not recorded.ended
    assert recorded.until_ns == 140
    assert {(t.page, t.age_ns, t.mm_ended_ns) for t in recorded.live} == {
        (1, 30, 10),
        (3, 16, None),
        # Its mm is another one at the same address.
        (4, 0, None),
    }
    assert {(t.page, t.age_ns, t.way) for t in recorded.pending} == {
        (2, 20, "gather+RCU"),
        (9, 15, "gather+RCU"),
    }


def test_a_line_that_is_just_being_written(tmp_path: Path) -> None:
    path = record(tmp_path, BEGIN, event("made", 110, 1), end='\n{"kind": "ma')
    assert len(read_record(path).live) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "no record of a trace"),
        (({"kind": "reading"},), "no beginning"),
        (({**BEGIN, "events": False},), "one by one"),
        ((BEGIN, {"kind": "made"}), "no record of a trace"),
        ((BEGIN, ["made"]), "no record of a trace"),
        (({"kind": "begin"},), "no record of a trace"),
    ],
)
def test_refuses(tmp_path: Path, lines: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_record(record(tmp_path, *lines))


def test_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_record(tmp_path / "none")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UsageError, match="cannot be read"):
        read_record(binary)
    binary.write_text("what\n")
    with pytest.raises(UsageError, match="no record"):
        read_record(binary)
