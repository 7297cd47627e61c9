# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that several tests look into, each booted once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from resting import Running, resting_guest


@pytest.fixture(scope="session", params=["x86_64", "s390x"])
def debian_612(request: pytest.FixtureRequest) -> Iterator[Running]:
    with resting_guest("trixie", request.param, "6.12", 1024) as running:
        yield running
