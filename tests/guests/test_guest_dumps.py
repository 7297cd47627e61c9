# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cells of docs/matrix.md: QEMU's dump of each resting guest, one of its two formats."""

from __future__ import annotations

from pathlib import Path

import pytest
from resting import Running

from lab.matrix import judge_guest

pytestmark = pytest.mark.guest

#: Both formats of all of them take three minutes; `scripts/lab matrix` asks for these.
FORMS = {
    "x86_64": "kdump",
    "s390x": "elf",
    "aarch64": "kdump",
    "ppc64le": "elf",
    "riscv64": "kdump",
}


def test_a_dump_says_what_the_kernel_said(running: Running, tmp_path: Path) -> None:
    form = FORMS[running.kernel.arch.name]
    cells = list(judge_guest(running.kernel, running.guest, [form], tmp_path))
    assert cells == [(form, "pass")]
    assert running.status() == "running"
