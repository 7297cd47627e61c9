# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks, fragments and halves of stopped guests with stock kernels, asked as the samples are."""

from __future__ import annotations

import pytest
from test_fragments import test_every_page_agrees_with_its_count
from test_halves import test_bits_agree_with_the_trees, test_lists_are_those_that_drgn_follows
from test_locks import test_every_lock_is_as_plain_drgn_reads_it

pytestmark = pytest.mark.guest

__all__ = (
    "test_bits_agree_with_the_trees",
    "test_every_lock_is_as_plain_drgn_reads_it",
    "test_every_page_agrees_with_its_count",
    "test_lists_are_those_that_drgn_follows",
)
