# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lock words: written by the kernels' rules one at a time, read back in bulk."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptinspect.kernel import spinlock
from ptinspect.kernel.spinlock import WORD_PROBLEMS, Words

CPUS = 24

GENERIC = spinlock._queued(8, (0, 1))
GENERIC_PV = spinlock._queued(8, (0, 1, 3))
GENERIC_LARGE = spinlock._queued(1, (0, 1))


def one(decode: Callable[..., Words], word: int) -> dict[str, int]:
    words = decode(np.array([word], np.uint32), CPUS)
    return {name: int(column[0]) for name, column in words._asdict().items()}


def problem(decode: Callable[..., Words], word: int) -> str:
    return WORD_PROBLEMS[one(decode, word)["problem"]]


cpus = st.integers(0, CPUS - 1)
maybe_cpu = st.integers(-1, CPUS - 1)
index = st.integers(0, 3)


@given(st.booleans(), st.booleans(), maybe_cpu, index)
def test_generic_queued(held: bool, pending: bool, tail: int, node: int) -> None:
    node = node if tail >= 0 else 0
    for decode, bits in ((GENERIC, 8), (GENERIC_LARGE, 1)):
        word = held | pending << 8 | node << (8 + bits) | (tail + 1) << (10 + bits)
        assert one(decode, word) == {
            "held": held,
            "pending": pending,
            "owner_cpu": -1,
            "tail_cpu": tail,
            "tail_index": node,
            "waiting": 0,
            "problem": 0,
        }


@given(maybe_cpu, maybe_cpu, index, st.integers(0, 3))
def test_s390(owner: int, tail: int, node: int, steals: int) -> None:
    node = node if tail >= 0 else 0
    word = owner + 1 | steals << 16 | node << 18 | (tail + 1) << 20
    found = one(spinlock._s390, word)
    assert (found["held"], found["owner_cpu"]) == (owner >= 0, owner)
    assert (found["tail_cpu"], found["tail_index"], found["problem"]) == (tail, node, 0)


@given(st.booleans(), cpus, st.booleans(), maybe_cpu)
def test_powerpc_queued(held: bool, owner: int, must_queue: bool, tail: int) -> None:
    word = (1 | owner << 1 if held else 0) | must_queue << 16 | (tail + 1) << 17
    found = one(spinlock._powerpc_queued, word)
    assert (found["held"], found["owner_cpu"]) == (held, owner if held else -1)
    assert (found["tail_cpu"], found["problem"]) == (tail, 0)


@given(st.integers(0, 0xFFFF), st.integers(0, 4 * CPUS))
def test_ticket(served: int, taken: int) -> None:
    word = (served + taken) % 0x10000 << 16 | served
    found = one(spinlock._ticket, word)
    assert (found["held"], found["problem"]) == (taken > 0, 0)
    assert found["waiting"] == max(taken - 1, 0)


@given(cpus)
def test_powerpc_simple(owner: int) -> None:
    found = one(spinlock._powerpc_simple, 0x80000000 | owner)
    assert (found["held"], found["owner_cpu"], found["problem"]) == (True, owner, 0)
    assert not one(spinlock._powerpc_simple, 0)["held"]


@pytest.mark.parametrize(
    ("decode", "word", "text"),
    [
        (GENERIC, 0x02, "locked byte"),
        (GENERIC, 0x03, "locked byte"),
        (GENERIC_PV, 0x03, ""),
        (GENERIC, 0x200, "pending byte"),
        (GENERIC, 0x10000, "without a waiter"),
        (GENERIC, (CPUS + 1) << 18, "last waiter is no CPU"),
        (GENERIC, 0xDEADBEEF, "locked byte"),
        (spinlock._ticket, 0xDEADBEEF, "more waiters"),
        (spinlock._s390, CPUS + 1, "owner is no CPU"),
        (spinlock._s390, (CPUS + 1) << 20, "last waiter is no CPU"),
        (spinlock._s390, 1 << 18, "without a waiter"),
        (spinlock._powerpc_queued, 1 | CPUS << 1, "owner is no CPU"),
        (spinlock._powerpc_queued, 3 << 1, "without the locked bit"),
        (spinlock._powerpc_queued, (CPUS + 1) << 17, "last waiter is no CPU"),
        (spinlock._powerpc_simple, 0x1234, "not the token"),
        (spinlock._powerpc_simple, 0x80000000 | CPUS, "owner is no CPU"),
        (spinlock._single_cpu, 2, "locked byte"),
        (spinlock._single_cpu, 1, ""),
    ],
)
def test_impossible_words(decode: Callable[..., Words], word: int, text: str) -> None:
    assert text in problem(decode, word)
    assert bool(text) == bool(problem(decode, word))


@given(st.lists(st.integers(0, (1 << 32) - 1)))
def test_any_words_are_decoded(values: list[int]) -> None:
    words = np.array(values, np.uint32)
    decoders = (spinlock._ticket, spinlock._s390, spinlock._powerpc_queued)
    for decode in (GENERIC, GENERIC_LARGE, *decoders, spinlock._powerpc_simple):
        found = decode(words, CPUS)
        assert all(len(column) == len(words) for column in found)
        right = found.problem == 0
        assert (found.owner_cpu[right] < CPUS).all()
        assert (found.tail_cpu[right] < CPUS).all()
