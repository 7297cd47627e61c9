# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Dumps: the ways to open them, and what is refused."""

from __future__ import annotations

import gzip
import lzma
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import target_files
from drgn import FaultError, Program, ProgramFlags
from target_files import (
    EM_386,
    EM_ARM,
    EM_PPC64,
    EM_S390,
    EM_X86_64,
    Load,
    elf_core,
    flattened,
    kdump,
    note,
    s390x_memory,
    x86_memory,
    x86_text,
)

from ptinspect.errors import ExitStatus, TargetError
from ptinspect.target import architecture, core
from ptinspect.target.core import open_core
from ptinspect.target.options import Target, TargetKind

X86_NOTE = note(b"VMCOREINFO", 0, x86_text())
QEMU_NOTE = note(b"QEMU", 0, bytes(440))
PRSTATUS = note(b"CORE", 1, bytes(336))
UTS = target_files.UTS_NAMESPACE + 8


def opened(folder: Path, content: bytes, **options: object) -> Target:
    path = folder / "vmcore"
    path.write_bytes(content)
    wanted, given = options.get("architecture"), options.get("note")
    assert wanted is None or isinstance(wanted, architecture.TargetArchitecture)
    assert given is None or isinstance(given, bytes)
    target = open_core(path, wanted, given)
    assert target.kind is TargetKind.CORE
    assert target.name == str(path)
    assert not target.racing
    return target


def check_kernel(prog: Program, kernel_base: int) -> None:
    """Memory can be read by both kinds of address, and what is not there faults."""
    assert prog.flags & ProgramFlags.IS_LINUX_KERNEL
    assert not prog.flags & ProgramFlags.IS_LIVE
    assert prog["UTS_RELEASE"].string_().decode() == target_files.RELEASE
    assert prog.read(UTS, 5, True) == b"Linux"
    assert prog.read_c_string(kernel_base + UTS) == b"Linux"
    with pytest.raises(FaultError):
        prog.read(target_files.MEMORY_BYTES, 1, True)
    with pytest.raises(FaultError):
        prog.read(1 << 40, 1)


def x86_loads() -> Sequence[Load]:
    """As QEMU writes them: without virtual addresses, with a hole."""
    memory = bytes(x86_memory())
    return [Load(0, memory[:0xA0000]), Load(0xC0000, memory[0xC0000:])]


def test_elf(tmp_path: Path) -> None:
    target = opened(tmp_path, elf_core(x86_loads(), PRSTATUS + X86_NOTE))
    assert target.notes == ()
    check_kernel(target.prog, target_files.X86_KERNEL)


def test_null_pointer_faults(tmp_path: Path) -> None:
    """drgn takes the virtual address 0 that QEMU writes for one; the start of memory is no NULL."""
    prog = opened(tmp_path, elf_core(x86_loads(), X86_NOTE)).prog
    for address in (0, 8, UTS, 0x7FFF00000000):
        with pytest.raises(FaultError):
            prog.read(address, 8)


def test_elf_with_virtual_addresses(tmp_path: Path) -> None:
    """As kexec writes them: no reason to change how drgn reads the file."""
    load = Load(0, bytes(x86_memory()), vaddr=target_files.X86_KERNEL)
    check_kernel(
        opened(tmp_path, elf_core([load], X86_NOTE)).prog,
        target_files.X86_KERNEL,
    )


@pytest.mark.parametrize("notes", [b"", PRSTATUS + QEMU_NOTE])
def test_elf_without_note(tmp_path: Path, notes: bytes) -> None:
    target = opened(tmp_path, elf_core(x86_loads(), notes))
    assert target.notes == ("VMCOREINFO found in memory at physical address 0x40000",)
    check_kernel(target.prog, target_files.X86_KERNEL)


def test_elf_s390x(tmp_path: Path) -> None:
    load = Load(0, bytes(s390x_memory()))
    target = opened(tmp_path, elf_core([load], machine=EM_S390, order=">"))
    assert target.notes == ("VMCOREINFO recovered from the lowcore",)
    check_kernel(target.prog, 0)


