# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Page-table locks: which lock guards which level here, and what each lock's word says.

A PTE table and a PMD table of a user mm have a lock of their own in their descriptor (``ptl``), if
the kernel splits its locks; all else is guarded by ``mm->page_table_lock`` (include/linux/mm.h:
pte_lockptr, pmd_lockptr, pud_lockptr). One lock serves all tables in one page: fragments of
powerpc, halves of s390.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Object, Program, TypeKind, cast, offsetof
from drgn.helpers.linux.mm import compound_head, page_to_virt, virt_to_page
from drgn.helpers.linux.slab import find_containing_slab_cache

from ptinspect.kernel.descriptor import (
    byte_order,
    flags_bit,
    native_member_name,
    ptdesc_has_member,
    ptdesc_type,
)
from ptinspect.kernel.paging.model import object_or_none
from ptinspect.kernel.spinlock import (
    MAGIC,
    OUTSIDE_PROBLEM,
    RT_HAS_WAITERS,
    WORD_PROBLEMS,
    LockType,
    SplitLocks,
    Words,
    cpu_ids,
    lock_type,
    split_locks,
)
from ptinspect.memory import AddressArray, BoolArray, ByteArray, read_blocks
from ptinspect.state.lock_queues import CpuTask, LockQueues, running_tasks, task_names
from ptinspect.state.told import Told
from ptinspect.tables.scan import MemmapScan, descriptor_indices
from ptinspect.tables.walk import RowState, Tables

#: Bytes of the slot in the descriptor, whatever is in it.
_SLOT = 8
#: Level of a typed page that no tree reaches.
UNKNOWN_LEVEL = 255
_ALL_ONES = (1 << 64) - 1

#: Why a lock cannot be one; the index into this tuple is what :attr:`Locks.problem` keeps.
LOCK_PROBLEMS = (
    *WORD_PROBLEMS,
    "the pointer to the lock is NULL",
    "the pointer to the lock leads nowhere",
    "the pointer to the lock leads to no object of the cache page->ptl",
    "the lock's magic is wrong",
    "free, but a task is named as its owner",
)
_NULL, _NOWHERE, _FOREIGN, _MAGIC, _STALE_OWNER = range(len(WORD_PROBLEMS), len(LOCK_PROBLEMS))


class LockHome(Enum):
    """Where the lock of a table is."""

    EMBEDDED = "in the descriptor"
    ALLOCATED = "allocated, the descriptor points to it"
    ABSENT = "nowhere: tables have no locks of their own"


class LockKind(IntEnum):
    """Which lock it is."""

    #: The ``ptl`` of a descriptor.
    TABLE = 0
    #: ``page_table_lock`` of an mm.
    MM = 1


class LevelLock(NamedTuple):
    """Which lock guards the entries of the tables of one level."""

    level: str
    user: str
    kernel: str


@dataclass(frozen=True)
class Holding:
    """Who has a lock and who waits for it, as far as the lock and the CPUs tell."""

    #: CPU and task that hold it; several if only plausible.
    holders: tuple[CpuTask, ...]
    #: ``owner`` if the lock names it, ``plausible`` if a CPU runs on the tables that it guards.
    certainty: str
    #: CPUs that wait in the queue, the first in the queue first.
    waiting_cpus: tuple[int, ...]
    #: PREEMPT_RT: tasks that sleep for it.
    waiting_tasks: tuple[str, ...]
    #: How many wait, where only their number is known (ticket locks, the pending bit).
    waiting: int


