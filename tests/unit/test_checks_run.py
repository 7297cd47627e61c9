# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the samples cannot show: another layout, an invariant that breaks down, live suspects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from drgn import FaultError, TypeMember
from mock_kernel import PAGE_BYTES, MockKernel

from ptinspect.checks import Finding, Invariant, Result, Severity, Verdict
from ptinspect.checks import run as runner
from ptinspect.checks.model import Check, NotApplicableError, Tally
from ptinspect.checks.registry import invariants, select
from ptinspect.errors import UsageError

NOTHING: Any = SimpleNamespace()


def found(address: int = 1, **values: int) -> Finding:
    return Finding("table", address, "wrong", tuple(values.items()))


def ran(check: Check, severity: Severity = Severity.LEAK) -> Result:
    one = Invariant("x", "y", severity, "", "", "", "", "", "", check)
    return runner._run_one(NOTHING, one)


def test_a_moved_member_of_ptdesc() -> None:
    (table_match,) = select(["table-match"])
    kernel = MockKernel("7.3")
    context: Any = SimpleNamespace(prog=kernel.prog)
    assert runner._run_one(context, table_match).verdict is Verdict.PASS
    kernel = MockKernel("7.3")
    native = kernel.types["ptdesc"]
    moved = [
        TypeMember(m.type, m.name, 60 * 8 if m.name == "__page_type" else m.bit_offset)
        for m in native.members or ()
    ]
    kernel.types["ptdesc"] = kernel.prog.struct_type("ptdesc", PAGE_BYTES, moved)
    context = SimpleNamespace(prog=kernel.prog)
    result = runner._run_one(context, table_match)
    assert result.verdict is Verdict.FINDINGS
    (finding,) = result.findings
    assert finding.address == 60
    assert finding.invariant == "table-match"
    assert finding.severity is Severity.CORRUPTION


def test_verdicts() -> None:
    def passes(context: Any, tally: Tally) -> Iterator[Finding]:
        tally.examine(3)
        yield from ()

    def examines_nothing(context: Any, tally: Tally) -> Iterator[Finding]:
        yield from ()

    def does_not_apply(context: Any, tally: Tally) -> Iterator[Finding]:
        raise NotApplicableError("no such thing")
        yield

    def misses(context: Any, tally: Tally) -> Iterator[Finding]:
        tally.examine(1)
        tally.miss("half of it")
        yield from ()

    def faults(context: Any, tally: Tally) -> Iterator[Finding]:
        yield found()
        raise FaultError("no memory", 0x1000)

    def breaks_down(context: Any, tally: Tally) -> Iterator[Finding]:
        tally.examine(1)
        yield from ()
        raise ZeroDivisionError("oh")

    assert ran(passes).verdict is Verdict.PASS
    assert ran(passes).examined == 3
    assert ran(examines_nothing).verdict is Verdict.NOT_APPLICABLE
    assert ran(examines_nothing).reason
    assert ran(does_not_apply).reason == "no such thing"
    assert ran(misses).verdict is Verdict.INCOMPLETE
    assert ran(faults).verdict is Verdict.FINDINGS
    assert ran(faults).findings[0].severity is Severity.LEAK
    assert "no memory" in ran(faults).missing[0]
    assert ran(breaks_down).verdict is Verdict.FAILED
    assert "ZeroDivisionError: oh" in ran(breaks_down).reason


def test_findings_are_bounded() -> None:
    def floods(context: Any, tally: Tally) -> Iterator[Finding]:
        address = 0
        while True:
            yield found(address)
            address += 1

    result = ran(floods)
    assert result.truncated
    assert len(result.findings) == runner.MOST_FINDINGS


def test_only_what_persists_unchanged_is_kept() -> None:
    def check(context: Any, tally: Tally) -> Iterator[Finding]:
        tally.examine(3)
        yield from (found(1, value=1), found(2, value=1), found(3, value=1))

    first = ran(check)
    changed = replace(first.findings[1], evidence=(("value", 2),))
    second = replace(first, findings=(first.findings[0], changed))
    (kept,) = runner._intersect([first], [second])
    assert kept.findings == first.findings[:1]
    assert kept.vanished == 2
    (none,) = runner._intersect([first], [replace(first, findings=(), verdict=Verdict.PASS)])
    assert none.verdict is Verdict.PASS
    assert none.vanished == 3
    (unsure,) = runner._intersect([first], [replace(first, verdict=Verdict.FAILED)])
    assert unsure is first


def test_choosing() -> None:
    assert select() == invariants()
    families = {one.family for one in select(["deposits"])}
    assert families == {"deposits"}
    assert "deposit-count" not in {one.id for one in select((), ["deposits"])}
    with pytest.raises(UsageError, match="no invariant 'nonsense'"):
        select(["nonsense"])
