# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The callbacks that wait for RCU, on every CPU, whatever they do.

Tree RCU keeps one segmented list a CPU (``struct rcu_segcblist``: callbacks of four stages in one
chain, cut by ``tails[]``) and, where callbacks are offloaded, a bypass list beside it. Callbacks
that are being invoked hang on a list on the stack of whoever invokes them (rcu_do_batch() in
kernel/rcu/tree.c). Tiny RCU has one chain (kernel/rcu/tiny.c).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from drgn import FaultError, Object, Program, offsetof
from drgn.helpers.linux.cpumask import for_each_possible_cpu
from drgn.helpers.linux.percpu import per_cpu

from ptinspect.kernel.descriptor import byte_order
from ptinspect.memory import AddressArray
from ptinspect.state.stacks import KernelStack

#: More callbacks than any list has; a walk ends here.
CALLBACK_LIMIT = 1 << 22

#: How often a broken list is read: on a running target callbacks are freed while they are followed.
_ATTEMPTS = 3

#: Low bits of a grace-period number that tell its state (RCU_SEQ_CTR_SHIFT, kernel/rcu/rcu.h).
_SEQUENCE_STATE_BITS = 2


class Segment(Enum):
    """How far callbacks are; the first four in the order of the chain (RCU_DONE_TAIL...)."""

    #: The grace period is over: they can be invoked.
    DONE = "done"
    #: They wait for the current grace period.
    WAIT = "wait"
    #: They wait for the next one.
    NEXT_READY = "next ready"
    #: No grace period has been assigned yet.
    NEXT = "next"
    #: On the bypass list of an offloaded CPU, lazy ones among them.
    BYPASS = "bypass"
    #: Taken off their CPU's list to be invoked one after the other; those that are left.
    INVOKED = "being invoked"


#: No kernel has data in the first page.
_LOWEST_POINTER = 4096

_CHAIN = (Segment.DONE, Segment.WAIT, Segment.NEXT_READY, Segment.NEXT)


@dataclass(frozen=True)
class CallbackList:
    """The callbacks of one CPU in one segment."""

    #: ``None`` if a task that is on no CPU invokes them.
    cpu: int | None
    segment: Segment
    #: uint64, shape (n,): addresses of the ``struct rcu_head``, in the order of the list.
    heads: AddressArray
    #: uint64, shape (n,): their functions.
    functions: AddressArray
    #: The normal grace period's number at which they are ready; ``None`` if none is assigned.
    wanted_gp_seq: int | None = None
    #: Grace periods that have to end before; ``None`` if unknown.
    grace_periods_to_go: int | None = None
    #: Jiffies that all of them have waited at least, and none of them longer than.
    waited_at_least: int | None = None
    waited_at_most: int | None = None


@dataclass(frozen=True)
class GracePeriod:
    """Where RCU stands."""

    #: ``rcu_state.gp_seq`` (tiny RCU: ``rcu_ctrlblk.gp_seq``).
    gp_seq: int
    #: ``None`` where it does not tell (tiny RCU).
    in_progress: bool | None
    #: Jiffies since the current one began; ``None`` if none is in progress.
    started_ago: int | None


@dataclass(frozen=True)
class RcuCallbacks:
    """All callbacks that could be found."""

    lists: tuple[CallbackList, ...]
    grace_period: GracePeriod
    #: CPU -> callbacks that it counts but that are on none of its lists: being invoked, or done.
    unlisted: dict[int, int]
    #: What could not be followed, in sentences.
    missing: tuple[str, ...]


def rcu_callbacks(prog: Program, stacks: Sequence[KernelStack] = ()) -> RcuCallbacks:
    """
    Follow the callback lists of every CPU.

    :param stacks: Where lists of callbacks that are being invoked are looked for.
    :raises LookupError: if this kernel has neither tree nor tiny RCU that ptinspect knows
    :raises FaultError: if RCU's state cannot be read
    """
    reader = _Reader(prog)
    try:
        state = prog["rcu_state"]
    except LookupError:
        return _tiny(reader)
    gp = _grace_period(prog, state)
    lists: list[CallbackList] = []
    unlisted: dict[int, int] = {}
    for cpu in for_each_possible_cpu(prog):
        before = len(reader.missing)
        for _ in range(_ATTEMPTS):
            del reader.missing[before:]
            try:
                data = per_cpu(prog["rcu_data"], cpu)
                found = list(_of_cpu(reader, cpu, data, gp))
                counted = int(_number(data.cblist.len))
            except FaultError as error:
                found, counted = [], 0
                reader.missing.append(f"CPU {cpu}: its RCU callbacks cannot be read: {error}")
            if len(reader.missing) == before:
                break
        lists.extend(found)
        rest = counted - sum(len(each.heads) for each in found)
        if rest > 0:
            unlisted[cpu] = rest
    for stack in stacks:
        if stack.cpu in unlisted or (stack.cpu is None and unlisted):
            lists.extend(_invoked(reader, stack))
    return RcuCallbacks(tuple(lists), gp, unlisted, tuple(reader.missing))


