# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who allocated a table, on a kernel that writes it down: against who has the table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from conftest import OWNED, opened
from drgn.helpers.linux.pid import find_task
from opened import Sample
from overlay import Overlay

from ptinspect.census import Census, take_census
from ptinspect.faces.orphans import orphans_table
from ptinspect.orphans import describe_orphans
from ptinspect.state.page_owner import page_owner, page_owner_enabled
from ptinspect.tables.spaces import SpaceKind
from ptinspect.target import sample_names


@pytest.fixture(scope="module", params=[n for n in sample_names() if n.endswith(OWNED)])
def owned(request: pytest.FixtureRequest) -> Iterator[Sample]:
    with opened(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def census(owned: Sample) -> Census:
    return take_census(owned.prog, leaf_counts=False)


def test_tables_were_allocated_by_who_has_them(owned: Sample, census: Census) -> None:
    """Or by the parent, which copies its tables for a child."""
    prog = owned.prog
    assert page_owner_enabled(prog)
    compared = 0
    for index in np.flatnonzero((census.level == 0) & (census.reached_counts() == 1)).tolist():
        (space,) = census.spaces_of(index)
        if space.kind is not SpaceKind.USER or not space.tasks:
            continue
        found = page_owner(prog, int(census.scan.pfns[index]))
        assert found is not None
        task = find_task(prog, space.tasks[0].pid)
        assert found.pid in (task.pid.value_(), task.real_parent.pid.value_())
        assert found.allocated
        assert found.order == census.scan.orders[index]
        assert any("pte_alloc" in name for name in found.stack), found.stack
        compared += 1
    assert compared > 100


def test_orphan_with_its_owner(owned: Sample, census: Census) -> None:
    prog = owned.prog
    index = int(np.flatnonzero((census.level == 0) & (census.reached_counts() == 1))[-1])
    row = int(census.rows_of(index)[0])
    entry = int(census.tables.entry_address[row])
    with Overlay(prog).word_at(entry, 0, physical=True):
        known = describe_orphans(prog, take_census(prog, leaf_counts=False))
    (orphan,) = known.orphans
    owner = page_owner(prog, orphan.pfn)
    assert owner is not None
    assert orphan.owner == owner
    (line,) = orphans_table(known).rows
    assert f"{owner.comm}/{owner.pid}, " in str(line[-1])
    assert owner.stack[-1] in str(line[-1])


def test_other_kernels_do_not_tell(sample: Sample) -> None:
    assert not page_owner_enabled(sample.prog)
