# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What a spinlock is on this kernel: where its word is, and what the bits of the word say.

Everything is taken from the kernel's types: ``spinlock_t`` may hold the bare ``arch_spinlock_t``,
the debug members of CONFIG_DEBUG_SPINLOCK, lockdep's map, or (PREEMPT_RT) a sleeping rt_mutex
(include/linux/spinlock_types.h, spinlock_types_raw.h). A word is decoded for arrays of locks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from drgn import Architecture, Program, Type, TypeKind, offsetof, sizeof

from ptinspect.kernel.paging.model import object_or_none
from ptinspect.memory import BoolArray

WordArray = npt.NDArray[np.uint32]
CpuArray = npt.NDArray[np.int32]

#: SPINLOCK_MAGIC (include/linux/spinlock_types_raw.h)
MAGIC = 0xDEAD4EAD
#: RT_MUTEX_HAS_WAITERS (include/linux/rtmutex.h)
RT_HAS_WAITERS = 1

#: Why a word cannot be a lock's; the index into this tuple is what :class:`Words` keeps.
WORD_PROBLEMS = (
    "",
    "the locked byte is none that a lock has",
    "the pending byte is none that a lock has",
    "the owner is no CPU",
    "the last waiter is no CPU",
    "a queue index without a waiter",
    "more waiters than CPUs can be",
    "not the token of a holder",
    "an owner without the locked bit",
    "bits outside the lock's word are set",
)
_LOCKED, _PENDING, _OWNER, _TAIL, _INDEX, _WAITERS, _TOKEN, _UNLOCKED_OWNER, _OUTSIDE = range(1, 10)
#: Beside the word itself: the rest of the slot of an embedded lock.
OUTSIDE_PROBLEM = _OUTSIDE


class Words(NamedTuple):
    """Decoded lock words; arrays of one length, -1 where a CPU is not told."""

    held: BoolArray
    #: Somebody spins and is next (the pending bit of the generic queued lock).
    pending: BoolArray
    #: int32: the holder, where the word names it.
    owner_cpu: CpuArray
    #: int32: the last waiter of the queue.
    tail_cpu: CpuArray
    #: uint8: which of its CPU's queue nodes that waiter uses.
    tail_index: npt.NDArray[np.uint8]
    #: int32: how many wait, where the word counts them (ticket locks), else 0.
    waiting: npt.NDArray[np.int32]
    #: uint8: index into :data:`WORD_PROBLEMS`.
    problem: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class WordFormat:
    """One kind of lock word."""

    name: str
    #: Arrays of words and the number of CPU ids (``nr_cpu_ids``) to what they say.
    decode: Callable[[WordArray, int], Words]


def _words(
    held: BoolArray,
    *,
    pending: BoolArray | None = None,
    owner: npt.NDArray[np.uint32] | None = None,
    tail: npt.NDArray[np.uint32] | None = None,
    index: npt.NDArray[np.uint32] | None = None,
    waiting: npt.NDArray[np.uint32] | None = None,
) -> Words:
    """:param owner: CPU number plus 1, 0 for none; *tail* likewise."""
    count = len(held)
    none = np.zeros(count, np.uint32)
    return Words(
        held=held,
        pending=np.zeros(count, np.bool_) if pending is None else pending,
        owner_cpu=(none if owner is None else owner).astype(np.int32) - 1,
        tail_cpu=(none if tail is None else tail).astype(np.int32) - 1,
        tail_index=(none if index is None else index).astype(np.uint8),
        waiting=(none if waiting is None else waiting).astype(np.int32),
        problem=np.zeros(count, np.uint8),
    )


def _flag(words: Words, where: BoolArray, problem: int) -> None:
    words.problem[where & (words.problem == 0)] = problem


def _bits(words: WordArray, shift: int, width: int) -> WordArray:
    part: WordArray = (words >> np.uint32(shift)) & np.uint32((1 << width) - 1)
    return part


