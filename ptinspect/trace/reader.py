# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""bpftrace's JSON lines, as the generated script makes them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Union

from ptinspect.trace.hooks import LEVELS, WAYS


@dataclass(frozen=True)
class Waiting:
    """All hooks are there and the gate is closed."""


@dataclass(frozen=True)
class Gate:
    """The gate opened or closed."""

    on: bool
    nsecs: int


@dataclass(frozen=True)
class Reading:
    """All maps at one moment: the script's names, without ``@``."""

    nsecs: int
    maps: dict[str, Any]
    #: The last one, after the gate was closed.
    last: bool = False

    def number(self, name: str) -> int:
        """A map that is one number; one that nothing was put into is 0."""
        value = self.maps.get(name, 0)
        return int(value) if isinstance(value, (int, str)) and value != "" else 0

    def keyed(self, name: str) -> dict[str, Any]:
        """A map with keys; empty if nothing was put into it."""
        value = self.maps.get(name)
        return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class TableEvent:
    """What happened to one table."""

    #: ``made``, ``unlinked`` (it begins to wait) or ``freed``.
    kind: str
    nsecs: int
    page: int
    level: str
    pid: int
    comm: str
    mm: int | None = None
    way: str | None = None
    waited_ns: int | None = None


@dataclass(frozen=True)
class EndEvent:
    """The last user of an mm is gone, and its tables go."""

    nsecs: int
    mm: int


@dataclass(frozen=True)
class Dropped:
    """Something was not counted or not told."""

    count: int
    what: str


Message = Union[Waiting, Gate, Reading, TableEvent, EndEvent, Dropped]

#: What bpftrace says on its own account and what is of no interest here.
_QUIET = {"attached_probes"}


def level_name(code: int) -> str:
    """The name of a level's number in the script."""
    return LEVELS[code] if 0 <= code < len(LEVELS) else LEVELS[0]


def way_name(code: int) -> str:
    """The name of a way's number in the script."""
    return WAYS[code] if 0 <= code < len(WAYS) else WAYS[0]


@dataclass
class Reader:
    """Makes messages of lines; readings span many lines."""

    #: What bpftrace wrote before it began: warnings about the script, or why it cannot run.
    chatter: list[str] = field(default_factory=list)
    _reading: dict[str, Any] | None = None
    _nsecs: int = 0
    _began: bool = False

    def feed(self, line: str) -> Message | None:
        """Take one line; get a message when one is complete."""
        line = line.strip()
        if not line:
            return None
        try:
            said = json.loads(line)
            kind, data = said["type"], said.get("data")
        except (ValueError, KeyError, TypeError):
            if not self._began:
                self.chatter.append(line)
                return None
            return Dropped(1, f"bpftrace wrote what is no JSON: {line[:200]}")
        self._began = True
        if kind == "printf":
            return self._printf(str(data))
        if kind in ("map", "hist", "lhist", "stats"):
            if self._reading is not None and isinstance(data, dict):
                self._reading.update({name.lstrip("@"): value for name, value in data.items()})
            return None
        if kind == "lost_events":
            count = data.get("events", 1) if isinstance(data, dict) else 1
            return Dropped(int(count), "messages lost between kernel and bpftrace")
        if kind in _QUIET:
            return None
        # A full map, a failed read: bpftrace calls it helper_error or runtime_error.
        text = said.get("msg") or (data.get("msg") if isinstance(data, dict) else data)
        if "Argument list too long" in str(text):  # E2BIG of an update (kernel/bpf/hashtab.c)
            return Dropped(1, "updates of a map that was full (--max-tables makes maps larger)")
        return Dropped(1, f"bpftrace says {kind}: {text or line[:200]}")

    def _printf(self, text: str) -> Message | None:
        words = text.split()
        if not words:
            return None
        head = words[0]
        try:
            if head == "waiting":
                return Waiting()
            if head == "gate":
                return Gate(words[1] != "0", int(words[2]))
            if head == "reading":
                self._reading, self._nsecs = {}, int(words[1])
                return None
            if head in ("read", "end") and self._reading is not None:
                maps, self._reading = self._reading, None
                return Reading(self._nsecs, maps, last=head == "end")
            if head == "made":
                _, nsecs, page, level, mm, pid, comm = _split(text, 6)
                return _event(head, nsecs, page, level, pid, comm, mm=int(mm, 16) or None)
            if head == "unlinked":
                _, nsecs, page, level, way, pid, comm = _split(text, 6)
                return _event(head, nsecs, page, level, pid, comm, way=way_name(int(way)))
            if head == "ended":
                return EndEvent(int(words[1]), int(words[2], 16))
            if head == "freed":
                _, nsecs, page, level, way, waited, pid, comm = _split(text, 7)
                way, waited_ns = way_name(int(way)), int(waited)
                return _event(head, nsecs, page, level, pid, comm, way=way, waited_ns=waited_ns)
        except (ValueError, IndexError):
            pass
        return Dropped(1, f"the script wrote what was not expected: {text[:200].strip()}")


def _event(
    kind: str, nsecs: str, page: str, level: str, pid: str, comm: str, **more: Any
) -> TableEvent:
    """What all three kinds say in the same words."""
    name = level_name(int(level))
    return TableEvent(kind, int(nsecs), int(page, 16), name, int(pid), comm, **more)


def _split(text: str, words: int) -> list[str]:
    """Split off words; what is left, a thread's name, may have blanks and line ends in it."""
    parts = text.split(" ", words)
    if len(parts) == words:
        parts.append("")
    return [*parts[:-1], parts[-1][:-1] if parts[-1].endswith("\n") else parts[-1]]