def _number(value: Object) -> int:
    """``long`` or ``atomic_long_t`` (with offloading): rcu_segcblist.len."""
    try:
        return int(value.counter.value_())
    except AttributeError:
        return int(value.value_())


def _normal(value: Object) -> int:
    """A grace-period number: ``unsigned long``, since 7.x ``struct rcu_gp_seq``."""
    try:
        return int(value.norm.value_())
    except AttributeError:
        return int(value.value_())


def _grace_period(prog: Program, state: Object) -> GracePeriod:
    sequence = int(state.gp_seq.value_())
    in_progress = bool(sequence & (1 << _SEQUENCE_STATE_BITS) - 1)
    started = None
    if in_progress:
        started = (prog["jiffies"].value_() - state.gp_start.value_()) & (1 << 64) - 1
    return GracePeriod(sequence, in_progress, started)


class _Chain:
    """A chain of callbacks as far as it could be followed."""

    def __init__(self) -> None:
        self.heads: list[int] = []
        self.functions: list[int] = []
        #: Index of the first callback behind each cut.
        self.cuts: list[int] = []
        #: Why it ends early; ``None`` if it is whole.
        self.broken: str | None = None
        #: Address of the last link.
        self.last = 0


class _Reader:
    def __init__(self, prog: Program) -> None:
        self.prog = prog
        head = prog.type("struct callback_head")
        self._next = offsetof(head, "next")
        self._format = struct.Struct(f"{byte_order(prog)}QQ")
        # Two adjacent words (include/linux/types.h).
        self._function_first = offsetof(head, "func") < self._next
        self.missing: list[str] = []

    def read(self, head: int) -> tuple[int, int]:
        """The next callback and the function of one."""
        first, second = self._format.unpack(self.prog.read(head, 16))
        return (second, first) if self._function_first else (first, second)

    def follow(
        self, link: int, first: int, cuts: Sequence[int] = (), limit: int = CALLBACK_LIMIT
    ) -> _Chain:
        """
        Follow a chain.

        :param link: Address of the pointer to the first callback, whose value is *first*.
        :param cuts: Addresses of the links at which the segments end, in order.
        """
        chain = _Chain()
        seen: set[int] = set()
        here, head = link, first
        while True:
            while len(chain.cuts) < len(cuts) and cuts[len(chain.cuts)] == here:
                chain.cuts.append(len(chain.heads))
            chain.last = here
            if not head:
                return chain
            if head in seen or head & 7:
                what = "comes back to" if head in seen else "leads to the odd address"
                chain.broken = f"after {len(chain.heads)} callbacks it {what} {head:#x}"
                return chain
            if len(chain.heads) >= limit:
                chain.broken = f"it is longer than {limit} callbacks"
                return chain
            try:
                following, function = self.read(head)
            except FaultError:
                chain.broken = (
                    f"after {len(chain.heads)} callbacks the next, {head:#x}, cannot be read"
                )
                return chain
            seen.add(head)
            chain.heads.append(head)
            chain.functions.append(function)
            here, head = head + self._next, following


def _arrays(chain: _Chain, start: int, end: int) -> tuple[AddressArray, AddressArray]:
    return (
        np.array(chain.heads[start:end], np.uint64),
        np.array(chain.functions[start:end], np.uint64),
    )


