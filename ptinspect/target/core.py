# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open a dump of a kernel: tell what the file is, and refuse what is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ptinspect.errors import TargetError
from ptinspect.target import elf, kdump
from ptinspect.target.architecture import TargetArchitecture
from ptinspect.target.elf_core import open_elf
from ptinspect.target.kdump_core import open_kdump
from ptinspect.target.live import KCORE, open_live
from ptinspect.target.options import Target
from ptinspect.target.wording import reason

#: What people give for a dump, by the bytes at its start.
_OTHER_FILES = (
    (b"\x1f\x8b", "a gzip file: unpack it first"),
    (b"\xfd7zXZ\0", "an xz file: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file: unpack it first"),
    (b"BZh", "a bzip2 file: unpack it first"),
    (b"QFI\xfb", "a QEMU disk image"),
    (b"QEVM", "a QEMU migration stream: use dump-guest-memory instead"),
    (b"LibvirtQemudSave", "a libvirt save file: use virsh dump --memory-only instead"),
    (
        b"LibvirtQemudPart",
        "an unfinished libvirt save file: use virsh dump --memory-only",
    ),
    (b"PAGEDU64", "a Windows crash dump"),
    (b"DISKDUMP", "a diskdump file, which drgn does not read"),
    (bytes.fromhex("a8190173618f23fd"), "an s390 stand-alone dump: convert it with zgetdump"),
    (bytes.fromhex("a8190173618f23fe"), "an s390 stand-alone dump: convert it with zgetdump"),
)


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
    if os.path.realpath(path) == str(KCORE):
        # It is an ELF core, but one that changes while it is read.
        return open_live(architecture, note)
    with _opened(path) as fd:
        start = os.pread(fd, 64, 0)
        if not start:
            raise TargetError(f"{path}: the file is empty")
        if start.startswith(elf.MAGIC):
            return open_elf(path, fd, architecture, note)
        if start.startswith((kdump.SIGNATURE, kdump.FLATTENED_SIGNATURE)):
            return open_kdump(path, fd, architecture, note)
        raise TargetError(f"{path}: not a dump: {_what_else(start)}")


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
        raise TargetError(f"{path}: {reason(error)}") from None


def _what_else(start: bytes) -> str:
    for magic, name in _OTHER_FILES:
        if start.startswith(magic):
            return name
    return "neither an ELF core nor a kdump file"
