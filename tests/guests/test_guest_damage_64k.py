# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The same damage where pages hold many tables: powerpc with 64K pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from resting import Running, Stock, resting_guest
from test_guest_damage import test_all_of_it_in_a_dump, test_damage_is_found_while_it_lasts

pytestmark = pytest.mark.guest

__all__ = ("test_all_of_it_in_a_dump", "test_damage_is_found_while_it_lasts")

KERNEL = Stock("bookworm-backports", "ppc64le", "6.12", flavour="powerpc64le-64k")


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with resting_guest(KERNEL) as guest:
        yield guest