def test_elf_s390x_with_note(tmp_path: Path) -> None:
    load = Load(0, bytes(s390x_memory(with_pointer=False)))
    text = note(b"VMCOREINFO", 0, target_files.s390x_text(), ">")
    target = opened(tmp_path, elf_core([load], text, machine=EM_S390, order=">"))
    assert target.notes == ()
    check_kernel(target.prog, 0)


def test_zero_pages(tmp_path: Path) -> None:
    """What a segment has more in memory than in the file is zero."""
    memory = bytes(x86_memory())
    loads = [Load(0, memory), Load(0x200000, b"x" * 10, memsz=0x2000)]
    for notes in (X86_NOTE, b""):
        prog = opened(tmp_path, elf_core(loads, notes)).prog
        assert prog.read(0x200000, 0x2000, True) == b"x" * 10 + bytes(0x1FF6)
        with pytest.raises(FaultError):
            prog.read(0x202000, 1, True)


def test_stale_notes(tmp_path: Path) -> None:
    """A note of a kernel that was there before does not describe the memory of this one."""
    memory = x86_memory()
    stale = note(b"VMCOREINFO", 0, x86_text("5.10.0-before"))
    memory[0x80000 : 0x80000 + len(stale)] = stale
    target = opened(tmp_path, elf_core([Load(0, bytes(memory))]))
    assert "0x40000" in target.notes[0]
    memory[target_files.NOTE_ADDRESS :][:12] = bytes(12)
    memory[target_files.NOTE_ADDRESS : target_files.NOTE_ADDRESS + 12] = bytes(12)
    refused(tmp_path, elf_core([Load(0, bytes(memory))]), "of 1 VMCOREINFO notes .* none describes")


def test_without_any_note(tmp_path: Path) -> None:
    memory = bytes(x86_memory(with_note=False))
    advice = r"no VMCOREINFO note.*-device vmcoreinfo.*qemu_fw_cfg.*--vmcoreinfo FILE"
    refused(tmp_path, elf_core([Load(0, memory)], QEMU_NOTE), advice)
    refused(tmp_path, kdump(memory), advice)
    # ppc64's pseries machine has no such device.
    load = Load(0, memory)
    text = refused(tmp_path, elf_core([load], machine=EM_PPC64, order=">"), "--vmcoreinfo FILE")
    assert "-device" not in text


def test_given_note(tmp_path: Path) -> None:
    memory = bytes(x86_memory(with_note=False))
    for content in (elf_core([Load(0, memory)]), kdump(memory), flattened(kdump(memory))):
        check_kernel(opened(tmp_path, content, note=x86_text()).prog, target_files.X86_KERNEL)
    # It overrides the dump's own.
    wrong = note(b"VMCOREINFO", 0, x86_text("1.2.3"))
    prog = opened(tmp_path, elf_core([Load(0, memory)], wrong), note=x86_text()).prog
    check_kernel(prog, target_files.X86_KERNEL)