def _of_cpu(reader: _Reader, cpu: int, data: Object, gp: GracePeriod) -> Iterator[CallbackList]:
    segments = data.cblist
    address = segments.head.address_
    assert address is not None
    cuts = [segments.tails[n].value_() for n in range(len(_CHAIN))]
    chain = reader.follow(address, segments.head.value_(), cuts)
    if chain.broken is not None:
        reader.missing.append(f"CPU {cpu}: its list of RCU callbacks is broken: {chain.broken}")
    elif chain.heads and len(chain.cuts) < len(cuts):
        reader.missing.append(
            f"CPU {cpu}: its list of RCU callbacks ends after {len(chain.heads)} callbacks, "
            "before its last segment"
        )
    bounds = [0, *chain.cuts, *(len(chain.heads) for _ in range(len(cuts) - len(chain.cuts)))]
    bounds[-1] = len(chain.heads)
    for number, segment in enumerate(_CHAIN):
        if bounds[number] == bounds[number + 1]:
            continue
        wanted = to_go = at_least = None
        if segment in (Segment.WAIT, Segment.NEXT_READY):
            wanted = _normal(segments.gp_seq[number])
            to_go = _periods_to_go(gp, wanted)
            if to_go == 1 and gp.in_progress:
                # Assigned before the current one began, or they would have to wait for the next.
                at_least = gp.started_ago
        heads, functions = _arrays(chain, bounds[number], bounds[number + 1])
        yield CallbackList(cpu, segment, heads, functions, wanted, to_go, at_least)
    yield from _bypass(reader, cpu, data)


def _periods_to_go(gp: GracePeriod, wanted: int) -> int:
    here = gp.gp_seq >> _SEQUENCE_STATE_BITS
    bits = 64 - _SEQUENCE_STATE_BITS
    difference = ((wanted >> _SEQUENCE_STATE_BITS) - here) & (1 << bits) - 1
    return 0 if difference >> (bits - 1) else difference


def _bypass(reader: _Reader, cpu: int, data: Object) -> Iterator[CallbackList]:
    try:
        bypass = data.nocb_bypass
        first = data.nocb_bypass_first.value_()
    except AttributeError:
        return  # without CONFIG_RCU_NOCB_CPU
    address = bypass.head.address_
    assert address is not None
    chain = reader.follow(address, bypass.head.value_())
    if chain.broken is not None:
        reader.missing.append(f"CPU {cpu}: its RCU bypass list is broken: {chain.broken}")
    if chain.heads:
        at_most = (reader.prog["jiffies"].value_() - first) & (1 << 64) - 1
        heads, functions = _arrays(chain, 0, len(chain.heads))
        yield CallbackList(cpu, Segment.BYPASS, heads, functions, waited_at_most=at_most)


def _invoked(reader: _Reader, stack: KernelStack) -> Iterator[CallbackList]:
    """
    Find ``struct rcu_cblist`` on a stack: a chain of just *len* callbacks that ends at *tail*.

    Dequeuing keeps all three right (rcu_cblist_dequeue in kernel/rcu/rcu_segcblist.c). Of an empty
    one, whose last callback is being invoked, *tail* is its own address.
    """
    words = stack.words
    if len(words) < 3:
        return
    first, tail, length = words[:-2], words[1:-1], words[2:]
    likely = ((first | tail) & np.uint64(7)) == 0
    likely &= (first >= _LOWEST_POINTER) & (tail >= _LOWEST_POINTER)
    likely &= (length > 0) & (length < CALLBACK_LIMIT)
    found: set[int] = set()
    for place in np.flatnonzero(likely).tolist():
        head, last, count = int(first[place]), int(tail[place]), int(length[place])
        if head in found:
            continue
        chain = reader.follow(0, head, limit=count)
        if chain.broken is None and len(chain.heads) == count and chain.last == last:
            found.add(head)
            heads, functions = _arrays(chain, 0, count)
            yield CallbackList(stack.cpu, Segment.INVOKED, heads, functions)
    if not found:
        own = np.uint64(stack.address) + np.arange(len(first), dtype=np.uint64) * np.uint64(8)
        if np.any((first == 0) & (tail == own) & (length == 0)):
            empty = np.empty(0, np.uint64)
            yield CallbackList(stack.cpu, Segment.INVOKED, empty, empty)


def _tiny(reader: _Reader) -> RcuCallbacks:
    control = reader.prog["rcu_ctrlblk"]
    address = control.rcucblist.address_
    assert address is not None
    cuts = [control.donetail.value_(), control.curtail.value_()]
    chain = reader.follow(address, control.rcucblist.value_(), cuts)
    if chain.broken is not None:
        reader.missing.append(f"the list of RCU callbacks is broken: {chain.broken}")
    done = chain.cuts[0] if chain.cuts else 0
    lists = []
    for segment, start, end in (
        (Segment.DONE, 0, done),
        (Segment.NEXT, done, len(chain.heads)),
    ):
        if start < end:
            lists.append(CallbackList(0, segment, *_arrays(chain, start, end)))
    gp = GracePeriod(int(control.gp_seq.value_()), None, None)
    return RcuCallbacks(tuple(lists), gp, {}, tuple(reader.missing))