@dataclass(frozen=True)
class Locks:
    """
    Every lock of a user table and of an mm, decoded: columns, one row for each lock.

    Rows of tables come first, in order of the page frame, then those of mms.
    """

    prog: Program = field(repr=False)
    tables: Tables = field(repr=False)
    home: LockHome
    #: ``None`` if ``spinlock_t`` is of a shape that is not known; *missing* says so.
    type: LockType | None
    split: SplitLocks
    levels: tuple[LevelLock, ...]
    #: uint8, :class:`LockKind`.
    kind: npt.NDArray[np.uint8]
    #: int64, index of the descriptor in the scan; -1 for the lock of an mm.
    descriptor: npt.NDArray[np.int64]
    #: uint64, page frame of the table; 0 for the lock of an mm.
    pfn: AddressArray
    #: uint8, level of the table; :data:`UNKNOWN_LEVEL` if no tree reaches it, or for an mm.
    level: npt.NDArray[np.uint8]
    #: int64, index of the first space that the lock belongs to; -1 if no tree reaches the table.
    space: npt.NDArray[np.int64]
    #: uint64, address of the ``spinlock_t``; 0 if there is none.
    address: AddressArray
    #: bool, whether it could be read.
    readable: BoolArray
    #: uint32, the lock word; 0 where there is none.
    word: npt.NDArray[np.uint32]
    words: Words
    #: uint64, address of the task that the lock names as its owner; 0 for none.
    owner: AddressArray
    #: bool, PREEMPT_RT: tasks sleep for it.
    has_sleepers: BoolArray
    #: uint8, index into :data:`LOCK_PROBLEMS`.
    problem: npt.NDArray[np.uint8]
    #: int64: descriptors of kernel tables whose slot is not 0, though this kernel never uses it.
    kernel_used: npt.NDArray[np.int64]
    missing: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def held(self) -> BoolArray:
        """bool, whether somebody has the lock."""
        return self.words.held

    @property
    def contended(self) -> BoolArray:
        """bool, whether somebody waits for it."""
        words = self.words
        waits: BoolArray = words.pending | (words.tail_cpu >= 0) | (words.waiting > 0)
        return waits | self.has_sleepers

    def notable(self) -> npt.NDArray[np.intp]:
        """Get the rows that are not at rest: contended first, then held, then impossible ones."""
        rank = np.where(self.problem > 0, 1, 0)
        rank = np.where(self.held, 2, rank)
        rank = np.where(self.contended, 3, rank)
        rows = np.flatnonzero(rank)
        return rows[np.argsort(-rank[rows], kind="stable")]

    def states(self) -> npt.NDArray[np.str_]:
        """One word for each row: free, held, contended, impossible, unreadable."""
        names = np.full(len(self), "free", "U10")
        names[self.held] = "held"
        names[self.contended] = "contended"
        names[self.problem > 0] = "impossible"
        names[~self.readable & (self.problem == 0)] = "unreadable"
        return names

    @cached_property
    def running(self) -> dict[int, CpuTask]:
        """What each CPU runs."""
        return running_tasks(self.prog)

    @cached_property
    def _queues(self) -> LockQueues:
        return LockQueues(self.prog)

    def mms_of(self, row: int) -> set[int]:
        """Get the addresses of the mms whose entries a lock guards."""
        spaces = self.tables.spaces
        numbers = {int(self.space[row])} - {-1}
        if self.kind[row] == LockKind.TABLE:
            page = self.tables.address // np.uint64(self.tables.paging.page_bytes)
            numbers |= set(np.unique(self.tables.space[page == self.pfn[row]]).tolist())
        mms = (spaces[number].mm for number in numbers)
        return {mm.address for mm in mms if mm is not None}

    def holding(self, row: int) -> Holding:
        """Find who has a lock and who waits for it."""
        words = self.words
        lock = int(self.address[row]) + (self.type.word or 0 if self.type else 0)
        waiting_cpus: tuple[int, ...] = ()
        if not self.problem[row]:
            tail = int(words.tail_cpu[row])
            waiting_cpus = self._queues.waiters(lock, tail, int(words.tail_index[row]))
        sleepers = tuple(self._sleepers(row)) if self.has_sleepers[row] else ()
        more = int(words.waiting[row]) + int(words.pending[row])
        waiting = more + len(waiting_cpus) + len(sleepers)
        holders, certainty = self._holders(row, waiting_cpus)
        return Holding(holders, certainty, waiting_cpus, sleepers, waiting)

    def _holders(self, row: int, waiting: tuple[int, ...]) -> tuple[tuple[CpuTask, ...], str]:
        if not self.held[row]:
            return (), ""
        cpu = int(self.words.owner_cpu[row])
        if self.owner[row]:
            task = Object(self.prog, "struct task_struct *", int(self.owner[row]))
            try:
                pid, comm = task_names(task)
                mm = int(task.mm.value_())
            except FaultError:
                return (), "owner cannot be read"
            return (CpuTask(cpu, int(task.value_()), pid, comm, mm),), "owner"
        if cpu >= 0 and cpu in self.running:
            return (self.running[cpu],), "owner"
        mms = self.mms_of(row)
        here = (t for t in self.running.values() if t.mm in mms and t.cpu not in waiting)
        holders = tuple(here)
        return holders, "plausible" if holders else ""

    def _sleepers(self, row: int) -> Iterator[str]:
        """Walk the tree of an rt_mutex's waiters; :data:`_MOST_SLEEPERS` of them are enough."""
        prog = self.prog
        assert self.type is not None
        assert self.type.waiters is not None
        waiter = prog.type("struct rt_mutex_waiter")
        # struct rt_waiter_node since 6.1 (kernel/locking/rtmutex_common.h).
        name = "tree.entry" if waiter.has_member("tree") else "tree_entry"
        offset = offsetof(waiter, name)
        root = Object(
            prog, "struct rb_root_cached", address=int(self.address[row]) + self.type.waiters
        )
        left = [root.rb_root.rb_node.value_()]
        seen: set[int] = set()
        try:
            while left and len(seen) < _MOST_SLEEPERS:
                node = left.pop()
                if not node or node in seen:
                    continue
                seen.add(node)
                pid, comm = task_names(Object(prog, "struct rt_mutex_waiter *", node - offset).task)
                yield f"{comm}/{pid}"
                links = Object(prog, "struct rb_node *", node)
                left += [links.rb_left.value_(), links.rb_right.value_()]
        except FaultError:
            return


