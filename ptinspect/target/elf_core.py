# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open a kernel's dump in ELF format, with or without VMCOREINFO."""

from __future__ import annotations

import os
from pathlib import Path

from drgn import Architecture, FaultError, Program

from ptinspect.errors import TargetError
from ptinspect.target import architecture as architectures
from ptinspect.target import chained, elf, ppc64, recovery, riscv64, vmcoreinfo, xen
from ptinspect.target.architecture import TargetArchitecture
from ptinspect.target.elf import ElfError, ElfFile
from ptinspect.target.options import INCOMPLETE, Target, TargetKind
from ptinspect.target.wording import reason

#: e_flags of an ELF dump that makedumpfile could not finish (its DUMP_ELF_INCOMPLETE).
_ELF_INCOMPLETE = 1


def open_elf(path: Path, fd: int, wanted: TargetArchitecture | None, note: bytes | None) -> Target:
    """
    Open an ELF dump.

    :param fd: The open file.
    :param note: VMCOREINFO to use instead of the dump's own.
    :raises TargetError: if it cannot be opened, with the reason
    """
    try:
        dump = elf.read_elf(fd)
    except ElfError as error:
        raise TargetError(f"{path}: not a usable dump: {reason(error)}") from None
    if dump.type != elf.ET_CORE:
        raise TargetError(f"{path}: not a dump: {dump.type_name} (give a vmlinux with --symbols)")
    found = _architecture(path, dump)
    if wanted is not None and wanted != found:
        raise TargetError(f"{path}: --architecture {wanted.name}, but the dump is {found.name}")
    kinds = _NoteKinds(dump)
    if kinds.xen:
        raise TargetError(f"{path}: {xen.MESSAGE}")
    if kinds.user_space:
        raise TargetError(f"{path}: a core file of a user-space process, not of a kernel")
    notes: tuple[str, ...] = ()
    size = os.fstat(fd).st_size
    if dump.end > size:
        if not dump.flags & _ELF_INCOMPLETE:
            raise TargetError(
                f"{path}: truncated dump: it has {size} bytes of {dump.end}; copy it again"
            )
        notes += (INCOMPLETE,)
    if not dump.load_segments:
        raise TargetError(f"{path}: a dump without memory (no PT_LOAD segments)")
    # QEMU writes no virtual addresses; drgn takes their 0 for one.
    without_addresses = all(segment.vaddr == 0 for segment in dump.load_segments)
    if kinds.vmcoreinfo and not (without_addresses and found.drgn == Architecture.S390X):
        prog = _elf_program(path, note)
        riscv64.add_virtual_memory(prog)
        ppc64.add_linear_map(prog)
        if without_addresses:
            _hide_low_addresses(prog)
    elif note is not None or kinds.vmcoreinfo:
        text = note if note is not None else kinds.vmcoreinfo
        prog = recovery.with_note(str(path), _physical(dump, found), found, text, live=False)
    else:
        base = _physical(dump, found)
        ranges = [(s.paddr, s.filesz) for s in dump.load_segments]
        text, how = recovery.find_note(str(path), base, found, ranges)
        prog = recovery.with_note(str(path), base, found, text, live=False)
        notes += (how,)
    return Target(prog, TargetKind.CORE, str(path), racing=False, notes=notes)


def _architecture(path: Path, dump: ElfFile) -> TargetArchitecture:
    little_endian = dump.little_endian
    if dump.machine == elf.EM_PPC64 and not any(n.name == vmcoreinfo.NAME for n in dump.notes()):
        # QEMU writes the headers of a pseries guest in the order in which its CPU takes interrupts
        # at first, big-endian, whatever the kernel's is. Only VMCOREINFO, once found, will tell.
        little_endian = True
    return architectures.by_elf(str(path), dump.machine, dump.bits, little_endian)


class _NoteKinds:
    """What the notes of an ELF core tell about its origin."""

    def __init__(self, dump: ElfFile) -> None:
        #: The text of VMCOREINFO; empty if there is none.
        self.vmcoreinfo = b""
        #: A kernel never writes an auxiliary vector; a process' core always has one.
        self.user_space = False
        self.xen = any(section.name.startswith(".xen_") for section in dump.sections)
        for note in dump.notes():
            if note.name == vmcoreinfo.NAME:
                self.vmcoreinfo = note.desc
            elif note.name == b"CORE" and note.type == elf.NT_AUXV:
                self.user_space = True
            elif note.name in (b"Xen", b"VMCOREINFO_XEN"):
                self.xen = True


def _elf_program(path: Path, note: bytes | None) -> Program:
    """Let drgn open an ELF dump as it is."""
    try:
        prog = Program(vmcoreinfo=note)
        prog.set_core_dump(path)
    except Exception as error:
        raise TargetError(f"{path}: {reason(error)}") from None
    return prog


def _hide_low_addresses(prog: Program) -> None:
    """
    Make the lower half of the address space fault, as it does in every other target.

    No kernel but s390's has anything there; without this, what a null or wild pointer points to
    would be the beginning of physical memory.
    """

    def fault(address: int, count: int, offset: int, physical: bool) -> bytes:
        raise FaultError("not a kernel address", address)

    prog.add_memory_segment(0, 1 << 63, fault, physical=False)


def _physical(dump: ElfFile, architecture: TargetArchitecture) -> Program:
    """A program that can do nothing but read physical memory from an ELF dump."""
    prog = Program(architecture.platform)
    chained.add_segments(prog, dump.fd, dump.load_segments)
    return prog
