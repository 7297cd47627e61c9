# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""mms that begin and end while they are looked at: their roots disagree with what names them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from drgn import Object
from opened import Sample
from overlay import Overlay

from ptinspect.census import Census, take_census
from ptinspect.checks import run_checks
from ptinspect.tables.spaces import SpaceKind


@pytest.fixture
def census(sample: Sample) -> Census:
    if sample.truth["kernel"]["arch"] != "ppc64le":
        pytest.skip("only ppc64 with the radix MMU has a process table")
    return take_census(sample.prog)


def mms(census: Census, sample: Sample) -> list[tuple[int, Object]]:
    """Get two processes: the numbers of their spaces, and their mms."""
    found = []
    for number, space in enumerate(census.tables.spaces):
        if space.kind is SpaceKind.USER and space.tasks and space.mm is not None:
            found.append((number, space.mm.object(sample.prog)))
    return found[:2]


def check(sample: Sample, census: Census) -> tuple[int, dict[str, int]]:
    """Get how many findings there are, and what was set aside."""
    (result,) = run_checks(sample.prog, census=census, only=["radix-process-table"]).results
    return len(result.findings), dict(result.set_aside)


def test_a_new_mm_in_the_place_of_one_that_ended(sample: Sample, census: Census) -> None:
    (_, one), (_, other) = mms(census, sample)
    overlay = Overlay(sample.prog)
    with (
        overlay.value_of(one.pgd, other.pgd.value_()),
        overlay.value_of(one.context.id, other.context.id.value_()),
    ):
        found, aside = check(sample, census)
    assert found == 0
    assert aside == {"the mm has another root than a moment before": 1}
    assert check(sample, census) == (0, {})


def test_a_copy_that_has_the_id_of_its_parent(sample: Sample, census: Census) -> None:
    (number, one), (_, other) = mms(census, sample)
    spaces = list(census.tables.spaces)
    spaces[number] = replace(spaces[number], tasks=())
    copied = replace(census, tables=replace(census.tables, spaces=tuple(spaces)))
    with Overlay(sample.prog).value_of(one.context.id, other.context.id.value_()):
        found, aside = check(sample, copied)
        assert (found, list(aside)) == (
            0,
            ["a copy of an mm that has no context id of its own yet"],
        )
        # But two processes never have one id.
        assert check(sample, census)[0] == 1


def test_an_mm_whose_id_is_given_back(sample: Sample, census: Census) -> None:
    (_, one), _ = mms(census, sample)
    with Overlay(sample.prog).value_of(one.context.id, (1 << 64) - 1):
        found, aside = check(sample, census)
    assert (found, aside) == (0, {"the mm is being torn down": 1})
