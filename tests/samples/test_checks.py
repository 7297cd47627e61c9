# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nothing is found in a healthy kernel."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from opened import Sample

from ptinspect.census import take_census
from ptinspect.checks import Verdict, invariants, run_checks, unverified
from ptinspect.cli.main import run


def test_silent_on_a_healthy_kernel(sample: Sample) -> None:
    results = run_checks(sample.prog)
    assert [f"{f.invariant}: {f.message} {f.evidence}" for f in results.findings] == []
    assert not results.incomplete, [r for r in results.results if r.missing or r.reason]
    verdicts = {result.verdict for result in results.results}
    assert verdicts <= {Verdict.PASS, Verdict.NOT_APPLICABLE}
    for result in results.results:
        assert bool(result.examined) == (result.verdict is Verdict.PASS), result
        assert bool(result.reason) == (result.verdict is Verdict.NOT_APPLICABLE), result
        # A CPU of that one was stopped while it freed tables.
        assert not result.set_aside or sample.name.endswith("-load")


def test_same_of_a_census_that_was_taken_before(sample: Sample) -> None:
    """Then the leaf tables are read a second time, and what the census counted stays."""
    census = take_census(sample.prog)
    counts = census.tables.counts.copy()
    results = run_checks(sample.prog, census=census)
    assert results.results == run_checks(sample.prog).results
    assert (census.tables.counts == counts).all()


def test_every_invariant_is_described() -> None:
    every = invariants()
    assert len({one.id for one in every}) == len(every)
    for one in every:
        for text in (one.claim, one.why, one.applies, one.source, one.breaks, one.false_positives):
            assert text, one.id
    for other in unverified():
        assert other.claim
        assert other.reason


def test_formats(capsys: pytest.CaptureFixture[str]) -> None:
    target = ["--sample", "x86_64-7.3", "check"]
    assert run([*target, "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["complete"]
    assert len(answer["tables"]["invariants"]) == len(invariants())
    assert answer["tables"]["findings"] == []
    assert run([*target, "--format", "junit", "--only", "structure"]) == 0
    suite = ElementTree.fromstring(capsys.readouterr().out)
    assert {case.get("classname") for case in suite} == {"ptinspect.structure"}
    assert suite.get("failures") == "0"
    assert run(["check", "--list"]) == 0
    assert run(["check", "--explain", "tree-single-parent"]) == 0
    assert "exactly one entry" in capsys.readouterr().out
    assert run(["check", "--explain", "no-such"]) == 2
    assert run([*target, "--only", "no-such"]) == 2
