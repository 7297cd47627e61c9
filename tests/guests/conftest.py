# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that several tests look into, each booted once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from opened import Sample
from resting import Running, Stock, resting_guest

from lab.matrix import ROWS
from ptinspect.tables.scan import scan_memmap
from ptinspect.target import open_target

STOCK_KERNELS = (
    Stock("trixie", "x86_64", "6.12"),
    Stock("bookworm-backports", "s390x", "6.12"),
    Stock("bookworm", "s390x", "6.1"),
    # User mode on a root table of its own; the arm64 sample is without.
    Stock("forky", "aarch64", "7.2", append="kpti=on"),
    Stock("bookworm-backports", "ppc64le", "6.12"),
    Stock("forky", "riscv64", "7.2"),
)


#: A row of docs/matrix.md, by its name: `scripts/lab matrix --kind tests` asks its kernel instead.
ROW = os.environ.get("PTINSPECT_ROW")
KERNELS = [row for row in ROWS if str(row) == ROW] if ROW else STOCK_KERNELS


@pytest.fixture(scope="session", params=KERNELS, ids=str)
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