@pytest.mark.parametrize("machine", ["x86_64", "", "Unknown"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("with_note", [False, True])
def test_kdump(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    machine: str,
    flat: bool,
    with_note: bool,
) -> None:
    content = kdump(
        bytes(x86_memory()),
        machine=machine,
        notes=PRSTATUS,
        vmcoreinfo=x86_text() if with_note else b"",
    )
    target = opened(tmp_path, flattened(content) if flat else content)
    assert ("flattened kdump" in target.notes) == flat
    assert any("physical address 0x40000" in how for how in target.notes) != with_note
    check_kernel(target.prog, target_files.X86_KERNEL)
    assert not caplog.records


def test_kdump_s390x(tmp_path: Path) -> None:
    content = kdump(bytes(s390x_memory()), machine="S390X", order=">")
    target = opened(tmp_path, content)
    assert target.notes == ("VMCOREINFO recovered from the lowcore",)
    check_kernel(target.prog, 0)


def test_kdump_s390x_without_pointer(tmp_path: Path) -> None:
    """libkdumpfile does not open these as s390x at all."""
    content = kdump(bytes(s390x_memory(with_pointer=False)), machine="s390x", order=">")
    target = opened(tmp_path, content)
    assert target.notes == ("VMCOREINFO found in memory at physical address 0x40000",)
    check_kernel(target.prog, 0)


def test_kdump_with_another_page_size(tmp_path: Path) -> None:
    """The file's pages need not be the kernel's: QEMU's of ppc64 are 64 KiB."""
    content = kdump(bytes(x86_memory()), block_size=65536)
    check_kernel(opened(tmp_path, content).prog, target_files.X86_KERNEL)


def test_environment_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "DRGN_PREFER_PGTABLE_READER"
    for value in (None, "0"):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
        opened(tmp_path, kdump(bytes(x86_memory()), vmcoreinfo=x86_text()))
        assert os.environ.get(name) == value


def test_kdump_without_machine(tmp_path: Path) -> None:
    content = kdump(bytes(x86_memory()), machine="")
    refused(tmp_path, content, "names no machine; give --architecture")
    target = opened(tmp_path, content, architecture=architecture.by_name("x86_64"))
    check_kernel(target.prog, target_files.X86_KERNEL)


def refused(folder: Path, content: bytes, message: str, **options: object) -> str:
    """Opening fails with one line that says this; the line is returned."""
    with pytest.raises(TargetError, match=message) as caught:
        opened(folder, content, **options)
    text = str(caught.value)
    assert text.startswith(str(folder / "vmcore"))
    assert "\n" not in text
    assert caught.value.exit_status == ExitStatus.TARGET
    return text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"x", "not a dump: neither an ELF core nor a kdump file"),
        (b"hello\n" * 1000, "not a dump: neither an ELF core nor a kdump file"),
        (gzip.compress(b"x"), "not a dump: a gzip file: unpack it first"),
        (lzma.compress(b"x"), "not a dump: an xz file: unpack it first"),
        (b"LibvirtQemudSave" + bytes(99), "use virsh dump --memory-only"),
        (b"LibvirtQemudPart" + bytes(99), "use virsh dump --memory-only"),
        (b"QEVM" + bytes(99), "use dump-guest-memory"),
        (bytes.fromhex("a8190173618f23fd") + bytes(99), "zgetdump"),
        (target_files.debug_file(), "not a dump: an executable .*--symbols"),
        (elf_core([], kind=1), "not a dump: a relocatable object"),
        (elf_core([]), "a dump without memory"),
        (b"\x7fELF", "not a usable dump"),
        (kdump(bytes(4096), machine="i686"), "unsupported architecture 'i686'"),
        (kdump(bytes(4096), machine="ppc64"), "unsupported architecture 'ppc64'"),
        (kdump(bytes(4096), split=1), "--reassemble"),
        (b"KDUMP   ", "truncated dump"),
        (b"KDUMP   " + bytes(9999), "malformed"),
        (b"makedumpfile\0\0\0\0", "truncated dump"),
    ],
)
def test_not_a_dump(tmp_path: Path, content: bytes, message: str) -> None:
    refused(tmp_path, content, message)


