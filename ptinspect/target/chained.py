# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A kernel program over any reader of physical memory.

drgn makes a target a kernel only if it finds VMCOREINFO in the way that it expects. Where it does
not, one Program (or a file) serves as the reader of physical memory, and a second one, which is
given the recovered note, does everything else: it translates kernel addresses itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Callable

from drgn import FaultError, Platform, Program

from ptinspect.target import ppc64, riscv64
from ptinspect.target.elf import Segment

#: drgn's memory reading callback: address, count, offset in the segment, physical -> bytes.
ReadFunction = Callable[[int, int, int, bool], bytes]

_WHOLE_ADDRESS_SPACE = (1 << 64) - 1


def over_program(base: Program, platform: Platform, note: bytes, live: bool) -> Program:
    """
    A kernel program that reads physical memory through another program.

    :param note: The text of the kernel's VMCOREINFO.
    :param live: Whether the memory may change while it is read.
    """

    def read(address: int, count: int, offset: int, physical: bool) -> bytes:
        data: bytes = base.read(address, count, True)
        return data

    prog = Program(platform)
    # Physical segments only: set_linux_kernel_custom() adds the virtual one that walks page tables.
    prog.add_memory_segment(0, _WHOLE_ADDRESS_SPACE, read, physical=True)
    prog.set_linux_kernel_custom(note, live)
    riscv64.add_virtual_memory(prog)
    ppc64.add_linear_map(prog)
    return prog


def add_segments(prog: Program, fd: int, segments: Sequence[Segment]) -> None:
    """Let a program read physical memory from the PT_LOAD segments of an ELF file."""
    file = _File(fd)
    for segment in segments:
        if segment.memsz:
            read = _segment_reader(file, segment)
            prog.add_memory_segment(segment.paddr, segment.memsz, read, physical=True)


class _File:
    """A file descriptor that lives as long as something reads from it."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)

    def __del__(self) -> None:
        os.close(self.fd)


def _segment_reader(file: _File, segment: Segment) -> ReadFunction:
    """
    Read from one PT_LOAD segment.

    What p_memsz has more than p_filesz is zero: so the ELF specification says, so drgn reads kernel
    dumps, and so whoever shrinks one writes it.
    """

    def read(address: int, count: int, offset: int, physical: bool) -> bytes:
        in_file = max(0, min(count, segment.filesz - offset))
        data = os.pread(file.fd, in_file, segment.offset + offset) if in_file else b""
        if len(data) < in_file:
            raise FaultError("the dump ends before this memory", address + len(data))
        return data + bytes(count - in_file)

    return read
