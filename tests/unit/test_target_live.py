# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The running kernel: what keeps one from opening it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import target_files

from ptinspect.errors import ExitStatus, TargetError
from ptinspect.target import architecture, live


@pytest.fixture(autouse=True)
def kcore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(live, "KCORE", tmp_path / "kcore")
    monkeypatch.setattr(live, "_LOCKDOWN", tmp_path / "lockdown")
    return tmp_path / "kcore"


def refused(message: str, wanted: str | None = None) -> None:
    expected = architecture.by_name(wanted) if wanted else None
    with pytest.raises(TargetError, match=message) as caught:
        live.open_live(expected, None)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == ExitStatus.TARGET


def test_no_kcore() -> None:
    refused("no .*kcore: the running kernel has no CONFIG_PROC_KCORE, or /proc is not mounted")


@pytest.fixture
def forbidden(kcore: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening kcore is not permitted, whoever runs the test."""
    real_open = os.open

    def deny(path: str | Path, *arguments: int) -> int:
        if path == kcore:
            raise PermissionError(1, "Operation not permitted")
        return real_open(path, *arguments)

    monkeypatch.setattr(os, "open", deny)


@pytest.mark.usefixtures("forbidden")
def test_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    refused(r"permission denied: reading the running kernel needs root \(use sudo\)")


@pytest.mark.usefixtures("forbidden")
def test_lockdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "lockdown").write_text("none integrity [confidentiality]\n")
    refused("kernel lockdown is in confidentiality mode")
    (tmp_path / "lockdown").write_text("none [integrity] confidentiality\n")
    refused("CAP_SYS_RAWIO is missing")


@pytest.mark.usefixtures("forbidden")
def test_no_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    refused("permission denied even to root: CAP_SYS_RAWIO is missing")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x7fELF"])
def test_masked(kcore: Path, content: bytes) -> None:
    """Containers lay /dev/null or an empty file over it."""
    kcore.write_bytes(content)
    refused("it does not give the kernel's memory .*a container may hide it")


def test_unsupported_architecture(kcore: Path) -> None:
    kcore.write_bytes(target_files.elf32(target_files.EM_ARM))
    refused("unsupported architecture arm")


def test_contradicting_architecture(kcore: Path) -> None:
    kcore.write_bytes(target_files.elf_core([]))
    refused("--architecture s390x, but the running kernel is x86_64", "s390x")
