# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real census beside a trace that is made up: its pages are the census's own."""

from dataclasses import replace

import numpy as np
from opened import Sample

from ptinspect.census import Census, Holder, take_census
from ptinspect.trace.explain import Explanation, explain_tables
from ptinspect.trace.reader import Reading
from ptinspect.trace.totals import LiveTable, PendingTable, Totals, read_totals

SECOND = 1_000_000_000
NOTHING = read_totals(Reading(0, {"made": {}, "freed": {}}))


def with_tables(*, live: "tuple[LiveTable, ...]" = (), pending: "tuple[PendingTable, ...]" = ()):
    return replace(NOTHING, live=live, pending=pending)


def live(page: int, age: int, ended: "int | None") -> LiveTable:
    end = None if ended is None else ended * SECOND
    return LiveTable(page, "PTE", age * SECOND, 64, end, 42, "maker", ("__pte_alloc+1",))


def orphaned(census: Census) -> Census:
    """The same census with five tables that nothing holds."""
    holder = census.holder.copy()
    holder[:5] = Holder.UNEXPLAINED
    holder[5:] = np.maximum(holder[5:], Holder.TREE)
    return replace(census, holder=holder)


def explained(census: Census, totals: Totals, tables: "set[int]") -> "dict[int, Explanation]":
    rows = explain_tables(census, totals.live, totals.pending, SECOND, lambda page: page in tables)
    assert len(rows) == len({row.page for row in rows})
    return {row.page: row.explanation for row in rows}


def test_explains_each_orphan(sample: Sample) -> None:
    census = orphaned(take_census(sample.prog))
    pages = census.scan.addresses[:5].tolist()
    totals = with_tables(
        pending=(PendingTable(pages[0], "PTE", "gather+RCU", SECOND, 1, "init"),),
        live=(live(pages[1], 0, None), live(pages[2], 9, 5)),
    )
    assert explained(census, totals, {pages[3]}) == {
        pages[0]: Explanation.WAITING,
        pages[1]: Explanation.JUST_MADE,
        pages[2]: Explanation.SUSPECT,
        pages[3]: Explanation.OLDER,
        pages[4]: Explanation.RELEASED,
    }


def test_a_table_that_its_living_mm_does_not_reach(sample: Sample) -> None:
    census = orphaned(take_census(sample.prog))
    page = int(census.scan.addresses[0])
    totals = with_tables(live=(live(page, 9, None),))
    assert explained(census, totals, set())[page] is Explanation.LOST
    just = with_tables(live=(live(page, 9, 0),))
    assert explained(census, just, set())[page] is Explanation.JUST_MADE


def test_a_table_that_outlived_its_mm_is_shown_where_it_hangs(sample: Sample) -> None:
    census = take_census(sample.prog)
    tree = np.flatnonzero(census.holder == Holder.TREE)
    index = int(tree[len(tree) // 2])
    page = int(census.scan.addresses[index])
    absent = int(census.scan.addresses[-1]) + 64
    totals = with_tables(live=(live(page, 9, 5), live(absent, 9, 5), live(page + 1, 9, None)))
    told = explain_tables(census, totals.live, totals.pending, SECOND, lambda page: True)
    rows = {row.page: row for row in told}
    owner = next(census.owners_of(index))
    row = rows[page]
    assert row.explanation is Explanation.HELD
    assert (row.holder, row.va) == ("tree", owner.va)
    assert row.space == census.tables.spaces[owner.space].name
    assert row.maker == "maker/42"
    assert (rows[absent].explanation, rows[absent].holder) == (Explanation.SUSPECT, None)
    # One whose mm lives is nothing to explain.
    assert page + 1 not in rows
