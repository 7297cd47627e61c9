# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
``trace`` inside a guest with a stock kernel, beside VmPTE and nr_page_table_pages.

The guest's userland is Debian's, with bpftrace, in an initramfs. ``PTINSPECT_TRACE`` names other
kernels than the usual one, and how many tables: ``bookworm x86_64 6.1 20000``, more with commas.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lab.arches import find_arch
from lab.guest import Guest
from lab.kernels import debian_kernel
from lab.userland import PYTHON, live_initramfs, userland

SESSION = Path(__file__).with_name("trace_session.py")
USUAL = "trixie x86_64 6.12 20000"
KERNELS = [words.split() for words in os.environ.get("PTINSPECT_TRACE", USUAL).split(",")]
#: Of the userland; its bpftrace is the one that is used.
SUITE = os.environ.get("PTINSPECT_TRACE_SUITE", "forky")
OPTIONS = os.environ.get("PTINSPECT_TRACE_OPTIONS", "--leaks 2s --stacks")


VM_PTE = ("PTE", "PMD", "PUD")


def said_by(kernel: list[str], folder: Path) -> dict[str, Any]:
    suite, name, series, tables = kernel
    arch = find_arch(name)
    found = debian_kernel(suite, name, series)
    part = userland(SUITE, arch, (*PYTHON, "bpftrace"))
    initrd = live_initramfs(
        [part],
        f"python3 session.py {tables} {OPTIONS}\necho @@end\n",
        {"project/session.py": SESSION.read_bytes()},
        folder / "initrd",
    )
    with Guest(arch, found.image, initrd, memory=4096, smp="2", append="quiet") as guest:
        console = guest.wait_for("@@end", timeout=1500)
    parts = [line[7:] for line in console.splitlines() if line.startswith("@@said ")]
    said: dict[str, Any] = json.loads("".join(parts))
    keep = os.environ.get("PTINSPECT_TRACE_KEEP")
    if keep:
        Path(keep, f"{'-'.join(kernel)}.json").write_text(json.dumps(said, indent=1))
    return said


@pytest.mark.parametrize("kernel", KERNELS, ids="-".join)
def test_load(kernel: list[str], tmp_path: Path) -> None:
    said = said_by(kernel, tmp_path)
    assert "summary" in said, said["errors"]
    summary = said["summary"]["tables"]
    footer = summary["footer"]
    assert said["left"] == "", "bpftrace is left behind"
    # The kernel's own counter, to the page; what was not seen says why not.
    off = footer["net_pages"] - footer["nr_page_table_pages_changed_by"]
    assert off == footer["destructors_unseen"]
    if footer["missed_calls"] == 0 and footer["dropped"] == 0 and off == 0:
        assert footer["exact"] is True
        assert said["status"] == 0
    else:
        assert footer["exact"] is False
        assert said["status"] == 4
    assert not summary["left"]
    # VmPTE has PTE, PMD and PUD tables, of the sizes that the architecture gives them (on s390x
    # the root may be a PUD table: it is not counted by 6.12, and not in VmPTE).
    kib = {"PTE": 2, "PMD": 16, "PUD": 16} if kernel[1] == "s390x" else dict.fromkeys(VM_PTE, 4)
    held = sum(kib[level] * row["live"][level] for row in said["held"] for level in kib)
    levels = {row["level"]: row for row in summary["levels"]}
    uncounted = said["vm_pte_kib"] - held
    if kernel[1] == "x86_64" and "PUD" not in levels:
        # 6.1 does not count PUD tables, so the trace cannot: the process has a few, and no more.
        assert 4 <= uncounted <= 6 * 4
    elif not footer["missed_calls"]:
        assert uncounted == 0
    assert levels["PTE"]["made"] >= int(kernel[3])
    rows = [row for row in summary["processes"] if row["pid"] == said["pid"]]
    assert sum(row["made PTE"] for row in rows) >= int(kernel[3])
