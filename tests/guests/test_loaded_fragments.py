# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""powerpc with 64K pages while it forks, maps and exits: counts agree at any instant."""

from __future__ import annotations

import time

import numpy as np
import pytest
from resting import Stock, busy_guest

from ptinspect.census import take_census
from ptinspect.target import open_target

pytestmark = pytest.mark.guest

PAUSES = 20
CPUS = 2
KERNEL = Stock("bookworm-backports", "ppc64le", "6.12", memory=2048, flavour="powerpc64le-64k")


def test_fragments_of_a_guest_under_load() -> None:
    """
    Counts are the fragments in use, those that RCU has still to free among them.

    What a CPU is just taking or giving back is no contradiction, and there are not many CPUs.
    """
    pages = pending = wrong = 0
    with (
        busy_guest(KERNEL, "lab_quiet=1 lab_load=1", cpus=CPUS) as running,
        open_target(running.watched) as target,
    ):
        for _ in range(PAUSES):
            time.sleep(0.3)
            running.guest.stop()
            try:
                fragments = take_census(target.prog, leaf_counts=False).stories.fragments
            finally:
                running.guest.cont()
            assert fragments is not None
            assert [shape.number for shape in fragments.shapes] == [256, 16]
            found = int(np.count_nonzero(fragments.problem))
            assert found <= 2 * CPUS
            pages += len(fragments)
            pending += int(fragments.pending.sum())
            wrong += found
    print(f"{pages} pages, {pending} fragments wait to be freed, {wrong} pages in between")
    assert wrong <= PAUSES // 4
    assert pending > 100