def _queued(pending_bits: int, locked_values: tuple[int, ...]) -> Callable[[WordArray, int], Words]:
    """
    The generic queued lock (include/asm-generic/qspinlock_types.h).

    :param pending_bits: 8, or 1 where there are 16K CPUs or more.
    :param locked_values: What the locked byte can be.
    """

    def decode(words: WordArray, cpus: int) -> Words:
        locked = _bits(words, 0, 8)
        pending = _bits(words, 8, pending_bits)
        index = _bits(words, 8 + pending_bits, 2)
        tail = words >> np.uint32(10 + pending_bits)
        found = _words(locked != 0, pending=pending != 0, tail=tail, index=index)
        _flag(found, ~np.isin(locked, locked_values), _LOCKED)
        _flag(found, pending > 1, _PENDING)
        _flag(found, tail > cpus, _TAIL)
        _flag(found, (tail == 0) & (index != 0), _INDEX)
        return found

    return decode


def _ticket(words: WordArray, cpus: int) -> Words:
    """The generic ticket lock: next ticket above, ticket served below (ticket_spinlock.h)."""
    served, following = _bits(words, 0, 16), _bits(words, 16, 16)
    taken = (following - served) & np.uint32(0xFFFF)
    held = taken != 0
    waiting = np.where(held, taken - np.uint32(1), np.uint32(0))
    found = _words(held, waiting=waiting)
    # A CPU waits at most once in each of four contexts: task, softirq, hardirq, NMI.
    _flag(found, taken > 4 * cpus, _WAITERS)
    return found


def _s390(words: WordArray, cpus: int) -> Words:
    """The word of s390: holder's CPU, steals, last waiter (arch/s390/lib/spinlock.c)."""
    owner, index, tail = _bits(words, 0, 16), _bits(words, 18, 2), _bits(words, 20, 12)
    found = _words(owner != 0, owner=owner, tail=tail, index=index)
    _flag(found, owner > cpus, _OWNER)
    _flag(found, tail > cpus, _TAIL)
    _flag(found, (tail == 0) & (index != 0), _INDEX)
    return found


def _powerpc_queued(words: WordArray, cpus: int) -> Words:
    """The queued lock of powerpc since 6.2 (arch/powerpc/include/asm/qspinlock_types.h)."""
    held = (words & np.uint32(1)) != 0
    cpu, tail = _bits(words, 1, 14), words >> np.uint32(17)
    found = _words(held, owner=np.where(held, cpu + np.uint32(1), np.uint32(0)), tail=tail)
    _flag(found, held & (cpu >= cpus), _OWNER)
    # Unlocking clears the whole lower half (queued_spin_unlock()).
    _flag(found, ~held & (_bits(words, 1, 15) != 0), _UNLOCKED_OWNER)
    _flag(found, tail > cpus, _TAIL)
    return found


def _powerpc_simple(words: WordArray, cpus: int) -> Words:
    """powerpc's simple lock: 0x8000 and the CPU (LOCK_TOKEN in asm/simple_spinlock.h)."""
    held = words != 0
    cpu = _bits(words, 0, 16)
    token = _bits(words, 16, 16) == 0x8000
    found = _words(held, owner=np.where(held & token, cpu + np.uint32(1), np.uint32(0)))
    _flag(found, held & ~token, _TOKEN)
    _flag(found, held & token & (cpu >= cpus), _OWNER)
    return found


def _single_cpu(words: WordArray, _: int) -> Words:
    """The debug lock of a kernel for one CPU: 1 is free (include/linux/spinlock_types_up.h)."""
    found = _words(words == 0)
    _flag(found, words > 1, _LOCKED)
    return found


def cpu_limit(prog: Program) -> int | None:
    """
    Get NR_CPUS, the number of CPUs that this kernel was built for; ``None`` without CONFIG_SMP.

    It is a macro; the length of ``__per_cpu_offset`` in DWARF keeps it.
    """
    offsets = object_or_none(prog, "__per_cpu_offset")
    return None if offsets is None else int(offsets.type_.length or 0)


