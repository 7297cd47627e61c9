# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open a dump of a kernel: tell what the file is, repair what drgn cannot take, refuse the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drgn import Program

from ptinspect.errors import TargetError
from ptinspect.target import architecture as architectures
from ptinspect.target import chained, elf, kdump, recovery, vmcoreinfo, xen
from ptinspect.target.architecture import TargetArchitecture
from ptinspect.target.elf import ElfError, ElfFile
from ptinspect.target.options import Target, TargetKind

#: e_flags of an ELF dump that makedumpfile could not finish (its DUMP_ELF_INCOMPLETE).
_ELF_INCOMPLETE = 1
_INCOMPLETE_NOTE = "incomplete dump: makedumpfile ran out of space; memory is missing"


def open_core(path: Path, architecture: TargetArchitecture | None, note: bytes | None) -> Target:
    """
    Open a dump, without debugging information.

    A file that ends before the memory that its headers promise is refused: somebody's copy was cut
    short, and answers from it would look like answers about the whole. Only when the dump itself
    says that it is incomplete (makedumpfile ran out of space) is it opened, with a note: then there
    is no better one.

    :param note: VMCOREINFO to use instead of the dump's own.
    :raises TargetError: if the file is not a dump that can be opened, with the reason
    """
    with _opened(path) as fd:
        size = os.fstat(fd).st_size
        if size == 0:
            raise TargetError(f"{path}: the file is empty")
        start = os.pread(fd, 4096, 0)
        if start.startswith(elf.MAGIC):
            return _open_elf(path, fd, size, architecture, note)
        if start.startswith((kdump.SIGNATURE, kdump.FLATTENED_SIGNATURE)):
            return _open_kdump(path, fd, architecture, note)
        raise TargetError(f"{path}: not a dump: neither an ELF core nor a kdump file")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """
    A file descriptor of a dump.

    :raises TargetError: for what goes wrong while the file is read, too
    """
    try:
        if path.is_dir():
            raise TargetError(f"{path}: a folder, not a dump")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise TargetError(f"{path}: {error.strerror or error}") from None


def _open_elf(
    path: Path,
    fd: int,
    size: int,
    wanted: TargetArchitecture | None,
    note: bytes | None,
) -> Target:
    try:
        dump = elf.read_elf(fd)
    except ElfError as error:
        raise TargetError(f"{path}: not a usable dump: {error}") from None
    if dump.type != elf.ET_CORE:
        raise TargetError(f"{path}: not a dump: {dump.type_name} (give a vmlinux with --symbols)")
    found = architectures.by_elf(str(path), dump.machine, dump.bits, dump.little_endian)
    if wanted is not None and wanted != found:
        raise TargetError(f"{path}: --architecture {wanted.name}, but the dump is {found.name}")
    kinds = _NoteKinds(dump)
    if kinds.xen:
        raise TargetError(f"{path}: {xen.MESSAGE}")
    if kinds.user_space:
        raise TargetError(f"{path}: a core file of a user-space process, not of a kernel")
    notes: tuple[str, ...] = ()
    if dump.end > size:
        if not dump.flags & _ELF_INCOMPLETE:
            raise TargetError(
                f"{path}: truncated dump: it has {size} bytes of {dump.end}; copy it again"
            )
        notes += (_INCOMPLETE_NOTE,)
    if not dump.load_segments:
        raise TargetError(f"{path}: a dump without memory (no PT_LOAD segments)")
    if kinds.vmcoreinfo:
        prog = _native(path, Program(vmcoreinfo=note), path)
    elif note is not None:
        base = _physical(dump, found)
        prog = recovery.with_note(base, found, note, live=False)
    else:
        base = _physical(dump, found)
        ranges = [(s.paddr, s.filesz) for s in dump.load_segments]
        prog, how = recovery.recover(str(path), base, found, ranges, live=False)
        notes += (how,)
    return Target(prog, TargetKind.CORE, str(path), racing=False, notes=notes)


class _NoteKinds:
    """What the notes of an ELF core tell about its origin."""

    def __init__(self, dump: ElfFile) -> None:
        self.vmcoreinfo = False
        #: A kernel never writes an auxiliary vector; a process' core always has one.
        self.user_space = False
        self.xen = any(section.name.startswith(".xen_") for section in dump.sections)
        for note in dump.notes():
            if note.name == vmcoreinfo.NAME:
                self.vmcoreinfo = True
            elif note.name == b"CORE" and note.type == elf.NT_AUXV:
                self.user_space = True
            elif note.name in (b"Xen", b"VMCOREINFO_XEN"):
                self.xen = True


def _physical(dump: ElfFile, architecture: TargetArchitecture) -> Program:
    """A program that can do nothing but read physical memory from an ELF dump."""
    prog = Program(architecture.platform)
    chained.add_segments(prog, dump.fd, dump.load_segments)
    return prog


def _native(path: Path, prog: Program, file: Path | int) -> Program:
    """Let drgn open a dump as it is."""
    try:
        prog.set_core_dump(file)
    except Exception as error:
        raise TargetError(f"{path}: {error}") from None
    return prog


def _open_kdump(
    path: Path, fd: int, wanted: TargetArchitecture | None, note: bytes | None
) -> Target:
    prog = _native(path, Program(wanted.platform if wanted else None, vmcoreinfo=note), path)
    return Target(prog, TargetKind.CORE, str(path), racing=False)
