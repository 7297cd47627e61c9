# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loading debugging information, and the words for when there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import target_files
from drgn import Architecture, Platform, Program
from target_files import debug_file, x86_text

from ptinspect.errors import DebugInfoError, ExitStatus, TargetError, UsageError
from ptinspect.target import architecture, debuginfo, open_symbols

OTHER_ID = "ff" * 20


@pytest.fixture
def vmlinux(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux"
    path.write_bytes(debug_file())
    return path


def kernel(text: bytes = x86_text()) -> Program:
    """A kernel without memory."""
    prog = Program(architecture.by_name("x86_64").platform)
    prog.set_linux_kernel_custom(text, False)
    return prog


def load(prog: Program, *symbols: Path, directories: Sequence[Path] = ()) -> None:
    debuginfo.load(prog, symbols, directories)


def failure(*symbols: Path, prog: Program | None = None, directories: Sequence[Path] = ()) -> str:
    with pytest.raises(DebugInfoError) as caught:
        load(prog or kernel(), *symbols, directories=directories)
    assert caught.value.exit_status == ExitStatus.TARGET
    return str(caught.value)


def test_symbols(vmlinux: Path) -> None:
    prog = kernel()
    load(prog, vmlinux)
    assert prog.type("struct crafted").size == 4


def test_kernel_directory(vmlinux: Path) -> None:
    prog = kernel()
    load(prog, directories=[vmlinux.parent])
    assert prog.type("struct crafted").size == 4


def test_build_id(vmlinux: Path) -> None:
    assert debuginfo.kernel_build_id(kernel()) == target_files.BUILD_ID
    text = x86_text().replace(b"BUILD-ID", b"X")
    assert debuginfo.kernel_build_id(kernel(text)) is None


def test_garbage_build_id() -> None:
    """drgn knows the stable releases that put garbage there."""
    assert debuginfo.kernel_build_id(kernel(x86_text("6.1.115"))) is None


def test_wrong_vmlinux(tmp_path: Path, vmlinux: Path) -> None:
    vmlinux.write_bytes(debug_file(OTHER_ID))
    message = failure(vmlinux)
    assert message == (
        f"--symbols {vmlinux}: wrong vmlinux: it has build ID {OTHER_ID}, "
        f"but the kernel ({target_files.RELEASE}) has {target_files.BUILD_ID}"
    )


def test_vmlinux_without_build_id(vmlinux: Path) -> None:
    vmlinux.write_bytes(debug_file(None))
    assert "it has no build ID, but the kernel" in failure(vmlinux)


def test_another_architecture(vmlinux: Path) -> None:
    vmlinux.write_bytes(debug_file(machine=target_files.EM_S390, order=">"))
    assert "ELF machine 22, but the target is x86_64" in failure(vmlinux)


def test_module_is_not_judged(tmp_path: Path, vmlinux: Path) -> None:
    """A module has a build ID of its own."""
    module = tmp_path / "kvm.ko.debug"
    module.write_bytes(debug_file(OTHER_ID, kind=target_files.ET_REL))
    load(kernel(), vmlinux, module)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"text", "not an ELF file; the kernel's vmlinux with debugging information is needed"),
        (b"MZ" + bytes(2000), "this is a boot image"),
        (bytes(0x202) + b"HdrS" + bytes(500), "this is a boot image"),
        (target_files.elf_core([]), r"this is a core dump \(open it with --core\)"),
        (b"\x7fELF", "not a usable ELF file"),
        (None, "No such file or directory"),
    ],
)
def test_unusable_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "vmlinux"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DebugInfoError, match=message) as caught:
        load(kernel(), path)
    text = str(caught.value)
    assert text.startswith(f"--symbols {path}: ")
    assert "\n" not in text
    with pytest.raises(DebugInfoError, match=message):
        open_symbols([path])


