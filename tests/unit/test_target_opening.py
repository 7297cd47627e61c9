# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opening targets whole: options, debugging information, undoing at the end."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import pytest
import target_files
from drgn import FaultError, Object, Program, TypeEnumerator, host_platform
from target_fake_qemu import FakeQemu
from target_files import Load, debug_file, elf_core, kdump, note, x86_memory, x86_text

from ptinspect.errors import DebugInfoError, ExitStatus, TargetError, UsageError
from ptinspect.target import TargetKind, TargetOptions, guest, open_target
from ptinspect.target.xen import refuse_xen_pv

WHOLE_ELF = elf_core([Load(0, bytes(x86_memory()))], note(b"VMCOREINFO", 0, x86_text()))


@pytest.fixture
def vmlinux(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux"
    path.write_bytes(debug_file())
    return path


@pytest.fixture
def core(tmp_path: Path) -> Path:
    path = tmp_path / "vmcore"
    path.write_bytes(WHOLE_ELF)
    return path


def fails(**options: Any) -> str:
    """Opening fails as a target's error; its text is returned."""
    with pytest.raises(TargetError) as caught, open_target(TargetOptions(**options)):
        pass
    assert caught.value.exit_status == ExitStatus.TARGET
    return str(caught.value)


def test_core(core: Path, vmlinux: Path) -> None:
    with open_target(TargetOptions(core=core, symbols=(vmlinux,))) as target:
        assert target.kind is TargetKind.CORE
        assert target.name == str(core)
        assert not target.racing
        assert target.notes == ()
        assert target.prog.type("struct crafted").size == 4
        assert target.prog["UTS_RELEASE"].string_().decode() == target_files.RELEASE


def test_core_without_note(core: Path, vmlinux: Path) -> None:
    core.write_bytes(kdump(bytes(x86_memory())))
    with open_target(TargetOptions(core=core, symbols=(vmlinux,))) as target:
        assert target.notes == ("VMCOREINFO found in memory at physical address 0x40000",)


def test_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "samples" / "crafted"
    folder.mkdir(parents=True)
    (folder / "vmcore.xz").write_bytes(lzma.compress(WHOLE_ELF))
    (folder / "vmlinux.debug.xz").write_bytes(lzma.compress(debug_file()))
    monkeypatch.setenv("PTINSPECT_SAMPLES", str(tmp_path / "samples"))
    monkeypatch.setenv("PTINSPECT_CACHE", str(tmp_path / "cache"))
    with open_target(TargetOptions(sample="crafted")) as target:
        assert target.kind is TargetKind.SAMPLE
        assert target.name == "crafted"
        assert target.prog.type("struct crafted").size == 4


@pytest.mark.parametrize("arch", ["x86_64", "s390x"])
@pytest.mark.parametrize("pause", [False, True])
def test_guest(tmp_path: Path, arch: str, pause: bool) -> None:
    vmlinux = tmp_path / "vmlinux"
    machine = target_files.EM_S390 if arch == "s390x" else target_files.EM_X86_64
    vmlinux.write_bytes(debug_file(machine=machine, order=">" if arch == "s390x" else "<"))
    with FakeQemu(tmp_path, arch=arch) as fake:
        options = TargetOptions(qemu=fake.socket, symbols=(vmlinux,), pause=pause)
        with open_target(options) as target:
            assert target.kind is TargetKind.QEMU
            assert target.name == fake.socket
            assert target.racing != pause
            assert ("guest paused" in target.notes) == pause
            assert target.prog.type("struct crafted").size == 4
            assert fake.cpu_commands() == ["stop"] * pause
        assert fake.cpu_commands() == ["stop", "cont"] * pause


def test_guest_is_not_stopped_for_nothing(tmp_path: Path) -> None:
    """It runs while debugging information is loaded, and if that fails."""
    with FakeQemu(tmp_path, device=True) as fake:
        assert "no debugging information" in fails(qemu=fake.socket, pause=True)
        assert fake.cpu_commands() == []


def test_guest_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After drgn has attached, before everything is read."""
    with FakeQemu(tmp_path, device=True) as fake:
        monkeypatch.setattr(guest, "_is_slow", lambda prog, ranges: fake.end())
        assert "qmp: lost while it was opened: No such process" in fails(qemu=fake.socket)


def test_wrong_vmlinux(core: Path, vmlinux: Path) -> None:
    vmlinux.write_bytes(debug_file("ab" * 20))
    options = TargetOptions(core=core, symbols=(vmlinux,))
    with pytest.raises(DebugInfoError, match="wrong vmlinux"), open_target(options):
        pass


def test_note_of_another_kernel(tmp_path: Path, core: Path, vmlinux: Path) -> None:
    given = tmp_path / "vmcoreinfo"
    given.write_bytes(x86_text("6.1.0"))
    text = fails(core=core, symbols=(vmlinux,), vmcoreinfo=given)
    assert f"--vmcoreinfo {given} does not describe this memory" in text
    # Elsewhere than in memory is no better.
    given.write_bytes(x86_text().replace(b"ffffffff80020000", b"ffffffffa0020000"))
    text = fails(core=core, symbols=(vmlinux,), vmcoreinfo=given)
    assert f"--vmcoreinfo {given} does not describe this memory" in text


def test_own_note_of_another_kernel(core: Path, vmlinux: Path) -> None:
    other = note(b"VMCOREINFO", 0, x86_text("6.1.0"))
    core.write_bytes(elf_core([Load(0, bytes(x86_memory()))], other))
    assert "its VMCOREINFO does not describe this memory" in fails(core=core, symbols=(vmlinux,))


def test_kernel_data_left_out(core: Path, vmlinux: Path) -> None:
    """A dump without the kernel's data can be opened, but it is told."""
    load = Load(0, bytes(x86_memory())[: target_files.UTS_NAMESPACE])
    core.write_bytes(elf_core([load], note(b"VMCOREINFO", 0, x86_text())))
    with open_target(TargetOptions(core=core, symbols=(vmlinux,))) as target:
        assert target.notes == ("the kernel's own data cannot be read",)


def test_given_note(tmp_path: Path, core: Path, vmlinux: Path) -> None:
    core.write_bytes(elf_core([Load(0, bytes(x86_memory(with_note=False)))]))
    given = tmp_path / "vmcoreinfo"
    given.write_bytes(x86_text())
    options = TargetOptions(core=core, symbols=(vmlinux,), vmcoreinfo=given)
    with open_target(options) as target:
        assert target.notes == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": Path("x"), "qemu": "y"}, "--core and --qemu exclude each other"),
        ({"core": Path("x"), "sample": "y"}, "--core and --sample exclude each other"),
        ({"pause": True}, "--pause needs --qemu"),
        ({"pause": True, "core": Path("x")}, "--pause needs --qemu"),
    ],
)
def test_contradicting_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message), open_target(TargetOptions(**options)):
        pass


