# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
An s390x kernel that crashed, dumped by QEMU where it stopped, as a hypervisor's operator does.

Debian's s390x kernels have no kdump. What the kernel said of itself right before is the oracle.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from resting import Stock

from lab.archive import ArchiveUnreachableError
from lab.errors import MissingToolError
from lab.kernels import debian_kernel
from lab.live import dump_crashed
from ptinspect.cli.main import run

pytestmark = pytest.mark.guest


def test_a_dump_by_qemu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock = Stock("bookworm-backports", "s390x", "6.12")
    try:
        kernel = debian_kernel(stock.suite, stock.architecture, stock.series)
        truth = dump_crashed(stock.suite, kernel, tmp_path)
    except (MissingToolError, ArchiveUnreachableError) as error:
        pytest.skip(str(error))
    target = ["-c", str(tmp_path / "vmcore"), "-s", str(kernel.vmlinux)]
    answers = {}
    for name in ("summary", "check", "ps"):
        status = run([*target, name, "--format", "json"])
        answers[name] = json.loads(capsys.readouterr().out)
        assert (status, answers[name]["missing"]) == (0, [])
    accounting = answers["summary"]["tables"]["accounting"]
    assert accounting["difference"] == 0
    # Written down an instant before; the page tables of what ran in between.
    told = truth["kernel"]["nr_page_table_pages"]
    assert accounting["nr_pagetable_exact"] == pytest.approx(told, abs=32)
    assert answers["check"]["tables"]["findings"] == []
    rows = {row["pid"]: row for row in answers["ps"]["tables"]["spaces"]}
    for pid, status in truth["kernel"]["status"].items():
        assert rows[int(pid)]["walked_KiB"] == int(status["VmPTE"])
