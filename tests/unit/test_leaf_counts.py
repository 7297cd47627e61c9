# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counting whole tables at a time gives what looking at each entry gives."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_memory import MODES, Mode

from ptinspect.kernel.paging import EntryClass
from ptinspect.kernel.paging.model import EntryArray
from ptinspect.tables.entries import (
    CLASSES,
    Entries,
    LeafTableCounter,
    entries_of_lines,
    filled_entries,
)


def one_by_one(mode: Mode, raw: EntryArray) -> list[list[int]]:
    """Classify every entry by the rules alone, the empty ones too."""
    counts = []
    for table in raw:
        kinds = mode.paging.classify(mode.paging.values(table), 0)
        counts.append([int(np.count_nonzero(kinds == kind)) for kind in EntryClass])
    return counts


def random_tables(mode: Mode, random: Random, tables: int) -> EntryArray:
    """Make tables that are empty, nearly empty, partly or all filled, with leaves or anything."""
    entries = mode.paging.levels[0].entries

    def leaf() -> int:
        return mode.leaf(0, 0, random)

    def swap() -> int:
        value = mode.swap(0, 0, random)
        return leaf() if value is None else value

    def hidden() -> int:
        value = mode.hidden(0, 0, random)
        return leaf() if value is None else value

    makers = [[leaf], [leaf, swap], [leaf, hidden], [lambda: random.getrandbits(64)], [swap]]
    values = np.full((tables, entries), mode.empty(0), np.uint64)
    for table in values:
        filled = random.choice([0, 0, 1, 2, entries // 2, entries - 1, entries])
        first = random.randrange(entries - filled + 1)
        make = random.choice(makers)
        # A few values many times: what counts is where they are.
        pool = [random.choice(make)() for _ in range(4)]
        for slot in range(first, first + filled):
            table[slot] = random.choice(pool)
    return mode.paging.values(values)


@pytest.mark.parametrize("mode", MODES, ids=str)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_counts_are_those_of_each_entry(mode: Mode, seed: int) -> None:
    random = Random(seed)
    total = random.randint(1, 12)
    raw = random_tables(mode, random, total)
    readable = np.array([random.random() < 0.8 for _ in range(total)])
    counter = LeafTableCounter(mode.paging, total)
    first = 0
    parts = []
    while first < total:
        end = random.randint(first + 1, total)
        some = None if readable[first:end].all() else readable[first:end]
        part = raw[first:end].copy()
        part[~readable[first:end]] = 0
        parts.append(counter.add(first, part, some))
        first = end
    rows = np.array(random.sample(range(total + 3), total), np.intp)
    counts = np.zeros((total + 3, CLASSES), np.uint16)
    counter.store(counts, rows)
    wanted = np.zeros((total + 3, CLASSES), np.int64)
    wanted[rows] = one_by_one(mode, raw)
    wanted[rows[~readable]] = 0
    assert counts.tolist() == wanted.tolist()
    found, each = entries_of_lines(mode.paging, parts, 0), filled_entries(mode.paging, raw, 0)
    for name in Entries._fields:
        wanted_here = getattr(each, name)[readable[each.row]]
        assert getattr(found, name).tolist() == wanted_here.tolist()


@pytest.mark.parametrize("filled", [0, 1, "all"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_batches_of_one_kind_of_table(mode: Mode, filled: int | str) -> None:
    """Every table the same: these are the cases that are decided without a second look."""
    entries = mode.paging.levels[0].entries
    number = entries if filled == "all" else int(filled)
    values = np.full((5, entries), mode.empty(0), np.uint64)
    values[:, :number] = mode.leaf(0, 0, Random(1))
    counter = LeafTableCounter(mode.paging, 5)
    raw = mode.paging.values(values)
    counter.add(0, raw, None)
    counts = np.zeros((5, CLASSES), np.uint16)
    counter.store(counts, np.arange(5))
    assert counts.tolist() == one_by_one(mode, raw)