def cpu_ids(prog: Program) -> int:
    """Get ``nr_cpu_ids``, one more than the highest possible CPU number."""
    ids = object_or_none(prog, "nr_cpu_ids")
    # A macro with the value NR_CPUS in kernels for one CPU (include/linux/cpumask.h).
    return (cpu_limit(prog) or 1) if ids is None else int(ids.value_())


def word_format(prog: Program) -> WordFormat | None:
    """Get the format of ``arch_spinlock_t``; ``None`` if it has no word or an unknown one."""
    type_ = prog.type("arch_spinlock_t").unaliased()
    assert prog.platform is not None
    arch = prog.platform.arch
    if not sizeof(type_):
        return None
    if type_.has_member("slock"):
        if cpu_limit(prog) is None:
            return WordFormat("lock of a kernel for one CPU", _single_cpu)
        return WordFormat("simple lock", _powerpc_simple) if arch == Architecture.PPC64 else None
    if type_.has_member("lock") and arch == Architecture.S390X:
        return WordFormat("s390 lock", _s390)
    if type_.has_member("counter") or (type_.has_member("owner") and type_.has_member("next")):
        # atomic_t: the generic ticket lock up to 6.12 (asm-generic/spinlock_types.h).
        return WordFormat("ticket lock", _ticket)
    if not type_.has_member("val"):
        return None
    if arch == Architecture.PPC64 and type_.member("val").type.unaliased_kind() == TypeKind.INT:
        # An atomic_t before: the generic one.
        return WordFormat("powerpc queued lock", _powerpc_queued)
    return _generic(prog)


#: Where a CPU queues; the second with CONFIG_PARAVIRT_SPINLOCKS (kernel/locking/qspinlock.c).
_QUEUED_FUNCTIONS = ("queued_spin_lock_slowpath", "native_queued_spin_lock_slowpath")


def _generic(prog: Program) -> WordFormat:
    """The queued lock, or the ticket lock that a kernel can use in the same word."""
    key = object_or_none(prog, "qspinlock_key")
    if key is not None:
        # riscv decides at boot (CONFIG_RISCV_COMBO_SPINLOCKS, arch/riscv/kernel/setup.c).
        if not key.key.enabled.counter.value_():
            return WordFormat("ticket lock", _ticket)
    elif not any(_has_symbol(prog, name) for name in _QUEUED_FUNCTIONS):
        return WordFormat("ticket lock", _ticket)
    # _Q_SLOW_VAL, 3, marks a lock whose holder has to wake a virtual CPU (qspinlock_paravirt.h).
    slow = (3,) if _has_symbol(prog, "__pv_queued_spin_lock_slowpath") else ()
    bits = 8 if (cpu_limit(prog) or 1) < 1 << 14 else 1
    return WordFormat("queued lock", _queued(bits, (0, 1, *slow)))


def _has_symbol(prog: Program, name: str) -> bool:
    try:
        prog.symbol(name)
    except LookupError:
        return False
    return True


@dataclass(frozen=True)
class LockType:
    """``spinlock_t`` of one kernel; offsets in bytes from its start, ``None`` if it lacks them."""

    type_name: str
    size: int
    format: WordFormat | None
    word: int | None
    #: CONFIG_DEBUG_SPINLOCK
    magic: int | None = None
    owner_cpu: int | None = None
    #: A task: of CONFIG_DEBUG_SPINLOCK, or of PREEMPT_RT's rt_mutex.
    owner: int | None = None
    #: ``rb_root_cached`` of PREEMPT_RT's waiting tasks.
    waiters: int | None = None
    lockdep: bool = False

    @property
    def sleeps(self) -> bool:
        """Whether it is PREEMPT_RT's lock, which is an rt_mutex."""
        return self.waiters is not None

    @property
    def text(self) -> str:
        """What it is, in words."""
        if self.sleeps:
            parts = ["rt_mutex (PREEMPT_RT)"]
        else:
            parts = ["no word" if self.word is None else "unknown word"]
            if self.format is not None:
                parts = [self.format.name]
        if self.magic is not None:
            parts.append("magic and owner (DEBUG_SPINLOCK)")
        if self.lockdep:
            parts.append("lockdep map")
        return f"{self.type_name} of {self.size} bytes: {', '.join(parts)}"