def test_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The message names the build ID, what was tried, and what would help."""
    monkeypatch.delenv("DEBUGINFOD_URLS", raising=False)
    release = "6.4.0-150600.23-default"
    message = failure(prog=kernel(x86_text(release)), directories=[tmp_path])
    first, *_ = message.splitlines()
    assert first == (
        f"no debugging information (DWARF) for Linux {release}, build ID {target_files.BUILD_ID}"
    )
    for tried in (
        f"{tmp_path}/vmlinux",
        f"/usr/lib/debug/boot/vmlinux-{release}",
        f"/boot/vmlinux-{release}",
        "/usr/lib/debug/.build-id/00/112233445566778899aabbccddeeff00112233.debug",
        "not debuginfod (DEBUGINFOD_URLS is not set)",
    ):
        assert tried in message
    for help_line in (
        "--symbols FILE",
        "--kernel-directory DIR",
        f"Debian       apt install linux-image-{release}-dbg",
        f"Ubuntu       apt install linux-image-unsigned-{release}-dbgsym",
        f"Fedora/RHEL  dnf debuginfo-install kernel-core-{release}",
        "SUSE         zypper --plus-content debug install kernel-default-debuginfo",
        "set DEBUGINFOD_URLS",
    ):
        assert help_line in message
    # drgn's own words are not added.
    assert not caplog.records


def test_missing_build_id() -> None:
    message = failure(prog=kernel(x86_text().replace(b"BUILD-ID", b"X")))
    assert "build ID not known" in message


def test_stripped(vmlinux: Path) -> None:
    vmlinux.write_bytes(debug_file(dwarf=False))
    assert f"--symbols {vmlinux} (stripped: it has no .debug_info)" in failure(vmlinux)


def test_debuginfod_is_asked_if_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any kernel, and last; drgn itself asks for Fedora's only."""
    prog = kernel()
    assert "debuginfod" not in prog.enabled_debug_info_finders()
    monkeypatch.delenv("DEBUGINFOD_URLS", raising=False)
    debuginfo._enable_debuginfod(prog)
    assert "debuginfod" not in prog.enabled_debug_info_finders()
    monkeypatch.setenv("DEBUGINFOD_URLS", "http://localhost:1/")
    debuginfo._enable_debuginfod(prog)
    if "debuginfod" in prog.registered_debug_info_finders():
        assert prog.enabled_debug_info_finders()[-1] == "debuginfod"
        assert "debuginfod (DEBUGINFOD_URLS=http://localhost:1/)" in debuginfo._missing(
            prog, None, (), ()
        )


def test_types_without_target(vmlinux: Path) -> None:
    prog = open_symbols([vmlinux])
    assert prog.platform == Platform(Architecture.X86_64)
    assert prog.type("struct crafted").members[0].name == "member"


def test_types_of_another_architecture(tmp_path: Path, vmlinux: Path) -> None:
    path = tmp_path / "s390x"
    path.write_bytes(debug_file(machine=target_files.EM_S390, order=">"))
    prog = open_symbols([path], "s390x")
    assert prog.platform == Platform(Architecture.S390X)
    assert prog.type("struct crafted").size == 4
    with pytest.raises(DebugInfoError, match="it is for s390x, not for x86_64"):
        open_symbols([path], "x86_64")
    with pytest.raises(DebugInfoError, match="it is for s390x, not for x86_64"):
        open_symbols([vmlinux, path])


def test_types_of_a_stripped_file(vmlinux: Path) -> None:
    vmlinux.write_bytes(debug_file(dwarf=False))
    with pytest.raises(DebugInfoError, match="no debugging information"):
        open_symbols([vmlinux])


def test_types_of_an_unsupported_architecture(vmlinux: Path) -> None:
    vmlinux.write_bytes(debug_file(machine=8))
    with pytest.raises(TargetError, match="unsupported architecture mips"):
        open_symbols([vmlinux])


def test_no_file_with_types() -> None:
    with pytest.raises(UsageError, match="--symbols"):
        open_symbols([])
