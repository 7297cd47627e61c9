# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Threads that all want the lock of one table: who has it, who waits, on kinds of locks."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from drgn import Object
from drgn.helpers.linux.rbtree import rbtree_inorder_for_each
from resting import Stock, busy_guest

from ptinspect.census import Census, take_census
from ptinspect.state.locks import Holding, LockHome, Locks
from ptinspect.tables.lookup import walk_address
from ptinspect.target import open_target

pytestmark = pytest.mark.guest

CPUS = 4
MOST_PAUSES = 40
WANTED = 5

KERNELS = {
    # Under a hypervisor x86 does not queue at all (virt_spin_lock()).
    "queued lock": (Stock("trixie", "x86_64", "6.12"), ("-cpu", "max,-hypervisor")),
    "powerpc queued lock": (Stock("bookworm-backports", "ppc64le", "6.12"), ()),
    "ticket lock": (Stock("forky", "riscv64", "7.2"), ()),
    "rt_mutex": (Stock("trixie", "x86_64", "6.12", flavour="rt-amd64"), ()),
}


@pytest.mark.parametrize("kind", list(KERNELS))
def test_a_contended_lock(kind: str) -> None:
    stock, extra = KERNELS[kind]
    seen: list[Holding] = []
    append = f"lab_quiet=1 lab_contend={CPUS}"
    with busy_guest(stock, append, cpus=CPUS, extra=extra, text="@@begun") as running:
        (said,) = re.findall(r"@@contended (0x[0-9a-f]+)\n", running.guest.console())
        address = int(said, 16)
        with open_target(running.watched) as target:
            for _ in range(MOST_PAUSES):
                time.sleep(0.2)
                running.guest.stop()
                try:
                    census = take_census(target.prog, leaf_counts=False)
                    locks = census.stories.locks
                    holding = the_lock(census, locks, address, kind)
                finally:
                    running.guest.cont()
                if holding is not None:
                    seen.append(holding)
                if enough(kind, seen):
                    break
    assert enough(kind, seen), seen


def enough(kind: str, seen: list[Holding]) -> bool:
    """Whether the lock was seen often enough, with all that its kind can tell."""
    if sum(holding.waiting > 1 for holding in seen) < WANTED:
        return False
    if kind == "rt_mutex":
        return any(held.certainty == "owner" and len(held.waiting_tasks) > 1 for held in seen)
    if kind == "powerpc queued lock":
        return any(held.certainty == "owner" and len(held.waiting_cpus) > 1 for held in seen)
    return kind == "ticket lock" or any(len(held.waiting_cpus) > 1 for held in seen)


def the_lock(census: Census, locks: Locks, address: int, kind: str) -> Holding | None:
    """Check what is told of the lock that the threads want, if anybody has or wants it now."""
    assert locks.type is not None
    if kind == "rt_mutex":
        assert locks.type.sleeps
        assert locks.home is LockHome.ALLOCATED
    else:
        assert locks.type.format is not None
        assert locks.type.format.name == kind
    assert not locks.problem.any()
    running = locks.running
    (space,) = (
        s for s in census.tables.spaces if s.tasks and s.tasks[0].pid == 1 and s.mm is not None
    )
    steps = walk_address(locks.prog, census.paging, space.root, address).steps
    pfn = steps[-1].table // census.paging.page_bytes
    row = int(np.flatnonzero(locks.pfn == pfn)[0])
    if row not in locks.notable().tolist():
        return None
    holding = locks.holding(row)
    assert census.tables.spaces[int(locks.space[row])] is space
    # Nobody is told twice, and all of them are threads of that process.
    waiting = holding.waiting_cpus
    assert len(set(waiting)) == len(waiting)
    assert holding.waiting <= CPUS
    for cpu in waiting:
        assert running[cpu].comm == "contend"
    for task in holding.holders:
        assert task.comm == "contend"
        assert task.cpu not in waiting
    word = int(locks.word[row])
    if kind == "queued lock":
        assert holding.waiting == len(waiting) + (word >> 8 & 1)
        assert (waiting[-1] if waiting else -1) == (word >> 18) - 1
        assert holding.certainty in ("", "plausible")
        # Whoever is neither in the queue nor next has it.
        assert len(holding.holders) <= CPUS - len(waiting)
    elif kind == "powerpc queued lock":
        assert (waiting[-1] if waiting else -1) == (word >> 17) - 1
        if word & 1:
            assert holding.certainty == "owner"
            assert holding.holders[0].cpu == word >> 1 & 0x3FFF
    elif kind == "rt_mutex":
        lock = Object(locks.prog, "spinlock_t", address=int(locks.address[row])).lock
        owner = lock.owner.value_() & ~1
        assert [task.task for task in holding.holders] == ([owner] if owner else [])
        assert holding.waiting == len(holding.waiting_tasks)
        nodes = rbtree_inorder_for_each(lock.waiters.rb_root)
        assert sum(1 for _ in nodes) == holding.waiting
        assert all(task.startswith("contend/") for task in holding.waiting_tasks)
    else:
        assert holding.waiting == ((word >> 16) - word & 0xFFFF) - 1
    return holding
