# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the invariants gave, as a report and as JUnit XML; and the invariants themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TextIO
from xml.sax.saxutils import escape as xml_escape
from xml.sax.saxutils import quoteattr

from ptinspect.checks import (
    CheckResults,
    Finding,
    Invariant,
    Result,
    Severity,
    Unverified,
    Verdict,
)
from ptinspect.checks.model import Value
from ptinspect.faces.escape import escape
from ptinspect.faces.report import Column, Kind, Report, Table


def check_report(
    results: CheckResults,
    target: str,
    *,
    severity: Severity,
    most: int,
    racing: bool,
    table: bool = True,
) -> Report:
    """
    Lay out the verdicts, then the findings.

    :param severity: Findings below it are not shown.
    :param most: Findings of one invariant to show.
    :param table: Whether to give the findings as a table too, for programs.
    """
    shown = [finding for finding in results.findings if finding.severity >= severity]
    kept = list(_first(shown, most))
    verdicts = Table(
        "invariants",
        (
            Column("invariant"),
            Column("severity"),
            Column("verdict"),
            Column("examined", Kind.COUNT),
            Column("findings", Kind.COUNT),
            Column("set_aside", Kind.COUNT),
            Column("vanished", Kind.COUNT),
            Column("why"),
        ),
        [_verdict_row(result) for result in results.results],
        f"Invariants of page tables and their descriptors ({target})",
    )
    findings = Table(
        "findings",
        (
            Column("severity"),
            Column("invariant"),
            Column("kind"),
            Column("address", Kind.HEX),
            Column("owner"),
            Column("finding"),
            Column("evidence"),
            Column("look"),
        ),
        [_finding_row(finding) for finding in kept],
    )
    return Report(
        "check",
        target,
        (verdicts, findings) if table else (verdicts,),
        notes=tuple(_notes(results, len(shown), len(kept), racing)),
        missing=tuple(_missing(results)),
        findings=tuple(_sentence(finding) for finding in kept),
    )


def _sentence(finding: Finding) -> str:
    owner = f" of {finding.owner}" if finding.owner else ""
    look = f"; see ptinspect {finding.look}" if finding.look else ""
    return (
        f"{finding.invariant} ({finding.severity.name.lower()}): {finding.kind} "
        f"{finding.address:#x}{owner}: {finding.message} [{_evidence(finding)}]{look}"
    )


def _first(findings: Sequence[Finding], most: int) -> Iterator[Finding]:
    """Get the first findings of each invariant."""
    seen: dict[str, int] = {}
    for finding in findings:
        seen[finding.invariant] = seen.get(finding.invariant, 0) + 1
        if seen[finding.invariant] <= most:
            yield finding


def _verdict_row(result: Result) -> tuple[str | int, ...]:
    return (
        result.invariant.id,
        result.invariant.severity.name.lower(),
        result.verdict.value,
        result.examined,
        len(result.findings),
        sum(number for _, number in result.set_aside),
        result.vanished,
        _why(result),
    )


def _why(result: Result) -> str:
    parts = [result.reason, *result.missing]
    parts.extend(f"{number} set aside: {why}" for why, number in result.set_aside)
    if result.truncated:
        parts.append(f"more than {len(result.findings)} findings")
    return "; ".join(part for part in parts if part)


def _value(value: Value) -> str:
    return f"{value:#x}" if isinstance(value, int) else value


def _evidence(finding: Finding) -> str:
    return ", ".join(f"{name}={_value(value)}" for name, value in finding.evidence)


def _finding_row(finding: Finding) -> tuple[str | int, ...]:
    return (
        finding.severity.name.lower(),
        finding.invariant,
        finding.kind,
        finding.address,
        finding.owner,
        finding.message,
        _evidence(finding),
        f"ptinspect {finding.look}" if finding.look else "",
    )


def _notes(results: CheckResults, found: int, shown: int, racing: bool) -> Iterator[str]:
    number = dict.fromkeys(Verdict, 0)
    for result in results.results:
        number[result.verdict] += 1
    yield (
        ", ".join(f"{count} {verdict.value}" for verdict, count in number.items() if count)
        + f"; {found} findings."
    )
    if shown < found:
        yield f"{found - shown} findings more are not shown (--max)."
    if racing:
        yield "The target was running: only what was found again, unchanged, is a finding."


def _missing(results: CheckResults) -> Iterator[str]:
    yield from results.missing
    for result in results.results:
        if result.verdict is Verdict.FAILED:
            yield f"{result.invariant.id} failed: {result.reason}"
        for what in result.missing:
            yield f"{result.invariant.id}: {what}"


def list_report(every: Sequence[Invariant], left_out: Sequence[Unverified]) -> Report:
    """Lay out all invariants, and those that are not checked."""
    return Report(
        "check",
        "",
        (
            Table(
                "invariants",
                (Column("invariant"), Column("family"), Column("severity"), Column("applies_to")),
                [(one.id, one.family, one.severity.name.lower(), one.applies) for one in every],
            ),
            Table(
                "not_checked",
                (Column("invariant"), Column("claim"), Column("reason")),
                [(one.id, one.claim, one.reason) for one in left_out],
                "Not checked",
            ),
        ),
    )


def explain(one: Invariant) -> str:
    """Say all that is known of an invariant."""
    return "\n".join(
        (
            f"{one.id} ({one.family}, {one.severity.name.lower()})",
            "",
            one.claim,
            one.why,
            "",
            f"Applies to:            {one.applies}",
            f"In the kernel:         {one.source}",
            f"Usually broken by:     {one.breaks}",
            f"Known false positives: {one.false_positives}",
        )
    )


def write_junit(results: CheckResults, target: str, severity: Severity, out: TextIO) -> None:
    """Write the verdicts as JUnit XML: a test case for each invariant."""
    failed = [r for r in results.results if any(f.severity >= severity for f in r.findings)]
    errors = [r for r in results.results if r.verdict is Verdict.FAILED]
    skipped = [
        r
        for r in results.results
        if r.verdict in (Verdict.NOT_APPLICABLE, Verdict.INCOMPLETE) and r not in failed
    ]
    out.write('<?xml version="1.0" encoding="UTF-8"?>\n')
    out.write(
        f"<testsuite name={_attribute(f'ptinspect check {target}')} "
        f'tests="{len(results.results)}" failures="{len(failed)}" errors="{len(errors)}" '
        f'skipped="{len(skipped)}">\n'
    )
    for result, seconds in zip(results.results, results.seconds):
        one = result.invariant
        out.write(
            f"  <testcase classname={_attribute(f'ptinspect.{one.family}')} "
            f'name={_attribute(one.id)} time="{seconds:.3f}">\n'
        )
        if result in failed:
            lines = [
                f"{f.kind} {f.address:#x} {f.owner}: {f.message} ({_evidence(f)})"
                for f in result.findings
                if f.severity >= severity
            ]
            out.write(f'    <failure type="{one.severity.name.lower()}" ')
            out.write(f"message={_attribute(f'{len(lines)} findings')}>")
            out.write(xml_escape("\n".join(escape(line) for line in lines)))
            out.write("</failure>\n")
        elif result in errors:
            out.write(f"    <error message={_attribute(result.reason)}/>\n")
        elif result in skipped:
            why = f"{result.verdict.value}: {_why(result)}"
            out.write(f"    <skipped message={_attribute(why)}/>\n")
        out.write("  </testcase>\n")
    out.write("</testsuite>\n")


def _attribute(text: str) -> str:
    return quoteattr(escape(text))
