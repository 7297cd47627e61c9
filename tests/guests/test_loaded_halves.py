# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""s390 6.1 while it forks, maps and exits: bits, trees, lists and RCU agree at any instant."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from resting import Stock, busy_guest

from ptinspect.census import take_census
from ptinspect.state.halves import BOTH, LOWER, UPPER, Halves
from ptinspect.target import open_target

pytestmark = pytest.mark.guest

PAUSES = 20
CPUS = 2


def test_halves_of_a_guest_under_load() -> None:
    """
    What a CPU has just begun is no contradiction, and there are not many CPUs.

    The halves that wait by their bits have to be those that RCU's batches hold.
    """
    states: Counter[int] = Counter()
    pages = waiting = 0
    with (
        busy_guest(Stock("bookworm", "s390x", "6.1"), "lab_load=1", cpus=CPUS) as running,
        open_target(running.watched) as target,
    ):
        for _ in range(PAUSES):
            time.sleep(0.3)
            running.guest.stop()
            try:
                census = take_census(target.prog, leaf_counts=False)
                halves, pending = census.stories.halves, census.stories.pending
            finally:
                running.guest.cont()
            assert halves is not None
            assert halves.missing == ()
            assert np.count_nonzero(halves.contradicts) <= CPUS
            assert np.count_nonzero(halves.on_the_way) <= 2 * CPUS
            # Every other page's bits are just its linked halves.
            sure = halves.problem == 0
            kept = np.where(halves.pgste, BOTH, halves.linked)
            assert (halves.allocated[sure] == kept[sure]).all()
            told = waiting_halves(halves)
            held = set(pending.addresses.tolist())
            assert len(told - held) <= 2 * CPUS
            states.update(halves.states())
            pages += len(halves)
            waiting += len(told & held)
    print(f"{pages} pages, {waiting} halves in RCU's hands, states: {dict(states)}")
    assert {0x01, 0x02, 0x03, 0x10, 0x30} <= set(states)
    assert set(states) <= {0x00, 0x01, 0x02, 0x03, 0x12, 0x21, 0x10, 0x20, 0x30}
    assert waiting > 100


def waiting_halves(halves: Halves) -> set[int]:
    """Physical addresses of the halves that wait by their bits."""
    found: set[int] = set()
    for half, offset in ((LOWER, 0), (UPPER, 2048)):
        pfns = halves.pfn[(halves.pending & half) != 0]
        found |= set((pfns * np.uint64(4096) + np.uint64(offset)).tolist())
    return found