def test_bad_options(core: Path) -> None:
    assert "--architecture: unsupported architecture 'mips'" in fails(
        core=core, architecture="mips"
    )
    assert "--vmcoreinfo /nonexistent: No such file" in fails(
        core=core, vmcoreinfo=Path("/nonexistent")
    )
    assert "but the dump is x86_64" in fails(core=core, architecture="s390x")


def test_exceptions_pass_through(core: Path, vmlinux: Path) -> None:
    options = TargetOptions(core=core, symbols=(vmlinux,))
    with pytest.raises(ValueError, match="mine"), open_target(options):
        raise ValueError("mine")


@pytest.mark.parametrize("value", [0, 1, 2, None])
def test_xen(value: int | None) -> None:
    """XEN_NATIVE, XEN_PV_DOMAIN, XEN_HVM_DOMAIN; None: the variable cannot be read."""
    prog = Program(host_platform)
    names = ("XEN_NATIVE", "XEN_PV_DOMAIN", "XEN_HVM_DOMAIN")
    compatible = prog.int_type("unsigned int", 4, False, "little")
    enumerators = tuple(TypeEnumerator(name, number) for number, name in enumerate(names))
    domain_type = prog.enum_type("xen_domain_type", compatible, enumerators)

    def find(found_in: Program, name: str, flags: object, filename: object) -> Object | None:
        if name == "XEN_PV_DOMAIN":
            return Object(prog, domain_type, 1)
        if name == "xen_domain_type":
            return Object(prog, domain_type, value) if value is not None else missing
        return None

    missing = Object(prog, domain_type, address=0x1000)
    prog.register_object_finder("xen", find, enable_index=0)
    if value == 1:
        with pytest.raises(TargetError, match="a Xen PV kernel"):
            refuse_xen_pv(prog)
    else:
        refuse_xen_pv(prog)
        if value is None:
            with pytest.raises(FaultError):
                prog["xen_domain_type"].value_()


def test_no_xen() -> None:
    refuse_xen_pv(Program())