_MOST_SLEEPERS = 1000


def tell_locks(locks: Locks, pfn: int) -> Iterator[Told]:
    """Say who has the lock of a table and who waits for it."""
    rows = np.flatnonzero((locks.kind == LockKind.TABLE) & (locks.pfn == pfn)).tolist()
    for row in rows:
        if locks.level[row] == UNKNOWN_LEVEL or locks.type is None:
            continue
        where = f"{locks.type.text}, at {int(locks.address[row]):#x}"
        if locks.problem[row]:
            yield Told(f"{where}: no lock: {LOCK_PROBLEMS[int(locks.problem[row])]}", "ptl")
        elif not locks.readable[row]:
            yield Told(f"{where}: it cannot be read", "ptl")
        else:
            yield Told(f"{where}: {_state_text(locks, row)}", "ptl")


def _state_text(locks: Locks, row: int) -> str:
    holding = locks.holding(row)
    text = "held" if locks.held[row] else "free"
    if holding.holders:
        by = " or ".join(f"{task.comm}/{task.pid} (CPU {task.cpu})" for task in holding.holders)
        text += f" by {by}" if holding.certainty == "owner" else f", plausibly by {by}"
    if holding.waiting:
        text += f", {holding.waiting} wait"
    if holding.waiting_cpus:
        text += ": CPU " + ", ".join(map(str, holding.waiting_cpus))
    return text


def lock_home(prog: Program) -> LockHome:
    """Get where the lock of a table is: ALLOC_SPLIT_PTLOCKS in include/linux/mm_types_task.h."""
    if not ptdesc_has_member(prog, "ptl") or not split_locks(prog).pte:
        return LockHome.ABSENT
    member = ptdesc_type(prog).member(native_member_name(prog, "ptl"))
    pointer = member.type.unaliased_kind() == TypeKind.POINTER
    return LockHome.ALLOCATED if pointer else LockHome.EMBEDDED


