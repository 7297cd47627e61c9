# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the invariants on one census; on a target that runs, look again at what they suspect."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Callable

from drgn import FaultError, Program

from ptinspect.census import Census, take_census
from ptinspect.checks.context import Context
from ptinspect.checks.model import (
    Finding,
    Invariant,
    NotApplicableError,
    Result,
    Severity,
    Tally,
    Verdict,
)
from ptinspect.checks.registry import select
from ptinspect.errors import PtinspectError
from ptinspect.reached import census_missing

#: Findings of one invariant that are kept.
MOST_FINDINGS = 1000

#: How often a target that runs is looked at again as long as something is suspected, and seconds
#: before each time. Pages are given out again at once, so that twice is not enough.
ROUNDS = 4
_PAUSE = 0.2

#: Called before each invariant with (how many are done, how many there are).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CheckResults:
    """What all invariants gave."""

    results: tuple[Result, ...]
    #: What the census could not see, in sentences.
    missing: tuple[str, ...]
    #: Seconds that each invariant took, in the order of the results.
    seconds: tuple[float, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, the worst first."""
        every = [finding for result in self.results for finding in result.findings]
        return tuple(sorted(every, key=lambda finding: -finding.severity))

    def worst(self) -> Severity | None:
        """Get the highest severity of any finding."""
        return max((finding.severity for finding in self.findings), default=None)

    @property
    def incomplete(self) -> bool:
        """Whether something could not be seen, or an invariant failed."""
        unseen = (Verdict.INCOMPLETE, Verdict.FAILED)
        return bool(self.missing) or any(
            result.missing or result.verdict in unseen for result in self.results
        )


def run_checks(
    prog: Program,
    *,
    census: Census | None = None,
    only: Iterable[str] = (),
    skip: Iterable[str] = (),
    racing: bool = False,
    progress: Progress | None = None,
) -> CheckResults:
    """
    Check the invariants of a target.

    :param prog: The kernel.
    :param census: One that was taken already; if it lacks leaf counts, they are filled in.
    :param only: Ids or families to run; all if empty.
    :param skip: Ids or families to leave out.
    :param racing: Whether the target runs: then what is suspected is looked at again on fresh
        censuses, and only what persists with the same evidence is a finding.
    :param progress: Called before each invariant with how many are done, and how many there are.
    :return: The result of each invariant, with its findings.
    :raises PtinspectError: if the target's memory map or paging is not supported
    """
    chosen = select(only, skip)
    context = _new_context(prog, census, racing)
    results, seconds = _run(context, chosen, progress)
    if racing:
        for _ in range(ROUNDS):
            results = _confirm(prog, results)
    return CheckResults(tuple(results), tuple(census_missing(context.census)), tuple(seconds))


def _new_context(prog: Program, census: Census | None, racing: bool) -> Context:
    """Take a census if there is none; what it counts and what is asked of entries is one read."""
    if census is None:
        census = take_census(prog, leaf_counts=False)
    context = Context(prog, census, racing=racing)
    if census.tables.leaves_unread:
        context.leaves.run()
    return context


def _run(
    context: Context, chosen: Sequence[Invariant], progress: Progress | None
) -> tuple[list[Result], list[float]]:
    results, seconds = [], []
    for done, one in enumerate(chosen):
        if progress is not None:
            progress(done, len(chosen))
        start = time.perf_counter()
        results.append(_run_one(context, one))
        seconds.append(time.perf_counter() - start)
    return results, seconds


def _run_one(context: Context, one: Invariant) -> Result:
    tally = Tally()
    findings: list[Finding] = []
    truncated = False
    failure = ""
    try:
        for finding in one.check(context, tally):
            if len(findings) == MOST_FINDINGS:
                truncated = True
                break
            findings.append(replace(finding, invariant=one.id, severity=one.severity))
    except NotApplicableError as error:
        return Result(one, Verdict.NOT_APPLICABLE, 0, reason=str(error))
    except FaultError as error:
        tally.miss(f"memory cannot be read: {error}")
    except PtinspectError as error:
        tally.miss(str(error))
    except Exception as error:  # one invariant must not take the others down
        failure = _where(error)
    common = Result(
        one,
        Verdict.PASS,
        tally.examined,
        tuple(findings),
        truncated,
        failure,
        tuple(tally.missing),
        tuple(tally.set_aside.items()),
    )
    return _judged(common)


def _judged(result: Result) -> Result:
    """Fill in the verdict that the rest of a result deserves."""
    if result.findings:
        return replace(result, verdict=Verdict.FINDINGS)
    if result.reason:
        return replace(result, verdict=Verdict.FAILED)
    if result.missing:
        return replace(result, verdict=Verdict.INCOMPLETE)
    if not result.examined:
        reason = "this target has nothing of the kind"
        return replace(result, verdict=Verdict.NOT_APPLICABLE, reason=reason)
    return replace(result, verdict=Verdict.PASS)


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _confirm(prog: Program, results: list[Result]) -> list[Result]:
    """Run the invariants that found something again; keep what they find again."""
    suspects = [result.invariant for result in results if result.findings]
    if not suspects:
        return results
    time.sleep(_PAUSE)
    again, _ = _run(_new_context(prog, None, True), suspects, None)
    return _intersect(results, again)


def persisting(results: CheckResults, again: CheckResults) -> CheckResults:
    """Keep the findings that a second look at the same target gave too, unchanged."""
    return replace(results, results=tuple(_intersect(results.results, again.results)))


def excused(results: CheckResults, excuse: Callable[[Finding], str | None]) -> CheckResults:
    """
    Set findings aside that somebody can explain.

    :param excuse: Called with each finding; says why it is none, or ``None``.
    """
    return replace(results, results=tuple(_excused(one, excuse) for one in results.results))


def _excused(result: Result, excuse: Callable[[Finding], str | None]) -> Result:
    kept: list[Finding] = []
    aside = dict(result.set_aside)
    for finding in result.findings:
        why = excuse(finding)
        if why is None:
            kept.append(finding)
        else:
            aside[why] = aside.get(why, 0) + 1
    if len(kept) == len(result.findings):
        return result
    return _judged(replace(result, findings=tuple(kept), set_aside=tuple(aside.items())))


def _intersect(results: Sequence[Result], again: Sequence[Result]) -> list[Result]:
    seen = {result.invariant.id: result for result in again}
    return [
        _kept(result, seen[result.invariant.id]) if result.findings else result
        for result in results
    ]


def _kept(result: Result, again: Result) -> Result:
    # A round that could not finish says nothing about what it did not find.
    if again.verdict is Verdict.FAILED:
        return result
    second = set(again.findings)
    kept = tuple(finding for finding in result.findings if finding in second)
    gone = len(result.findings) - len(kept)
    missing = result.missing
    if result.truncated and not kept:
        # Nobody has looked again at the suspects that were not kept.
        missing += ("there were more suspects than could be looked at again",)
    return _judged(replace(result, findings=kept, vanished=result.vanished + gone, missing=missing))
