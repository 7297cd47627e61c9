# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Who waits for a spinlock: the queue nodes that every CPU has, and what runs on each CPU.

A lock word names its last waiter only. The others are found through the nodes, which lie in per-CPU
variables: ``qnodes`` (kernel/locking/qspinlock.c, arch/powerpc/lib/qspinlock.c) and s390's
``spin_wait`` (arch/s390/lib/spinlock.c).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from drgn import FaultError, Object, Program, TypeKind
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.percpu import per_cpu
from drgn.helpers.linux.sched import cpu_curr

from ptinspect.kernel.paging.model import object_or_none

#: What reading nodes of a damaged or filtered target raises.
_BROKEN = (FaultError, LookupError, AttributeError, TypeError, ValueError)


class CpuTask(NamedTuple):
    """The task that a CPU runs."""

    cpu: int
    #: Address of its ``struct task_struct``.
    task: int
    pid: int
    comm: str
    #: Address of the task's own mm; 0 for none.
    mm: int


def task_names(task: Object) -> tuple[int, str]:
    """
    Get pid and name of a task.

    :param task: ``struct task_struct *``
    :raises FaultError: if it cannot be read
    """
    return int(task.pid.value_()), task.comm.string_().decode("utf-8", "backslashreplace")


def running_tasks(prog: Program) -> dict[int, CpuTask]:
    """Get what each CPU runs, by CPU; a CPU whose task cannot be read is left out."""
    running = {}
    for cpu in _online_cpus(prog):
        try:
            task = cpu_curr(prog, cpu)
            pid, comm = task_names(task)
            mm = task.mm.value_()
        except _BROKEN:
            continue
        running[cpu] = CpuTask(cpu, int(task.value_()), pid, comm, int(mm))
    return running


def _online_cpus(prog: Program) -> list[int]:
    try:
        return list(for_each_online_cpu(prog))
    except _BROKEN:
        return []


class _Node(NamedTuple):
    cpu: int
    #: Address of the node that is next to this one, on the side of the queue's head.
    ahead: int
    #: Address of the lock, where nodes keep it.
    lock: int


class LockQueues:
    """The queue nodes of every CPU that are in use, read once."""

    def __init__(self, prog: Program) -> None:
        #: By address.
        self._nodes: dict[int, _Node] = {}
        self._by_place: dict[tuple[int, int], int] = {}
        nodes = object_or_none(prog, "qnodes")
        waits = object_or_none(prog, "spin_wait")
        self._keeps_lock = False
        for cpu in _online_cpus(prog):
            try:
                if waits is not None:
                    self._add(cpu, _s390_nodes(per_cpu(waits, cpu)))
                elif nodes is not None and nodes.type_.unaliased_kind() == TypeKind.STRUCT:
                    self._keeps_lock = True
                    self._add(cpu, _powerpc_nodes(per_cpu(nodes, cpu)))
                elif nodes is not None:
                    self._add(cpu, _generic_nodes(per_cpu(nodes, cpu)))
            except _BROKEN:
                continue
        if nodes is not None and not self._keeps_lock:
            self._turn_around()

    def _add(self, cpu: int, nodes: Iterator[tuple[int, int, int, int]]) -> None:
        for address, index, ahead, lock in nodes:
            self._nodes[address] = _Node(cpu, ahead, lock)
            self._by_place[cpu, index] = address

    def _turn_around(self) -> None:
        """Generic nodes point to the waiter behind them."""
        ahead = {node.ahead: address for address, node in self._nodes.items() if node.ahead}
        for address, node in self._nodes.items():
            self._nodes[address] = node._replace(ahead=ahead.get(address, 0))

    def waiters(self, lock: int, tail_cpu: int, tail_index: int) -> tuple[int, ...]:
        """
        Get the CPUs that queue for a lock, the first in the queue first.

        :param lock: Address of the lock's word.
        :param tail_cpu: The last waiter, as the word names it; -1 for none.
        """
        if tail_cpu < 0:
            return ()
        if self._keeps_lock:
            cpus = {node.cpu for node in self._nodes.values() if node.lock == lock}
            return (*sorted(cpus - {tail_cpu}), tail_cpu)
        found: list[int] = []
        seen: set[int] = set()
        here = self._by_place.get((tail_cpu, tail_index), 0)
        while here in self._nodes and here not in seen:
            seen.add(here)
            found.append(self._nodes[here].cpu)
            here = self._nodes[here].ahead
        return tuple(reversed(found)) or (tail_cpu,)


#: What each function yields: address, index, address of the neighbour, address of the lock.
_Nodes = Iterator[tuple[int, int, int, int]]


def _generic_nodes(nodes: Object) -> _Nodes:
    """``struct qnode [4]``; the first one counts how many are in use."""
    used = nodes[0].mcs.count.value_()
    for index in range(max(0, min(used, len(nodes)))):
        mcs = nodes[index].mcs
        assert mcs.address_ is not None
        yield mcs.address_, index, int(mcs.next.value_()), 0


def _powerpc_nodes(nodes: Object) -> _Nodes:
    """``struct qnodes``; each node keeps its lock."""
    for index in range(max(0, min(nodes.count.value_(), len(nodes.nodes)))):
        node = nodes.nodes[index]
        assert node.address_ is not None
        yield node.address_, index, 0, int(node.lock.value_())


def _s390_nodes(nodes: Object) -> _Nodes:
    """``struct spin_wait [4]``; a node points to the one before it until it is the first."""
    for index in range(len(nodes)):
        node = nodes[index]
        assert node.address_ is not None
        yield node.address_, index, int(node.prev.value_()), 0