def read_locks(prog: Program, tables: Tables, scan: MemmapScan) -> Locks:
    """
    Decode the lock of every user PTE and PMD table, of typed pages that no tree reaches, and of
    every mm.

    Locks of kernel tables are left out: kernels with PT_kernel do not initialise them
    (pagetable_pte_ctor in include/linux/mm.h), and before nobody took them.
    """
    missing: list[str] = []
    try:
        shape: LockType | None = lock_type(prog)
    except (LookupError, FaultError) as error:
        shape = None
        missing.append(f"what a spinlock_t is cannot be told: {error}")
    split = split_locks(prog)
    home = lock_home(prog)
    level, space, kernel = _places(tables, scan)
    examined = np.zeros(len(scan.pfns), np.bool_)
    if home is not LockHome.ABSENT:
        user = ~kernel & ((level == 0) | ((level == 1) & split.pmd))
        examined = user | ((level == UNKNOWN_LEVEL) & ~_marked_kernel(prog, scan))
    rows = np.flatnonzero(examined)
    found = _table_locks(prog, scan, rows, level[rows], home, shape)
    mm_spaces = np.array(_mm_spaces(tables), np.int64)
    mm_locks = _mm_locks(prog, tables, mm_spaces, shape)
    both = _Raw(
        np.concatenate((found.address, mm_locks.address)),
        np.concatenate((found.data, mm_locks.data)),
        np.concatenate((found.readable, mm_locks.readable)),
        np.concatenate((found.problem, mm_locks.problem)),
    )
    words, word, owner, sleepers = _decode(prog, shape, both)
    unread = int(np.count_nonzero(~both.readable & (both.problem == 0)))
    if unread:
        missing.append(f"{unread} locks cannot be read")
    if shape is not None and shape.word is not None and shape.format is None:
        missing.append("the lock words are of a format that is not known")
    incomplete = int(np.count_nonzero(tables.state == RowState.UNREADABLE))
    if incomplete:
        missing.append(f"locks of tables below {incomplete} tables that cannot be read")
    return Locks(
        prog=prog,
        tables=tables,
        home=home,
        type=shape,
        split=split,
        levels=tuple(_level_locks(tables, home, split)),
        kind=np.repeat(
            np.array([LockKind.TABLE, LockKind.MM], np.uint8), [len(rows), len(mm_spaces)]
        ),
        descriptor=np.concatenate((rows, np.full(len(mm_spaces), -1, np.int64))),
        pfn=np.concatenate((scan.pfns[rows], np.zeros(len(mm_spaces), np.uint64))),
        level=np.concatenate((level[rows], np.full(len(mm_spaces), UNKNOWN_LEVEL, np.uint8))),
        space=np.concatenate((space[rows], mm_spaces)),
        address=both.address,
        readable=both.readable,
        word=word,
        words=words,
        owner=owner,
        has_sleepers=sleepers,
        problem=both.problem,
        kernel_used=_kernel_used(prog, scan, kernel),
        missing=tuple(missing),
    )


def _places(
    tables: Tables, scan: MemmapScan
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], BoolArray]:
    """By descriptor: level, first space, and whether that is a kernel's."""
    level = np.full(len(scan.pfns), UNKNOWN_LEVEL, np.uint8)
    space = np.full(len(scan.pfns), -1, np.int64)
    there = np.flatnonzero(tables.state <= RowState.UNREADABLE)
    pages = tables.address[there] // np.uint64(tables.paging.page_bytes)
    index = descriptor_indices(scan, pages)
    # Backwards, so that the first row of each is written last.
    there, index = there[index >= 0][::-1], index[index >= 0][::-1]
    level[index] = tables.level[there]
    space[index] = tables.space[there]
    of_kernel = np.array([*(s.kernel for s in tables.spaces), False], np.bool_)
    return level, space, of_kernel[space]


def _marked_kernel(prog: Program, scan: MemmapScan) -> BoolArray:
    bit = flags_bit(prog, "PT_kernel")
    if bit is None:
        return np.zeros(len(scan.pfns), np.bool_)
    marked: BoolArray = (scan.descriptors["pt_flags"] & np.uint64(bit)) != 0
    return marked


def _slots(prog: Program, scan: MemmapScan, rows: npt.NDArray[np.intp]) -> ByteArray:
    """The eight bytes of ``ptl`` of some descriptors."""
    if not len(rows):
        return np.empty((0, _SLOT), np.uint8)
    start = ptdesc_type(prog).member(native_member_name(prog, "ptl")).offset
    size = scan.descriptors.dtype.itemsize
    # A column of words, which NumPy picks from much faster than from one of single bytes.
    words = np.ndarray(len(scan.descriptors), np.uint64, scan.descriptors, start, (size,))
    slots: ByteArray = words[rows].view(np.uint8).reshape(-1, _SLOT)
    return slots


def _kernel_used(prog: Program, scan: MemmapScan, kernel: BoolArray) -> npt.NDArray[np.int64]:
    """Kernel tables whose slot is in use, on kernels that leave it alone (since PT_kernel)."""
    if flags_bit(prog, "PT_kernel") is None or not ptdesc_has_member(prog, "ptl"):
        return np.empty(0, np.int64)
    rows = np.flatnonzero(kernel)
    return rows[_slots(prog, scan, rows).any(axis=1)].astype(np.int64)


