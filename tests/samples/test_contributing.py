# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The invariant that CONTRIBUTING.md shows: silent on each sample, found where it is broken."""

from __future__ import annotations

import re
from pathlib import Path

import corruptions
import matrix
import pytest
from opened import Sample
from overlay import Overlay

from ptinspect.checks import Verdict, descriptor, invariants, registry, run_checks

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> str:
    """Enter what the guide shows, for one test only, and get its id."""
    invariants()  # all families are loaded
    monkeypatch.setattr(registry, "_INVARIANTS", dict(registry._INVARIANTS))
    check, corruption = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    exec(check, {**vars(descriptor)})
    known = dict(corruptions.CORRUPTIONS)
    exec(corruption, {**vars(corruptions)})
    (id,) = set(corruptions.CORRUPTIONS) - set(known)
    monkeypatch.setattr(matrix, "CORRUPTIONS", {id: corruptions.CORRUPTIONS.pop(id)})
    return id


def test_the_invariant_of_the_guide(shown: str, sample: Sample) -> None:
    (result,) = run_checks(sample.prog, only=[shown]).results
    assert result.verdict is Verdict.PASS
    assert result.examined == len(sample.scan.pfns)
    cell = matrix.try_corruption(sample.prog, Overlay(sample.prog), shown)
    assert cell.caught, cell.why
