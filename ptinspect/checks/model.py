# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an invariant is, and what running one gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Callable, SupportsInt, Union

if TYPE_CHECKING:
    from ptinspect.checks.context import Context

#: One side of a disagreement: a number (shown in hex), or words.
Value = Union[int, str]


class Severity(IntEnum):
    """How bad a broken invariant is; a higher one includes the lower ones in ``--severity``."""

    #: Unusual; there may be a good reason.
    SUSPICIOUS = 1
    #: Numbers of the kernel that do not add up.
    ACCOUNTING = 2
    #: Memory that nothing will free.
    LEAK = 3
    #: What the kernel or the hardware will act on is wrong.
    CORRUPTION = 4


class Verdict(Enum):
    """What became of one invariant."""

    PASS = "pass"
    FINDINGS = "findings"
    #: There is nothing on this target that it could be true or false of.
    NOT_APPLICABLE = "not applicable"
    #: Nothing was found, but not everything could be looked at.
    INCOMPLETE = "incomplete"
    #: The invariant itself broke down: a bug of ptinspect.
    FAILED = "failed"


class NotApplicableError(Exception):
    """Raised by an invariant: why there is nothing to examine."""


@dataclass(frozen=True)
class Finding:
    """One object of which an invariant does not hold."""

    #: What the address is of: ``entry``, ``table`` (both physical), ``ptdesc``, ``mm``, ...
    kind: str
    address: int
    #: What is wrong, in one line.
    message: str
    #: The values that disagree, by name.
    evidence: tuple[tuple[str, Value], ...]
    #: Name of the address space or process that it belongs to; empty if to none. Not escaped.
    owner: str = ""
    #: What to run to see more, without the target's options.
    look: str = ""
    #: Id of the invariant; filled in by the runner.
    invariant: str = ""
    severity: Severity = Severity.SUSPICIOUS


class Tally:
    """What an invariant has looked at so far."""

    def __init__(self) -> None:
        self.examined = 0
        self.missing: list[str] = []
        self.set_aside: dict[str, int] = {}

    def examine(self, count: SupportsInt) -> None:
        """Count objects that were looked at."""
        self.examined += int(count)

    def miss(self, what: str) -> None:
        """Note what could not be looked at, in a sentence."""
        if what not in self.missing:
            self.missing.append(what)

    def leave(self, why: str) -> None:
        """Count a suspect that is no finding because something is going on there just now."""
        self.set_aside[why] = self.set_aside.get(why, 0) + 1


Check = Callable[["Context", Tally], Iterator[Finding]]


@dataclass(frozen=True)
class Invariant:
    """Something that is true of every healthy kernel."""

    id: str
    #: structure, entries, mappings, ...
    family: str
    severity: Severity
    #: Where it applies, for people; the function decides.
    applies: str
    #: Where the kernel sees to it.
    source: str
    #: When it may look broken on a healthy kernel.
    false_positives: str
    #: What usually breaks it.
    breaks: str
    #: What it claims.
    claim: str
    #: Why it matters.
    why: str
    check: Check = field(repr=False)


@dataclass(frozen=True)
class Unverified:
    """An invariant that is not checked, and why."""

    id: str
    claim: str
    reason: str


@dataclass(frozen=True)
class Result:
    """What running one invariant gave."""

    invariant: Invariant
    verdict: Verdict
    #: Objects that were looked at.
    examined: int
    findings: tuple[Finding, ...] = ()
    #: Whether there are more findings than were kept.
    truncated: bool = False
    #: Why it does not apply, or how it failed.
    reason: str = ""
    #: What could not be looked at, in sentences.
    missing: tuple[str, ...] = ()
    #: Suspects that were no finding because something was going on there: why, and how many.
    set_aside: tuple[tuple[str, int], ...] = ()
    #: Suspects of a live target that were gone or had changed when they were looked at again.
    vanished: int = 0
