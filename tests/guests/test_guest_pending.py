# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Stock kernels at rest and under fork load, stopped: what every typed page is held by.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest
from resting import Running, Stock, resting_guest
from test_pending import batches

from ptinspect.census import Holder, take_census
from ptinspect.orphans import describe_orphans
from ptinspect.state.pending import Way
from ptinspect.state.rcu import Segment
from ptinspect.summary import summarise
from ptinspect.target import open_target

pytestmark = pytest.mark.guest

#: Kernels that free their tables by RCU and keep at least some of them typed until then.
LOADED_KERNELS = (
    Stock("forky", "aarch64", "7.2", append="lab_load=1"),
    # Callbacks wait on bypass lists, for seconds.
    Stock("forky", "x86_64", "7.2", append="lab_load=1 rcu_nocbs=all"),
    Stock("bookworm-backports", "s390x", "6.12", append="lab_load=1"),
    Stock("bookworm-backports", "ppc64le", "6.12", append="lab_load=1"),
)

#: How often a guest under load is stopped.
STOPS = 20


@pytest.fixture(scope="module", params=LOADED_KERNELS, ids=str)
def loaded(request: pytest.FixtureRequest) -> Iterator[Running]:
    """A guest that keeps forking, mapping and exiting."""
    with resting_guest(request.param) as guest:
        yield guest


def test_no_orphan_at_rest(running: Running) -> None:
    # Kernel threads do not rest: a table may be on its way now and then.
    for _ in range(5):
        with open_target(running.paused) as target:
            census = take_census(target.prog, leaf_counts=False)
            known = describe_orphans(target.prog, census)
        if not known.total and census.complete:
            return
    assert known.orphans == ()
    assert census.holders_missing == ()


def test_every_typed_page_is_explained_under_load(loaded: Running) -> None:
    seen: Counter[Holder] = Counter()
    segments: Counter[Segment] = Counter()
    unnamed = 0
    for _ in range(STOPS):
        time.sleep(0.2)
        with open_target(loaded.paused) as target:
            prog = target.prog
            census = take_census(prog, leaf_counts=False)
            pending = census.stories.pending
            waiting = batches(prog)
            on_lists = [
                free.address
                for free in pending.frees
                if free.way is Way.RCU and free.segment is not Segment.INVOKED
            ]
            assert sorted(on_lists) == sorted(batch.rcu.address_ for _, batch in waiting)
            counts = dict(zip((f.address for f in pending.frees), pending.table_counts().tolist()))
            for _, batch in waiting:
                assert counts[batch.rcu.address_] == batch.nr
            known = describe_orphans(prog, census)
            difference = summarise(prog, census.scan).difference
        for count in census.holder_counts():
            seen[count.holder] += count.pages
        # Between typing and counting a table, or the reverse, a CPU can be stopped too.
        assert difference is not None
        assert abs(difference) <= 2
        # One table a CPU may be on its way from its tree to a batch, or not yet in a tree.
        assert known.total <= 2
        if not known.at_work and not known.running:
            unnamed += sum(not orphan.on_stacks for orphan in known.orphans)
        if pending.rcu is not None:
            segments.update(each.segment for each in pending.rcu.lists)
    assert seen[Holder.RCU] > 0
    assert not unnamed
    assert (segments[Segment.BYPASS] > 0) == ("rcu_nocbs" in loaded.guest.command_line)
