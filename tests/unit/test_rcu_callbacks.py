# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""RCU callbacks where no sample has them: tiny RCU, and lists on stacks that only look like one."""

from __future__ import annotations

import numpy as np
import pytest
from drgn import Object, TypeMember
from mock_kernel import FIRST_PFN, MEMMAP, PAGE_BYTES, MockKernel

from ptinspect.state.rcu import Segment, _invoked, _Reader, rcu_callbacks
from ptinspect.state.stacks import KernelStack


def place(number: int) -> int:
    """Where the n-th structure lies."""
    return MEMMAP + number * PAGE_BYTES


def put(kernel: MockKernel, number: int, *words: int) -> None:
    for n, word in enumerate(words):
        kernel.put(FIRST_PFN + number, 8 * n, word, 8)


def tiny(kernel: MockKernel) -> None:
    prog = kernel.prog
    head = prog.pointer_type(kernel.types["callback_head"])
    control = prog.struct_type(
        "rcu_ctrlblk",
        32,
        [
            TypeMember(head, "rcucblist", 0),
            TypeMember(prog.pointer_type(head), "donetail", 64),
            TypeMember(prog.pointer_type(head), "curtail", 128),
            TypeMember(kernel.ulong, "gp_seq", 192),
        ],
    )
    kernel.constants["rcu_ctrlblk"] = Object(prog, control, address=place(0))


@pytest.fixture(params=[True, False], ids=["little", "big"])
def kernel(request: pytest.FixtureRequest) -> MockKernel:
    return MockKernel("7.3", little_endian=request.param)


def test_tiny_rcu(kernel: MockKernel) -> None:
    tiny(kernel)
    put(kernel, 0, place(1), place(1), place(3), 0x21)
    put(kernel, 1, place(2), 0x111)
    put(kernel, 2, place(3), 0x222)
    put(kernel, 3, 0, 0x333)
    found = rcu_callbacks(kernel.prog)
    assert [(each.segment, each.heads.tolist()) for each in found.lists] == [
        (Segment.DONE, [place(1)]),
        (Segment.NEXT, [place(2), place(3)]),
    ]
    assert [each.functions.tolist() for each in found.lists] == [[0x111], [0x222, 0x333]]
    assert found.grace_period.gp_seq == 0x21
    assert found.missing == ()


def test_tiny_rcu_without_callbacks(kernel: MockKernel) -> None:
    tiny(kernel)
    put(kernel, 0, 0, place(0), place(0), 0x21)
    assert rcu_callbacks(kernel.prog).lists == ()


def test_tiny_rcu_in_a_circle(kernel: MockKernel) -> None:
    tiny(kernel)
    put(kernel, 0, place(1), place(0), place(2), 0x21)
    put(kernel, 1, place(2), 0x111)
    put(kernel, 2, place(1), 0x222)
    found = rcu_callbacks(kernel.prog)
    (sentence,) = found.missing
    assert f"comes back to {place(1):#x}" in sentence
    assert sum(len(each.heads) for each in found.lists) == 2


def on_stack(kernel: MockKernel, *words: int) -> list[list[int]]:
    stack = KernelStack("task/1", 0, place(100), np.array(words, np.uint64))
    return [each.heads.tolist() for each in _invoked(_Reader(kernel.prog), stack)]


def test_lists_on_a_stack(kernel: MockKernel) -> None:
    put(kernel, 1, place(2), 0x111)
    put(kernel, 2, 0, 0x222)
    assert on_stack(kernel, 7, place(1), place(2), 2, 9) == [[place(1), place(2)]]
    # Too short, too long, another end, no list at all.
    assert on_stack(kernel, place(1), place(2), 1) == []
    assert on_stack(kernel, place(1), place(2), 3) == []
    assert on_stack(kernel, place(1), place(1), 2) == []
    assert on_stack(kernel, place(1), 0, 0, 5, 0xDEAD000000000000, 0x10, 4) == []


def test_empty_list_on_a_stack(kernel: MockKernel) -> None:
    assert on_stack(kernel, 7, 0, place(100) + 8, 0, 9) == [[]]
    assert on_stack(kernel, 7, 0, place(100), 0, 9) == []
