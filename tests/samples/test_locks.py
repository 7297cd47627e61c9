# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Page-table locks against plain drgn; words that a lock can have, and words that none has."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
from corrupt import Answer, ask
from drgn import Object, TypeKind
from drgn.helpers.linux.mm import pfn_to_page
from drgn.helpers.linux.percpu import per_cpu
from drgn.helpers.linux.sched import cpu_curr
from opened import Sample
from overlay import Overlay

from ptinspect import page_ptdesc, ptdesc_member
from ptinspect.census import UNKNOWN_LEVEL, take_census
from ptinspect.faces.locks import locks_report
from ptinspect.kernel.spinlock import MAGIC
from ptinspect.state.lock_queues import CpuTask
from ptinspect.state.locks import LockHome, LockKind, Locks


def locks_of(sample: Sample) -> Locks:
    return take_census(sample.prog, leaf_counts=False).stories.locks


def lock_at(sample: Sample, pfn: int) -> Object:
    """The spinlock_t of a page, as the kernel's ptlock_ptr() finds it."""
    ptl = ptdesc_member(page_ptdesc(pfn_to_page(sample.prog, pfn)), "ptl")
    return ptl[0] if ptl.type_.unaliased_kind() == TypeKind.POINTER else ptl


def word_of(lock: Object) -> Object:
    """The integer in the arch_spinlock_t, as a reference."""
    raw = lock.rlock.raw_lock
    for name in ("lock", "val", "counter"):
        try:
            raw = raw.member_(name)
        except (LookupError, TypeError):
            continue
    return raw


def test_what_a_lock_is(sample: Sample) -> None:
    locks = locks_of(sample)
    assert locks.type is not None
    pointer = sample.name.endswith("lockdep")
    assert locks.home is (LockHome.ALLOCATED if pointer else LockHome.EMBEDDED)
    assert locks.type.lockdep == (locks.type.magic is not None) == pointer
    assert locks.split.pte
    assert locks.split.pmd
    names = {"s390x": "s390 lock", "ppc64le": "powerpc queued lock"}
    assert locks.type.format is not None
    assert locks.type.format.name == names.get(sample.name.split("-")[0], "queued lock")
    guards = {level.level: level.user for level in locks.levels}
    assert "ptl" in guards["PTE"]
    assert "ptl" in guards["PMD"]
    assert guards["PUD"] == guards["PGD"] == "page_table_lock of the mm"
    assert locks.missing == ()
    assert not len(locks.kernel_used)


def test_every_lock_is_as_plain_drgn_reads_it(sample: Sample) -> None:
    census = take_census(sample.prog, leaf_counts=False)
    locks = census.stories.locks
    kernel = np.array([*(space.kernel for space in locks.tables.spaces), False])
    user = (census.level <= 1) & ~kernel[census.first_spaces()]
    assert locks.type is not None
    # A free ticket lock keeps the number of its last ticket.
    ticket = locks.type.format is not None and locks.type.format.name == "ticket lock"
    tables = locks.kind == LockKind.TABLE
    known = tables & (locks.level != UNKNOWN_LEVEL)
    assert locks.pfn[known].tolist() == census.scan.pfns[user].tolist()
    for row in np.flatnonzero(known).tolist():
        lock = lock_at(sample, int(locks.pfn[row]))
        assert lock.address_ == locks.address[row]
        assert word_of(lock).value_() == locks.word[row]
        assert ticket or not locks.word[row]
        if locks.type.magic is not None:
            assert lock.rlock.magic.value_() == MAGIC
            assert lock.rlock.owner.value_() == (1 << 64) - 1
    mms = {space.mm.address for space in locks.tables.spaces if space.mm is not None}
    assert len(mms) == np.count_nonzero(~tables)
    for row in np.flatnonzero(~tables).tolist():
        (mm,) = locks.mms_of(row)
        lock = Object(sample.prog, "struct mm_struct *", mm).page_table_lock
        assert lock.address_ == locks.address[row]
        assert word_of(lock).value_() == locks.word[row]
        assert ticket or not locks.word[row]
    assert set(locks.states().tolist()) == {"free"}


# Words laid over


def answer(sample: Sample) -> Answer:
    return ask(sample.prog, lambda census: locks_report(census, "x", racing=False))


def a_table(sample: Sample, level: int = 0) -> int:
    """Page frame of a user table."""
    locks = locks_of(sample)
    return int(locks.pfn[np.flatnonzero(locks.level == level)[3]])


def row_of(locks: Locks, pfn: int) -> int:
    return int(np.flatnonzero(locks.pfn == pfn)[0])


def held_by(sample: Sample, cpu: int) -> int:
    """The word of a lock that a CPU has."""
    arch = sample.name.split("-")[0]
    return {"s390x": cpu + 1, "ppc64le": 1 | cpu << 1}.get(arch, 1)


