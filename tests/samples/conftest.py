# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each sample opened once, beside what its own kernel said when it was taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from opened import Sample

from ptinspect.tables.scan import scan_memmap
from ptinspect.target import TargetOptions, open_target, sample_names

VMCORES = Path(__file__).parents[2] / "vmcores"


@pytest.fixture(scope="session", params=sample_names())
def sample(request: pytest.FixtureRequest) -> Iterator[Sample]:
    folder = VMCORES / request.param
    truth = json.loads((folder / "truth.json").read_text())
    texts = {path.name: path.read_text() for path in folder.glob("*page_tables*.txt")}
    with open_target(TargetOptions(sample=request.param)) as target:
        yield Sample(request.param, target.prog, truth, scan_memmap(target.prog), texts)
