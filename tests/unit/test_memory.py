# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bulk reads: whatever lies beside what, each block is there once, or is said to be missing."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_memory import MODES, PAGE, SparseMemory

from ptinspect.memory import among, iter_blocks


@settings(max_examples=60, deadline=None)
@given(
    pages=st.sets(st.integers(0, 120), max_size=80),
    gone=st.sets(st.integers(0, 120), max_size=3),
    per_batch=st.integers(1, 9),
    halves=st.booleans(),
)
def test_blocks_come_in_order_whole_and_few_at_a_time(
    pages: set[int], gone: set[int], per_batch: int, halves: bool
) -> None:
    """Whatever lies beside what, each block comes once, with what is in it."""
    memory = SparseMemory()
    for page in range(122):
        if page not in gone:
            memory.add(page * PAGE, PAGE)
            memory.write(page * PAGE, (page * 2 + 1).to_bytes(8, "little"))
            memory.write(page * PAGE + PAGE // 2, (page * 2 + 2).to_bytes(8, "little"))
    prog, _ = MODES[0].program(memory, 0)
    size = PAGE // 2 if halves else PAGE
    step = 2 if halves else 1
    addresses = np.array(sorted(pages), np.uint64) * np.uint64(PAGE)
    if halves:
        addresses = np.unique(np.append(addresses, addresses[::3] + np.uint64(PAGE // 2)))
    seen = []
    following = 0
    for batch in iter_blocks(prog, addresses, size, batch_bytes=per_batch * PAGE):
        assert batch.first == following
        assert 0 < len(batch.data) <= per_batch * step
        following += len(batch.data)
        words = batch.data.view(np.uint64)[:, 0].tolist()
        readable = [True] * len(words) if batch.readable is None else batch.readable.tolist()
        seen.extend(zip(readable, words))
    assert following == len(addresses)
    assert seen == [
        (False, 0) if a // PAGE in gone else (True, a // PAGE * 2 + (2 if a % PAGE else 1))
        for a in addresses.tolist()
    ]


@given(few=st.lists(st.integers(0, 20)), many=st.lists(st.integers(0, 20)))
def test_among(few: list[int], many: list[int]) -> None:
    found = among(np.array(few, np.uint64), np.array(many, np.uint64))
    assert found == set(few) & set(many)