def test_running_kernel_as_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--core /proc/kcore is the live kernel, whatever it is called."""
    live = Target(Program(), TargetKind.LIVE, "kcore", racing=True)
    monkeypatch.setattr(core, "KCORE", tmp_path / "kcore")
    monkeypatch.setattr(core, "open_live", lambda wanted, note: live)
    (tmp_path / "link").symlink_to(tmp_path / "kcore")
    assert open_core(tmp_path / "link", None, None) is live


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"vmcore: No such file or directory"):
        open_core(tmp_path / "vmcore", None, None)


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="a folder, not a dump"):
        open_core(tmp_path, None, None)


@pytest.mark.parametrize("left_out", [1, 4096, 900_000])
@pytest.mark.parametrize("notes", [X86_NOTE, b""])
def test_truncated_elf(tmp_path: Path, left_out: int, notes: bytes) -> None:
    whole = elf_core(x86_loads(), notes)
    refused(
        tmp_path,
        whole[:-left_out],
        f"truncated dump: it has {len(whole) - left_out} bytes of {len(whole)}; copy it again",
    )


def test_incomplete_elf(tmp_path: Path) -> None:
    """makedumpfile itself says that it ran out of space: opened, with a note."""
    memory = bytes(x86_memory())
    target = opened(tmp_path, elf_core([Load(0, memory)], X86_NOTE, flags=1)[:-4096])
    assert "incomplete dump" in target.notes[0]
    assert target.prog.read(UTS, 5, True) == b"Linux"
    with pytest.raises(FaultError):
        target.prog.read(target_files.MEMORY_BYTES - 4096, 1, True)


def test_truncated_kdump(tmp_path: Path) -> None:
    whole = kdump(bytes(x86_memory()), vmcoreinfo=x86_text())
    refused(tmp_path, whole[:-1], "truncated dump")
    refused(tmp_path, flattened(whole)[:-1], "truncated dump")


def test_incomplete_kdump(tmp_path: Path) -> None:
    whole = kdump(bytes(x86_memory()), vmcoreinfo=x86_text(), status=0x9)
    target = opened(tmp_path, whole[:-10])
    assert "incomplete dump" in target.notes[0]
    assert target.prog.read(UTS, 5, True) == b"Linux"


def test_filtered_dump_is_told(tmp_path: Path) -> None:
    content = kdump(bytes(x86_memory()), vmcoreinfo=x86_text(), dump_level=31)
    assert "filtered dump (makedumpfile -d 31)" in opened(tmp_path, content).notes[0]


def test_partial_memory_map_is_told(tmp_path: Path) -> None:
    content = kdump(bytes(x86_memory()), vmcoreinfo=x86_text(), status=0x11)
    assert "makedumpfile -e" in opened(tmp_path, content).notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (target_files.elf32(EM_386), "unsupported architecture i386"),
        (target_files.elf32(EM_ARM), "unsupported architecture arm"),
        (target_files.elf32(EM_X86_64), "32-bit little-endian x86_64"),
        (elf_core([], machine=258), "loongarch64"),
        (elf_core([], machine=4711), "ELF machine 4711"),
        (elf_core([], machine=EM_X86_64, order=">"), "64-bit big-endian x86_64"),
        (elf_core([], machine=EM_S390), "64-bit little-endian s390x"),
    ],
)
def test_unsupported_architecture(tmp_path: Path, content: bytes, message: str) -> None:
    refused(tmp_path, content, message)


def test_big_endian_ppc64(tmp_path: Path) -> None:
    text = note(b"VMCOREINFO", 0, x86_text(), ">")
    content = elf_core([Load(0, bytes(4096))], text, machine=EM_PPC64, order=">")
    refused(tmp_path, content, "64-bit big-endian ppc64")


@pytest.mark.parametrize(
    "content", [elf_core([Load(0, bytes(x86_memory()))]), kdump(bytes(x86_memory()))]
)
def test_contradicting_architecture(tmp_path: Path, content: bytes) -> None:
    s390x = architecture.by_name("s390x")
    message = "--architecture s390x, but the dump is x86_64"
    refused(tmp_path, content, message, architecture=s390x)


def test_user_space_core(tmp_path: Path) -> None:
    notes = PRSTATUS + note(b"CORE", 6, bytes(320))
    load = Load(0, b"stack", vaddr=0x7FFFF7DD0000)
    refused(tmp_path, elf_core([load], notes), "a core file of a user-space process")


@pytest.mark.parametrize("name", [b"Xen", b"VMCOREINFO_XEN"])
def test_xen_notes(tmp_path: Path, name: bytes) -> None:
    content = elf_core(x86_loads(), X86_NOTE + note(name, 0x1000001, bytes(80)))
    refused(tmp_path, content, "Xen PV")


def test_unusable_own_note(tmp_path: Path) -> None:
    """drgn's words, but as an error of the target."""
    bad = note(b"VMCOREINFO", 0, b"OSRELEASE=6.1\nPAGESIZE=3\n")
    refused(tmp_path, elf_core(x86_loads(), bad), "VMCOREINFO")
    refused(tmp_path, kdump(bytes(x86_memory()), vmcoreinfo=b"junk\n"), "VMCOREINFO")