class _Raw(NamedTuple):
    """Locks as bytes, not yet decoded."""

    address: AddressArray
    data: ByteArray
    readable: BoolArray
    problem: npt.NDArray[np.uint8]


def _no_locks(count: int, size: int) -> _Raw:
    return _Raw(
        np.zeros(count, np.uint64),
        np.zeros((count, size), np.uint8),
        np.ones(count, np.bool_),
        np.zeros(count, np.uint8),
    )


def _table_locks(
    prog: Program,
    scan: MemmapScan,
    rows: npt.NDArray[np.intp],
    level: npt.NDArray[np.uint8],
    home: LockHome,
    shape: LockType | None,
) -> _Raw:
    locks = _no_locks(len(rows), shape.size if shape is not None else 0)
    if shape is None or home is LockHome.ABSENT:
        return locks
    slots = _slots(prog, scan, rows)
    if home is LockHome.EMBEDDED:
        start = ptdesc_type(prog).member(native_member_name(prog, "ptl")).offset
        locks.address[:] = scan.addresses[rows] + np.uint64(start)
        locks.data[:] = slots[:, : shape.size]
        locks.problem[slots[:, shape.size :].any(axis=1)] = OUTSIDE_PROBLEM
        return locks
    pointers = np.ascontiguousarray(slots).view(f"{byte_order(prog)}u8").reshape(-1)
    locks.address[:] = pointers
    known = level != UNKNOWN_LEVEL
    locks.problem[known & (pointers == 0)] = _NULL
    there = np.flatnonzero(pointers)
    blocks = _read_locks(prog, locks.address[there], shape.size)
    locks.data[there] = blocks.data
    foreign = there[_outside_cache(prog, locks.address[there])]
    locks.problem[foreign] = _FOREIGN
    # Memory of the cache that a dump lacks is missing; an address that is no memory is garbage.
    gone = there[~blocks.readable]
    locks.readable[gone] = False
    locks.problem[gone[locks.problem[gone] == _FOREIGN]] = _NOWHERE
    return locks


class _Block(NamedTuple):
    data: ByteArray
    readable: BoolArray


def _read_locks(prog: Program, addresses: AddressArray, size: int) -> _Block:
    # An address within the last bytes of the address space cannot be one.
    possible = np.flatnonzero(addresses <= np.uint64(_ALL_ONES - size))
    data = np.zeros((len(addresses), size), np.uint8)
    readable = np.zeros(len(addresses), np.bool_)
    blocks = read_blocks(prog, addresses[possible], size, physical=False)
    data[possible], readable[possible] = blocks.data, blocks.readable
    return _Block(data, readable)


