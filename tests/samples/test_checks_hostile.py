# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Damaged dumps: ``check`` ends soon, with a verdict, whatever was flipped or cut off.

``scripts/hostile`` tries many more of them.
"""

from __future__ import annotations

from collections import Counter

from hostile import flips, truncations
from opened import Sample

from ptinspect.checks import run_checks

FLIPS, TRUNCATIONS = 40, 9

#: Truncations that went wrong once. s390x-6.12: of no typed page was left anything.
ONCE_BAD = {"s390x-6.12": (5069,)}


def test_flipped_bits(sample: Sample) -> None:
    before = {(f.invariant, f.address) for f in run_checks(sample.prog).findings}
    outcomes = list(flips(sample.name, sample.prog, range(FLIPS)))
    assert [(o.seed, o.what, o.problem) for o in outcomes if o.problem] == []
    # Most of what is flipped matters.
    assert Counter(o.verdict for o in outcomes)["findings"] > FLIPS // 4
    assert {(f.invariant, f.address) for f in run_checks(sample.prog).findings} == before


def test_dumps_that_lack_memory(sample: Sample) -> None:
    """What is missing is no finding."""
    seeds = (*range(TRUNCATIONS), *ONCE_BAD.get(sample.name, ()))
    outcomes = list(truncations(sample.name, seeds))
    assert len(outcomes) == len(seeds)
    assert [(o.seed, o.what, o.problem) for o in outcomes if o.problem] == []
    assert [(o.seed, o.what) for o in outcomes if o.verdict == "findings"] == []
