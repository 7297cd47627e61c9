# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open a kernel's dump in makedumpfile's compressed format (kdump)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drgn import Architecture, Platform, Program

from ptinspect.errors import TargetError
from ptinspect.target import architecture as architectures
from ptinspect.target import drgn_log, kdump, ppc64, recovery, vmcoreinfo
from ptinspect.target.architecture import TargetArchitecture
from ptinspect.target.kdump import Kdump, KdumpError
from ptinspect.target.options import INCOMPLETE, Target, TargetKind
from ptinspect.target.wording import reason

#: Tells drgn to translate addresses of kdump files itself, where it can.
_PREFER_WALKER = "DRGN_PREFER_PGTABLE_READER"


def open_kdump(
    path: Path, fd: int, wanted: TargetArchitecture | None, note: bytes | None
) -> Target:
    """
    Open a kdump file through libkdumpfile.

    The architecture is always given, since some headers lack it. A file in the flattened format
    needs no unpacking: libkdumpfile reads it where it is.

    :param fd: The open file, for its headers.
    :param note: VMCOREINFO to use instead of the dump's own.
    :raises TargetError: if it cannot be opened, with the reason
    """
    try:
        dump = kdump.read_kdump(fd)
    except KdumpError as error:
        raise TargetError(f"{path}: {reason(error)}") from None
    found = _architecture(path, dump, wanted)
    notes: tuple[str, ...] = ()
    if dump.incomplete:
        notes += (INCOMPLETE,)
    if dump.excluded_vmemmap:
        notes += ("makedumpfile -e left out parts of the memory map",)
    if dump.dump_level > 1:
        # Pages of zeroes are no loss: they share one page of the dump, and read as what they were.
        notes += (
            f"filtered dump (makedumpfile -d {dump.dump_level}): what was left out cannot be read",
        )
    if dump.flattened:
        notes += ("flattened kdump",)
    text = note if note is not None else dump.vmcoreinfo
    if text is None:
        text, how = recovery.find_note(str(path), _physical(path, dump), found, list(dump.ranges()))
        notes += (how,)
    prog = _kernel(path, dump, found, text)
    return Target(prog, TargetKind.CORE, str(path), racing=False, notes=notes)


def _architecture(path: Path, dump: Kdump, wanted: TargetArchitecture | None) -> TargetArchitecture:
    if dump.machine is None:
        if wanted is None:
            raise TargetError(f"{path}: its header names no machine; give --architecture")
        return wanted
    found = architectures.by_name(dump.machine, str(path))
    if wanted is not None and wanted != found:
        raise TargetError(f"{path}: --architecture {wanted.name}, but the dump is {found.name}")
    return found


def _kernel(path: Path, dump: Kdump, architecture: TargetArchitecture, text: bytes) -> Program:
    """
    The kernel program of a kdump file.

    libkdumpfile knows one page size, the file's, which need not be the kernel's; on ppc64 it knows
    nothing but 64 KiB, and on s390x it wants a pointer in the lowcore. Where that gets in the way,
    and on riscv64, where drgn cannot translate addresses itself, a second program translates
    addresses and this one only reads pages.

    :param text: VMCOREINFO.
    """
    walked_by_drgn = architecture.drgn != Architecture.RISCV64
    if walked_by_drgn and vmcoreinfo.page_size(text) == dump.block_size:
        try:
            prog = _program(path, architecture.platform, text)
            for start, _ in dump.ranges():
                prog.read(start, 1, True)
                break
        except Exception:
            # Whatever is really wrong with the file comes out below.
            pass
        else:
            ppc64.add_linear_map(prog)
            return prog
    return recovery.with_note(str(path), _physical(path, dump), architecture, text, live=False)


def _physical(path: Path, dump: Kdump) -> Program:
    """
    A program that can do nothing but read physical memory from a kdump file.

    libkdumpfile prepares to translate addresses even if none is: so the file is given out for one
    of x86_64, the architecture that needs the least for it, with just these fields of VMCOREINFO.
    The pages are the same in all of them.
    """
    least = (
        f"OSRELEASE=5.0.0\nPAGESIZE={dump.block_size}\nSYMBOL(swapper_pg_dir)=1\n"
        "NUMBER(pgtable_l5_enabled)=0\nNUMBER(phys_base)=0\nKERNELOFFSET=0\n"
    )
    try:
        return _program(path, Platform(Architecture.X86_64), least.encode())
    except Exception as error:
        raise TargetError(f"{path}: {reason(error)}") from None


def _program(path: Path, platform: Platform, text: bytes) -> Program:
    prog = Program(platform, vmcoreinfo=text)
    with _page_table_reader(), drgn_log.without("flattened"):
        prog.set_core_dump(path)
    return prog


@contextmanager
def _page_table_reader() -> Iterator[None]:
    """
    Make drgn translate addresses of kdump files with its own page table walker.

    libkdumpfile's does not find the modules and the stack of an s390x kernel with a randomised
    base; and so every kind of target translates in the same way.
    """
    before = os.environ.get(_PREFER_WALKER)
    os.environ[_PREFER_WALKER] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PREFER_WALKER]
        else:
            os.environ[_PREFER_WALKER] = before
