# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that several tests look into, each booted once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opened import Sample
from resting import Running, Stock, resting_guest

from ptinspect.tables.scan import scan_memmap
from ptinspect.target import open_target

STOCK_KERNELS = (
    Stock("trixie", "x86_64", "6.12"),
    Stock("bookworm-backports", "s390x", "6.12"),
    Stock("bookworm", "s390x", "6.1"),
    Stock("forky", "aarch64", "7.2"),
    Stock("bookworm-backports", "ppc64le", "6.12"),
    Stock("forky", "riscv64", "7.2"),
)


@pytest.fixture(scope="session", params=STOCK_KERNELS, ids=str)
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    """A running guest, of each kernel in turn."""
    with resting_guest(request.param) as guest:
        yield guest


@pytest.fixture(scope="module")
def sample(running: Running) -> Iterator[Sample]:
    """The same guest stopped and opened, in the shape in which samples are tested."""
    with open_target(running.paused) as target:
        prog = target.prog
        yield Sample(running.kernel.release, prog, running.truth, scan_memmap(prog), running.texts)