def _outside_cache(prog: Program, addresses: AddressArray) -> BoolArray:
    """Which addresses are not those of objects of the cache that the locks come from."""
    # static in mm/memory.c, if locks are allocated.
    cache = object_or_none(prog, "page_ptl_cachep")
    if cache is None:
        return np.zeros(len(addresses), np.bool_)
    page = np.uint64(1 << int(prog["PAGE_SHIFT"].value_()))
    cache = cache.read_()
    size = np.uint64(cache.size.value_())
    try:
        padding = cache.red_left_pad.value_()
    except AttributeError:
        # Only with CONFIG_SLUB_DEBUG.
        padding = 0
    pages, member = np.unique(addresses // page, return_inverse=True)
    bases = [_slab_base(prog, first * int(page), cache) for first in pages.tolist()]
    base = np.array([0 if b is None else b + padding for b in bases], np.uint64)[member.reshape(-1)]
    outside: BoolArray = (base == 0) | ((addresses - base) % size != 0)
    return outside


def _slab_base(prog: Program, address: int, cache: Object) -> int | None:
    """Get the start of the slab of a cache in which an address lies; ``None`` if in none."""
    try:
        if find_containing_slab_cache(prog, address) != cache:
            return None
        head = compound_head(virt_to_page(prog, address))
        return int(page_to_virt(cast("struct page *", head)).value_())
    except (FaultError, LookupError, ValueError, OverflowError):
        return None


def _mm_spaces(tables: Tables) -> list[int]:
    """One space for each mm."""
    first: dict[int, int] = {}
    for number, space in enumerate(tables.spaces):
        if space.mm is not None:
            first.setdefault(space.mm.address, number)
    return list(first.values())


def _mm_locks(
    prog: Program, tables: Tables, spaces: npt.NDArray[np.int64], shape: LockType | None
) -> _Raw:
    locks = _no_locks(len(spaces), shape.size if shape is not None else 0)
    if shape is None:
        return locks
    offset = offsetof(prog.type("struct mm_struct"), "page_table_lock")
    mms = (tables.spaces[number].mm for number in spaces.tolist())
    locks.address[:] = [mm.address + offset for mm in mms if mm is not None]
    if shape.size:
        block = _read_locks(prog, locks.address, shape.size)
        locks.data[:], locks.readable[:] = block
    return locks


def _decode(
    prog: Program, shape: LockType | None, locks: _Raw
) -> tuple[Words, npt.NDArray[np.uint32], AddressArray, BoolArray]:
    """Decode bytes of locks; problems are added to those that are known."""
    count = len(locks.address)
    word = np.zeros(count, np.uint32)
    owner = np.zeros(count, np.uint64)
    sleepers = np.zeros(count, np.bool_)
    none = np.full(count, -1, np.int32)
    words = Words(
        held=np.zeros(count, np.bool_),
        pending=np.zeros(count, np.bool_),
        owner_cpu=none,
        tail_cpu=none,
        tail_index=np.zeros(count, np.uint8),
        waiting=np.zeros(count, np.int32),
        problem=np.zeros(count, np.uint8),
    )
    if shape is None:
        return words, word, owner, sleepers
    order = byte_order(prog)
    there = locks.readable & (locks.problem == 0) & (locks.address != 0)
    if shape.word is not None:
        word = _column(locks.data, shape.word, f"{order}u4")
        if shape.format is not None:
            words = shape.format.decode(word, cpu_ids(prog))
    if shape.owner is not None:
        owner = _column(locks.data, shape.owner, f"{order}u8")
    if shape.sleeps:
        sleepers = (owner & np.uint64(RT_HAS_WAITERS)) != 0
        owner &= ~np.uint64(RT_HAS_WAITERS)
        words = words._replace(held=owner != 0)
    elif shape.owner is not None:
        # SPINLOCK_OWNER_INIT
        owner[owner == np.uint64(_ALL_ONES)] = 0
    problem = np.where(there, words.problem, 0)
    if shape.magic is not None:
        wrong = _column(locks.data, shape.magic, f"{order}u4") != MAGIC
        problem[there & wrong] = _MAGIC
        # The owner is written after the lock was taken and cleared before it is given back
        # (kernel/locking/spinlock_debug.c), so that a lock without one may be held for a moment.
        problem[there & (problem == 0) & ~words.held & (owner != 0)] = _STALE_OWNER
    if shape.owner_cpu is not None:
        named = _column(locks.data, shape.owner_cpu, f"{order}u4").view(np.int32)
        words = words._replace(owner_cpu=np.where(words.held & (owner != 0), named, -1))
    locks.problem[problem > 0] = problem[problem > 0]
    # What is no lock is neither held nor waited for.
    quiet = ~there | (locks.problem > 0)
    for column in (words.held, words.pending, sleepers):
        column[quiet] = False
    for cpus in (words.owner_cpu, words.tail_cpu):
        cpus[quiet] = -1
    words.waiting[quiet] = 0
    owner[quiet] = 0
    return words, word, owner, sleepers


def _column(data: ByteArray, offset: int, dtype: str) -> npt.NDArray[np.unsignedinteger]:
    size = np.dtype(dtype).itemsize
    part = np.ascontiguousarray(data[:, offset : offset + size]).view(dtype).reshape(-1)
    return part.astype(part.dtype.newbyteorder("="))


def _level_locks(tables: Tables, home: LockHome, split: SplitLocks) -> Iterator[LevelLock]:
    for number, level in enumerate(tables.paging.levels):
        own = home is not LockHome.ABSENT and (number == 0 or (number == 1 and split.pmd))
        user = "ptl of the table's descriptor" if own else "page_table_lock of the mm"
        # vmap and its like change entries without any (mm/vmalloc.c).
        yield LevelLock(level.name, user, "page_table_lock of init_mm, where one is taken")
