# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A stock kernel that a driver crashed by a page table: what docs/panic.md says of its dump."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from console_blocks import REPOSITORY, Shown, printed, shown

NAME = "x86_64-6.12-panic"
GUIDE = (REPOSITORY / "docs" / "panic.md").read_text()


def answer(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "ptinspect", "--sample", NAME, *arguments, "--format", "json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((REPOSITORY / "vmcores" / NAME / "truth.json").read_text())
    return found


@pytest.mark.parametrize("block", list(shown(GUIDE)), ids=lambda block: block.command[:60])
def test_the_guide(block: Shown) -> None:
    assert printed(block.command) == block.output


def test_the_address_is_the_victims(truth: dict[str, Any]) -> None:
    (said,) = re.findall(r"buffers: Corrupted page table at address ([0-9a-f]+)", GUIDE)
    assert int(said, 16) == truth["victim"]["address"]


def test_what_is_found(truth: dict[str, Any]) -> None:
    """The three things that are wrong, and nothing else; all could be seen."""
    found = answer("check", "--max", "1000")
    assert found["missing"] == []
    victim, address = truth["victim"]["pid"], truth["victim"]["address"]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for finding in found["tables"]["findings"]:
        by_name.setdefault(finding["invariant"], []).append(finding)
    assert set(by_name) == {"tree-child-typed", "mm-pgtables-bytes", "user-no-kernel-leaf"}
    (untyped,), (bytes_,) = by_name["tree-child-typed"], by_name["mm-pgtables-bytes"]
    assert f"buffers/{victim}" in str(untyped)
    assert f"{address:#x}" in str(untyped)
    assert f"buffers/{victim}" in str(bytes_)


def test_processes(truth: dict[str, Any]) -> None:
    """What /proc said before: the victim's count is one table less than it was then."""
    rows = {row["pid"]: row for row in answer("ps")["tables"]["spaces"]}
    for pid, status in truth["kernel"]["status"].items():
        row = rows[int(pid)]
        lost = 4 if int(pid) == truth["victim"]["pid"] else 0
        assert row["walked_KiB"] == int(status["VmPTE"])
        assert row["pgtables_KiB"] == int(status["VmPTE"]) - lost