@pytest.mark.parametrize("level", [0, 1])
def test_a_lock_that_a_cpu_has(sample: Sample, level: int) -> None:
    pfn = a_table(sample, level)
    with Overlay(sample.prog).value_of(word_of(lock_at(sample, pfn)), held_by(sample, 1)):
        found = answer(sample)
        locks = found.census.stories.locks
        row = row_of(locks, pfn)
        holding = locks.holding(row)
    assert found.status == 0
    assert locks.notable().tolist() == [row]
    assert "held" in found.line_with("ptl", f"{pfn:#x}")
    task = cpu_curr(sample.prog, 1)
    if sample.name.startswith(("s390x", "ppc64le")):
        here = CpuTask(1, task.value_(), task.pid.value_(), "swapper/1", 0)
        assert (holding.holders, holding.certainty) == ((here,), "owner")
    else:
        # Both CPUs are idle: no task runs on this mm.
        assert (holding.holders, holding.certainty) == ((), "")
    assert holding.waiting == 0


def test_a_lock_that_is_waited_for(sample: Sample) -> None:
    pfn, arch = a_table(sample), sample.name.split("-")[0]
    tail = {"s390x": 2 << 20, "ppc64le": 2 << 17}.get(arch, 2 << 18 | 1 << 8)
    word = held_by(sample, 0) | tail
    other = a_table(sample, 1)
    overlay = Overlay(sample.prog)
    with (
        overlay.value_of(word_of(lock_at(sample, pfn)), word),
        overlay.value_of(word_of(lock_at(sample, other)), held_by(sample, 0)),
    ):
        found = answer(sample)
        locks = found.census.stories.locks
        row = row_of(locks, pfn)
        holding = locks.holding(row)
    # Contended first.
    assert locks.notable().tolist() == [row, row_of(locks, other)]
    assert holding.waiting_cpus == (1,)
    pending = 1 if arch not in ("s390x", "ppc64le") else 0
    assert holding.waiting == 1 + pending
    assert "CPU 1" in found.line_with(f"{pfn:#x}", "contended")


def test_a_queue(sample: Sample) -> None:
    """Two CPUs in the queue, the second one named by the word, the first by its node only."""
    pfn, arch = a_table(sample), sample.name.split("-")[0]
    lock = word_of(lock_at(sample, pfn))
    overlay = Overlay(sample.prog)
    with ExitStack() as damage:
        if arch == "s390x":
            nodes = [per_cpu(sample.prog["spin_wait"], cpu) for cpu in (0, 1)]
            damage.enter_context(overlay.value_of(nodes[1][0].prev, nodes[0][0].address_of_()))
            word = 2 << 20
        elif arch == "ppc64le":
            for cpu in (0, 1):
                nodes = per_cpu(sample.prog["qnodes"], cpu)
                damage.enter_context(overlay.value_of(nodes.count, 1))
                damage.enter_context(overlay.value_of(nodes.nodes[0].lock, lock.address_))
            word = 2 << 17
        else:
            nodes = [per_cpu(sample.prog["qnodes"], cpu) for cpu in (0, 1)]
            for node in nodes:
                damage.enter_context(overlay.value_of(node[0].mcs.count, 1))
            following = nodes[1][0].mcs.address_of_()
            damage.enter_context(overlay.value_of(nodes[0][0].mcs.next, following))
            word = 2 << 18
        damage.enter_context(overlay.value_of(lock, word))
        locks = locks_of(sample)
        holding = locks.holding(row_of(locks, pfn))
    assert holding.waiting_cpus == (0, 1)
    assert holding.holders == ()


def test_a_queue_that_bites_its_tail(sample: Sample) -> None:
    """Nodes in a loop: the walk ends."""
    if sample.name.startswith("ppc64le"):
        pytest.skip("its nodes are not followed, they name their lock")
    pfn = a_table(sample)
    s390 = sample.name.startswith("s390x")
    overlay = Overlay(sample.prog)
    with ExitStack() as damage:
        nodes = [per_cpu(sample.prog["spin_wait" if s390 else "qnodes"], cpu) for cpu in (0, 1)]
        for node, other in (nodes, nodes[::-1]):
            if s390:
                damage.enter_context(overlay.value_of(node[0].prev, other[0].address_of_()))
                continue
            following = other[0].mcs.address_of_()
            damage.enter_context(overlay.value_of(node[0].mcs.count, 1))
            damage.enter_context(overlay.value_of(node[0].mcs.next, following))
        word = word_of(lock_at(sample, pfn))
        damage.enter_context(overlay.value_of(word, 2 << (20 if s390 else 18)))
        locks = locks_of(sample)
        holding = locks.holding(row_of(locks, pfn))
    assert sorted(holding.waiting_cpus) == [0, 1]


