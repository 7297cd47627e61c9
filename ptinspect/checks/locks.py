# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The locks of page tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ptinspect.checks.context import Context
from ptinspect.checks.model import Finding, NotApplicableError, Severity, Tally
from ptinspect.checks.registry import invariant
from ptinspect.kernel.descriptor import flags_bit
from ptinspect.kernel.spinlock import WORD_PROBLEMS
from ptinspect.state.locks import LOCK_PROBLEMS, LockHome, Locks


def _locks(context: Context) -> Locks:
    story = context.census.stories.locks
    if story.home is LockHome.ABSENT:
        raise NotApplicableError("this kernel has no lock for each table")
    return story


def _lock_finding(context: Context, story: Locks, row: int, message: str) -> Finding:
    index = int(story.descriptor[row])
    space = int(story.space[row])
    word = int(story.word[row])
    lock = int(story.address[row])
    if index >= 0:
        return context.descriptor_finding(index, message, lock_word=word, lock=lock)
    return context.mm_finding(space, f"page_table_lock: {message}", lock_word=word, lock=lock)


@invariant(
    "ptl-legal",
    severity=Severity.CORRUPTION,
    applies="the lock of each user table that has one, and page_table_lock of each mm",
    source="queued spinlocks (kernel/locking/qspinlock.c), arch/s390/lib/spinlock.c, "
    "arch/powerpc/lib/qspinlock.c; ALLOC_SPLIT_PTLOCKS (include/linux/mm_types_task.h)",
    false_positives="none known",
    breaks="a write over ptl, a lock used after it was freed",
)
def ptl_legal(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The lock of a table is in a state that a lock can be in.

    A CPU that takes it waits for ever, or takes it while another one has it.
    """
    story = _locks(context)
    for what in story.missing:
        tally.miss(what)
    tally.examine(len(story))
    for row in np.flatnonzero(story.problem).tolist():
        problem = LOCK_PROBLEMS[int(story.problem[row])]
        if int(story.problem[row]) >= len(WORD_PROBLEMS) and not context.whole:
            # An allocated lock: what it leads to may be missing.
            tally.miss(f"a lock could not be followed: {problem}")
            continue
        yield _lock_finding(context, story, row, f"lock: {problem}")


@invariant(
    "ptl-has-holder",
    severity=Severity.SUSPICIOUS,
    applies="table locks, where locks do not sleep (no PREEMPT_RT)",
    source="spin_lock() keeps the holder on its CPU until spin_unlock()",
    false_positives="live: the CPU went on between two reads",
    breaks="a path that returned without unlocking",
)
def ptl_has_holder(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    While a table's lock is held, some CPU does something.

    If the CPU that it names is idle, or if all are, nobody will ever release it.
    """
    story = _locks(context)
    if story.type is None or story.owner.any() or story.has_sleepers.any():
        raise NotApplicableError("locks sleep here, or are of an unknown shape")
    running = story.running
    idle = {cpu for cpu, task in running.items() if task.pid == 0}
    tally.examine(len(story))
    for row in np.flatnonzero(story.held & (story.problem == 0)).tolist():
        owner = int(story.words.owner_cpu[row])
        stuck = owner in idle if owner >= 0 else bool(running) and len(idle) == len(running)
        if stuck:
            who = f"CPU {owner}, which is idle" if owner >= 0 else "nobody: all CPUs are idle"
            yield _lock_finding(context, story, row, f"its lock is held by {who}")


@invariant(
    "ptl-kernel-unused",
    severity=Severity.SUSPICIOUS,
    applies="tables of the kernel; kernels with PT_kernel (7.x)",
    source="pagetable_pte_ctor(), pagetable_pmd_ctor() (include/linux/mm.h): no lock for init_mm",
    false_positives="none known",
    breaks="a kernel table treated as one of a process",
)
def ptl_kernel_unused(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The lock of a kernel table is never set up, so its place is zero.

    Whoever took it would have taken a lock that is none.
    """
    story = _locks(context)
    if flags_bit(context.prog, "PT_kernel") is None:
        raise NotApplicableError("this kernel gives the kernel's tables locks too")
    kernel = context.descriptors_of(context.kernel_space)
    tally.examine(len(kernel))
    for index in story.kernel_used.tolist():
        slot = context.columns("ptl")[index] if context.locks_embedded else 0
        yield context.descriptor_finding(
            index, "a kernel table has a lock that somebody used", ptl=int(slot)
        )
