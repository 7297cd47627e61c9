# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running guests over QMP: the same answers as their own kernels give."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from resting import Running

from ptinspect import scan_memmap, summarise
from ptinspect.target import open_target

pytestmark = pytest.mark.guest


def test_typed_pages_equal_the_kernels_counter(running: Running) -> None:
    with open_target(running.paused) as target:
        assert running.status() == "paused"
        scan = scan_memmap(target.prog)
        summary = summarise(target.prog, scan)
    assert running.status() == "running"
    assert summary.counter is not None
    assert summary.complete
    assert summary.difference == 0
    # The guest rests since its report, but its kernel threads do not sleep: what they may change
    # is checked against the counter of the same instant above, the report against the bulk.
    truth = running.truth
    assert summary.counter.exact_pages == pytest.approx(
        truth["nr_page_table_pages"]["exact"], abs=8
    )
    assert len(scan.pfns) == pytest.approx(truth["kpageflags_pgtable"]["count"], abs=8)


def run(running: Running, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "ptinspect", "--qemu", str(running.guest.qmp_socket)),
            *("-s", str(running.kernel.vmlinux), "--pause", *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_commands_on_a_paused_guest(running: Running) -> None:
    summary = run(running, "summary", "--format", "json")
    assert summary.returncode == 0, summary.stderr
    answer = json.loads(summary.stdout)
    assert answer["complete"]
    assert answer["tables"]["accounting"]["difference"] == 0
    listing = run(running, "list", "--format", "json", "--limit", "3")
    assert listing.returncode == 0, listing.stderr
    first = json.loads(listing.stdout)["tables"]["descriptors"][0]
    shown = run(running, "show", f"page:{first['ptdesc']}", "--format", "json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["tables"]["descriptor"]["pfn"] == first["pfn"]
    assert running.status() == "running"