@pytest.mark.parametrize("level", [0, 1])
def test_a_word_that_is_none(sample: Sample, level: int) -> None:
    pfn = a_table(sample, level)
    with Overlay(sample.prog).value_of(word_of(lock_at(sample, pfn)), 0x6B6B6B6B):
        found = answer(sample)
    assert found.status == 1
    line = found.line_with("FINDING", f"ptl of page {pfn:#x} is no lock")
    assert "word 0x6b6b6b6b" in line
    assert len(found.report.findings) == 1
    assert answer(sample).status == 0


def test_a_slot_with_more_than_a_lock(sample: Sample) -> None:
    """Another user of the slot, a pointer for example, reaches beyond the lock."""
    if sample.name.endswith("lockdep"):
        pytest.skip("here the slot is a pointer")
    pfn = a_table(sample)
    lock = lock_at(sample, pfn)
    assert lock.address_ is not None
    with Overlay(sample.prog).bytes_at(lock.address_ + 4, b"\1\0\0\0"):
        found = answer(sample)
    assert found.status == 1
    assert "bits outside the lock's word" in found.line_with("FINDING", f"page {pfn:#x}")


def test_garbage_in_an_mms_lock(sample: Sample) -> None:
    locks = locks_of(sample)
    space = next(s for s in locks.tables.spaces if s.tasks and s.tasks[0].comm == "sparse")
    assert space.mm is not None
    lock = space.mm.object(sample.prog).page_table_lock
    with Overlay(sample.prog).value_of(word_of(lock), 0x6B6B6B6B):
        found = answer(sample)
    assert found.status == 1
    found.line_with("FINDING", f"page_table_lock of {space.name} is no lock")


def test_many_words_that_are_none(sample: Sample) -> None:
    """The answer stays short."""
    locks = locks_of(sample)
    overlay = Overlay(sample.prog)
    pfns = locks.pfn[locks.level == 0].tolist()[:30]
    words = [word_of(lock_at(sample, pfn)) for pfn in pfns]
    places = [overlay.value_of(word, 0x6B6B6B6B) for word in words]
    for place in places:
        place.__enter__()
    try:
        found = answer(sample)
    finally:
        for place in reversed(places):
            place.__exit__(None, None, None)
    assert found.status == 1
    if len(pfns) > 20:
        assert len(found.report.findings) == 21
        assert f"{len(pfns) - 20} more" in found.report.findings[-1]


# Locks that are allocated


@pytest.fixture
def allocated(sample: Sample) -> Sample:
    if not sample.name.endswith("lockdep"):
        pytest.skip("the locks of this kernel are in the descriptors")
    return sample


@pytest.mark.parametrize(
    ("pointer", "problem"),
    [
        (0, "is NULL"),
        (0x1234, "leads nowhere"),
        (0xFFFFFFFFFFFFFFF8, "leads nowhere"),
        (0x6B6B6B6B6B6B6B6B, "leads nowhere"),
        ("init_task", "leads to no object of the cache"),
        ("inside", "leads to no object of the cache"),
    ],
)
def test_a_pointer_that_is_none(allocated: Sample, pointer: int | str, problem: str) -> None:
    sample = allocated
    pfn = a_table(sample)
    ptl = ptdesc_member(page_ptdesc(pfn_to_page(sample.prog, pfn)), "ptl")
    if pointer == "init_task":
        pointer = int(sample.prog["init_task"].address_of_())
    elif pointer == "inside":
        pointer = ptl.value_() + 8
    with Overlay(sample.prog).value_of(ptl, pointer):
        found = answer(sample)
    assert problem in found.line_with("FINDING", f"page {pfn:#x}")
    # Garbage is wrong, not missing.
    assert found.status == 1


def test_the_members_for_debugging(allocated: Sample) -> None:
    sample = allocated
    pfn = a_table(sample)
    lock = lock_at(sample, pfn).rlock
    overlay = Overlay(sample.prog)
    with overlay.value_of(lock.magic, 0x1234):
        found = answer(sample)
    assert "magic is wrong" in found.line_with("FINDING", f"page {pfn:#x}")
    task = sample.prog["init_task"].address_of_()
    with overlay.value_of(lock.owner, task):
        found = answer(sample)
    assert "free, but a task is named" in found.line_with("FINDING", f"page {pfn:#x}")
    with (
        overlay.value_of(word_of(lock_at(sample, pfn)), 1),
        overlay.value_of(lock.owner, task),
        overlay.value_of(lock.owner_cpu, 1),
    ):
        found = answer(sample)
        locks = found.census.stories.locks
        holding = locks.holding(row_of(locks, pfn))
    assert found.status == 0
    assert holding.certainty == "owner"
    assert holding.holders == (CpuTask(1, task.value_(), 0, "swapper/0", 0),)
    assert "swapper/0/0 on CPU 1" in found.line_with("held", f"{pfn:#x}")
