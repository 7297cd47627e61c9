# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The walk of stopped guests against what their kernels said, and against drgn's own walker.

The questions are those that the samples are asked; here stock kernels answer.
"""

from __future__ import annotations

from test_gmap import test_nothing_disagrees, test_where_there_are_none
from test_walk import (
    test_every_present_page_against_drgn,
    test_everything_is_found_and_read,
    test_kernel_addresses_against_drgn,
    test_kernel_map_against_debugfs,
    test_owners_of_a_shared_page,
    test_pagemap_counts,
    test_pagemap_pages,
    test_typed_pages_are_reached_or_deposited,
    test_walked_tables_are_what_the_kernel_counted,
)

__all__ = (
    "test_every_present_page_against_drgn",
    "test_everything_is_found_and_read",
    "test_kernel_addresses_against_drgn",
    "test_kernel_map_against_debugfs",
    "test_nothing_disagrees",
    "test_owners_of_a_shared_page",
    "test_pagemap_counts",
    "test_pagemap_pages",
    "test_typed_pages_are_reached_or_deposited",
    "test_walked_tables_are_what_the_kernel_counted",
    "test_where_there_are_none",
)
