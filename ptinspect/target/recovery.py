# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make a kernel program of one that can only read physical memory: find its VMCOREINFO there."""

from __future__ import annotations

from collections.abc import Sequence

from drgn import Architecture, FaultError, Program

from ptinspect.errors import TargetError
from ptinspect.target import chained, vmcoreinfo
from ptinspect.target.architecture import TargetArchitecture
from ptinspect.target.wording import reason


def with_note(
    name: str, base: Program, architecture: TargetArchitecture, note: bytes, live: bool
) -> Program:
    """
    A kernel program over one that reads physical memory.

    :param name: The target, for messages.
    :param note: The text of VMCOREINFO.
    :raises TargetError: if drgn cannot use the note
    """
    try:
        return chained.over_program(base, architecture.platform, note, live)
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(f"{name}: {reason(error)}") from None


def find_note(
    name: str,
    base: Program,
    architecture: TargetArchitecture,
    ranges: Sequence[tuple[int, int]],
) -> tuple[bytes, str]:
    """
    Find the note in physical memory and check that it describes that memory.

    :param name: The target, for messages.
    :param base: Reads physical memory.
    :param ranges: Start and size of the memory to search; none if reading is too slow for that.
    :return: the text of VMCOREINFO, and how it was found
    :raises TargetError: if there is none, with what to do about it
    """
    read = reader(base, physical=True)
    if architecture.drgn == Architecture.S390X:
        text = vmcoreinfo.from_lowcore(read)
        if text is not None and _describes(name, text, base, architecture):
            return text, "VMCOREINFO recovered from the lowcore"
    stale = 0
    for address, text in vmcoreinfo.search(read, ranges):
        if _describes(name, text, base, architecture):
            return text, f"VMCOREINFO found in memory at physical address {address:#x}"
        stale += 1
    raise TargetError(_advice(name, architecture, stale, bool(ranges)))


def _describes(name: str, text: bytes, base: Program, architecture: TargetArchitecture) -> bool:
    """Whether a note is of the kernel that is in the memory now, not of one that was there once."""
    try:
        prog = with_note(name, base, architecture, text, live=False)
    except TargetError:
        return False
    return vmcoreinfo.matches(text, reader(prog, physical=False)) is True


def reader(prog: Program, physical: bool) -> vmcoreinfo.Reader:
    """Read a program's memory, with None for what it does not have."""

    def read(address: int, size: int) -> bytes | None:
        try:
            data: bytes = prog.read(address, size, physical)
        except (FaultError, OverflowError, ValueError):
            return None
        return data

    return read


def _advice(name: str, architecture: TargetArchitecture, stale: int, searched: bool) -> str:
    remedies = ["give the note with --vmcoreinfo FILE"]
    if not searched:
        remedies.insert(0, "use a Unix socket on QEMU's machine, as root")
    elif architecture.drgn in (Architecture.X86_64, Architecture.AARCH64):
        remedies.insert(0, "run QEMU with -device vmcoreinfo and load qemu_fw_cfg in the guest")
    if not searched:
        why = "it gives no VMCOREINFO, and reading its memory is too slow to search for it"
    elif stale:
        why = f"of {stale} VMCOREINFO notes in its memory, none describes that memory"
    else:
        why = (
            "its memory has no VMCOREINFO note "
            "(the guest has not booted, or its kernel lacks CONFIG_VMCORE_INFO)"
        )
    return f"{name}: no Linux kernel recognised: {why}; {' or '.join(remedies)}"
