# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lists, owners, deposits and sharing of stopped stock guests, as the samples are asked."""

from __future__ import annotations

import pytest
from test_deposits import (
    test_every_huge_entry_is_told,
    test_held_in_the_census,
    test_huge_pages_are_those_of_smaps,
    test_iterator_of_the_shell,
    test_tables_are_those_that_plain_drgn_finds,
)
from test_lists import (
    test_owners_are_the_mms_of_tasks,
    test_pages_of_a_pgd,
    test_pgd_list,
    test_roles,
    test_show_says_what_the_words_are,
)

pytestmark = pytest.mark.guest

__all__ = (
    "test_every_huge_entry_is_told",
    "test_held_in_the_census",
    "test_huge_pages_are_those_of_smaps",
    "test_iterator_of_the_shell",
    "test_owners_are_the_mms_of_tasks",
    "test_pages_of_a_pgd",
    "test_pgd_list",
    "test_roles",
    "test_show_says_what_the_words_are",
    "test_tables_are_those_that_plain_drgn_finds",
)