def lock_type(prog: Program) -> LockType:
    """
    Get what ``spinlock_t`` is on this kernel.

    :raises LookupError: if it is in no debug information, or of a shape that is not known
    """
    try:
        found = prog.cache["ptinspect_lock_type"]
    except KeyError:
        found = prog.cache["ptinspect_lock_type"] = _find_lock_type(prog)
    assert isinstance(found, LockType)
    return found


def _find_lock_type(prog: Program) -> LockType:
    type_ = prog.type("spinlock_t")
    lockdep = _offset(type_, "dep_map") is not None
    base = _offset(type_, "lock")
    if base is not None and _offset(type_, "lock.owner") is not None:
        return LockType(
            type_.type_name(),
            sizeof(type_),
            None,
            None,
            owner=_offset(type_, "lock.owner"),
            waiters=_offset(type_, "lock.waiters"),
            lockdep=lockdep,
        )
    has_word = bool(sizeof(prog.type("arch_spinlock_t")))
    return LockType(
        type_.type_name(),
        sizeof(type_),
        word_format(prog),
        offsetof(type_, "rlock.raw_lock") if has_word else None,
        magic=_offset(type_, "rlock.magic"),
        owner_cpu=_offset(type_, "rlock.owner_cpu"),
        owner=_offset(type_, "rlock.owner"),
        lockdep=lockdep,
    )


def _offset(type_: Type, member: str) -> int | None:
    try:
        return int(offsetof(type_, member))
    except LookupError:
        return None


def word_text(prog: Program, word: int) -> str:
    """
    Say what one lock word means: free, held by whom, waited for by whom.

    :raises LookupError: if ``spinlock_t`` is of a shape that is not known
    """
    shape = lock_type(prog)
    if shape.format is None:
        return "a lock of unknown format"
    words = shape.format.decode(np.array([word], np.uint32), cpu_ids(prog))
    return f"{shape.format.name}, {words_text(words, 0)}"


def words_text(words: Words, row: int) -> str:
    """Say what one of many lock words means."""
    if words.problem[row]:
        return f"impossible: {WORD_PROBLEMS[int(words.problem[row])]}"
    parts = ["held" if words.held[row] else "free"]
    if words.owner_cpu[row] >= 0:
        parts = [f"held by CPU {words.owner_cpu[row]}"]
    if words.pending[row]:
        parts.append("a CPU is next")
    if words.tail_cpu[row] >= 0:
        parts.append(f"CPU {words.tail_cpu[row]} waits last")
    if words.waiting[row]:
        parts.append(f"{words.waiting[row]} wait")
    return ", ".join(parts)


class SplitLocks(NamedTuple):
    """Which tables have locks of their own; otherwise ``mm->page_table_lock`` guards them."""

    pte: bool
    pmd: bool
    #: Why, in words.
    reason: str


#: CONFIG_SPLIT_PTLOCK_CPUS up to 6.11; NR_CPUS >= 4 in mm/Kconfig since.
_SPLIT_FROM = 4


def split_locks(prog: Program) -> SplitLocks:
    """
    Tell whether PTE and PMD tables have locks of their own (USE_SPLIT_PTE_PTLOCKS and its like).

    All 64-bit architectures with a PMD select ARCH_ENABLE_SPLIT_PMD_PTLOCK. With transparent huge
    pages ``mm_struct.pmd_huge_pte`` exists exactly if PMD tables have none
    (include/linux/mm_types.h), and then that decides.
    """
    limit = cpu_limit(prog)
    pte = limit is not None and limit >= _SPLIT_FROM
    why = "no SMP" if limit is None else f"NR_CPUS is {limit}"
    if prog.type("struct mm_struct").has_member("pmd_huge_pte"):
        return SplitLocks(pte, False, f"{why}; mm_struct has pmd_huge_pte")
    return SplitLocks(pte, pte, why)
