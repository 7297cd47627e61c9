# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Page-table isolation of arm64 marks what the kernel has mapped already, tables included."""

from __future__ import annotations

import numpy as np
import pytest
from opened import Sample
from overlay import Overlay

from ptinspect.census import take_census
from ptinspect.checks import run_checks
from ptinspect.tables.spaces import SpaceKind

#: PTE_NG
NOT_GLOBAL = 1 << 11


@pytest.mark.parametrize(("kind", "expected"), [(SpaceKind.KERNEL, 0), (SpaceKind.USER, 1)])
def test_only_the_kernel_marks_entries_for_tables(
    sample: Sample, kind: SpaceKind, expected: int
) -> None:
    if sample.truth["kernel"]["arch"] != "aarch64":
        pytest.skip("arm64 only")
    tables = take_census(sample.prog, leaf_counts=False).tables
    of_kind = np.array([space.kind is kind for space in tables.spaces])[tables.space]
    row = np.flatnonzero(of_kind & (tables.parent >= 0) & (tables.level == 0))[0]
    address = int(tables.entry_address[row])
    entry = int.from_bytes(sample.prog.read(address, 8, True), "little") | NOT_GLOBAL
    with Overlay(sample.prog).word_at(address, entry, physical=True):
        (result,) = run_checks(sample.prog, only=["entry-reserved-bits"]).results
    assert len(result.findings) == expected
