# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each sample opened once, beside what its own kernel said when it was taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from opened import Sample

from ptinspect.tables.scan import scan_memmap
from ptinspect.target import TargetOptions, open_target, sample_names

VMCORES = Path(__file__).parents[2] / "vmcores"

#: A sample of a kernel under load: nothing was at rest, and the report came before.
MOVING = "-load"
#: A kernel that writes down who allocates pages; else like the sample without this suffix.
OWNED = "-owner"
#: A kernel that frees its own tables later, caught before it did.
FREEING = "-async"

#: A kernel that is not healthy: tests/samples/test_panic.py looks into it.
BROKEN = "-panic"

_RESTING = [n for n in sample_names() if not n.endswith((MOVING, OWNED, FREEING, BROKEN))]


@pytest.fixture(scope="session", params=_RESTING)
def sample(request: pytest.FixtureRequest) -> Iterator[Sample]:
    with opened(request.param) as found:
        yield found


@pytest.fixture(scope="session", params=[name for name in sample_names() if name.endswith(MOVING)])
def moving(request: pytest.FixtureRequest) -> Iterator[Sample]:
    """A sample that was taken while tables were being freed."""
    with opened(request.param) as found:
        yield found


@contextmanager
def opened(name: str) -> Iterator[Sample]:
    folder = VMCORES / name
    truth = json.loads((folder / "truth.json").read_text())
    texts = {path.name: path.read_text() for path in folder.glob("*page_tables*.txt")}
    with open_target(TargetOptions(sample=name)) as target:
        yield Sample(name, target.prog, truth, scan_memmap(target.prog), texts)
