# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests with hugetlb pages and with page-table isolation on and off: states no sample has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opened import Sample
from resting import Running, Stock, resting_guest
from test_deposits import (
    test_every_huge_entry_is_told,
    test_held_in_the_census,
    test_huge_pages_are_those_of_smaps,
    test_tables_are_those_that_plain_drgn_finds,
)
from test_lists import (
    test_owners_are_the_mms_of_tasks,
    test_pages_of_a_pgd,
    test_pgd_list,
    test_roles,
    test_show_says_what_the_words_are,
)
from test_sharing import test_no_other_table_has_two_parents, test_shared_by_whom_and_which_file
from test_walk import made, walked

from ptinspect.kernel.paging import EntryClass
from ptinspect.state.deposits import DepositRing
from ptinspect.state.lists import FREE_LIST
from ptinspect.tables.lookup import Outcome, walk_address
from ptinspect.tables.spaces import Space

pytestmark = pytest.mark.guest

__all__ = (
    "test_every_huge_entry_is_told",
    "test_held_in_the_census",
    "test_huge_pages_are_those_of_smaps",
    "test_no_other_table_has_two_parents",
    "test_owners_are_the_mms_of_tasks",
    "test_pages_of_a_pgd",
    "test_pgd_list",
    "test_roles",
    "test_shared_by_whom_and_which_file",
    "test_show_says_what_the_words_are",
    "test_tables_are_those_that_plain_drgn_finds",
)

KERNELS = (
    Stock("trixie", "x86_64", "6.12", append="lab_hugepages=8 pti=on"),
    Stock("forky", "x86_64", "7.2", append="lab_hugepages=8 pti=on"),
    Stock("forky", "x86_64", "7.2", append="lab_hugepages=8 pti=off"),
    Stock("forky", "aarch64", "7.2", append="lab_hugepages=8"),
)


@pytest.fixture(scope="module", params=KERNELS, ids=str)
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    with resting_guest(request.param) as guest:
        yield guest


def table_at(sample: Sample, space: Space, va: int, level: int) -> int:
    """Physical address of the table of a level that translates an address."""
    found = walk_address(sample.prog, walked(sample).paging, space.root, va)
    (step,) = (step for step in found.steps if step.level == level)
    return step.table


def ring_at(sample: Sample, space: Space, va: int) -> DepositRing:
    """The ring of the PMD table that translates an address."""
    table = table_at(sample, space, va, 1)
    (ring,) = (r for r in walked(sample).census.stories.deposits.rings if table in r.pmd_tables)
    return ring


def test_a_moved_huge_page_takes_its_table_along(sample: Sample) -> None:
    """One table in each of two rings; those of the pages that were split are in use."""
    _, _, tables, _ = walked(sample)
    ((space, moved),) = made(sample, "thp-moved")
    ((_, area),) = made(sample, "thp-withdrawn")
    rings = [ring_at(sample, space, moved), ring_at(sample, space, area)]
    assert [ring.needed for ring in rings] == [1, 1]
    assert [len(ring.tables) for ring in rings] == [1, 1]
    assert all(ring.agrees for ring in rings)
    huge = tables.paging.levels[1].entry_span
    spare = {table for ring in rings for table in ring.tables}
    for number in range(2):
        assert table_at(sample, space, area + number * huge, 0) not in spare


def test_the_three_that_share_and_the_one_that_has_gone(sample: Sample) -> None:
    (shared,) = walked(sample).census.stories.sharing.tables
    assert len(shared.sharers) == 3
    assert shared.count == 2
    assert shared.agrees
    assert {walked(sample).tables.spaces[s.space].tasks[0].comm for s in shared.sharers} == {
        *("hugetlb-a", "hugetlb-b", "hugetlb-c"),
    }


def test_reclaimed_tables(sample: Sample) -> None:
    """Whole tables that were zapped are given back where the kernel does that (PT_RECLAIM)."""
    paging, _, tables, _ = walked(sample)
    ((space, start),) = made(sample, "reclaimed")
    try:
        gives_back = bool(sample.prog.symbol("__tlb_remove_table_one_rcu"))
    except LookupError:
        gives_back = False
    assert gives_back is (not sample.name.startswith("6."))
    span = paging.levels[1].entry_span
    rows = tables.rows_of_space(tables.spaces.index(space))
    vas = tables.va[rows[tables.level[rows] == 0]].tolist()
    empty = [va for va in vas if start <= va < start + 6 * span]
    assert len(empty) == (0 if gives_back else 6)
    for number in range(6):
        found = walk_address(sample.prog, paging, space.root, start + number * span)
        assert found.outcome is Outcome.NOT_MAPPED
        assert found.steps[-1].kind is EntryClass.NONE
        assert found.steps[-1].level == (1 if gives_back else 0)


def test_isolation(sample: Sample, running: Running) -> None:
    owners = walked(sample).census.stories.owners
    if "pti=" not in running.guest.command_line:
        assert not owners.recorded
        return
    isolated = "pti=on" in running.guest.command_line
    # 6.12 has the second page in any case.
    two = isolated or sample.name.startswith("6.")
    assert {owner.pages for owner in owners.pgds} == {2 if two else 1}
    assert {owner.user_half is not None for owner in owners.pgds} == {isolated}


def test_list_of_kernel_tables_to_be_freed(sample: Sample) -> None:
    """A stock kernel with IOMMU_SVA has it; at rest nothing is on it."""
    lists = walked(sample).census.stories.lists
    found = lists.named(FREE_LIST)
    has_it = sample.name.startswith("7.") and walked(sample).paging.architecture == "x86_64"
    assert (found is not None) is has_it
    if found is not None:
        assert found.pfns == found.problems == ()
        assert lists.free_work_pending is False
