# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel addresses of riscv64, which drgn leaves to ptinspect."""

from __future__ import annotations

import struct

import pytest
from drgn import FaultError, Program
from synthetic_memory import LITTLE, PAGE, SparseMemory

from ptinspect.errors import TargetError
from ptinspect.kernel.paging.riscv64 import provide_kernel_translation, read_paging

IMAGE = 0xFFFFFFFF80000000
LINEAR = 0xFFFFFFD600000000
RAM = 0x80000000
ROOT = RAM + 0x10000
NOTE = (
    "OSRELEASE=6.12.0\nPAGESIZE=4096\n"
    f"SYMBOL(swapper_pg_dir)={IMAGE + 0x10000:x}\n"
    f"NUMBER(PAGE_OFFSET)={LINEAR:#x}\n"
    f"NUMBER(phys_ram_base)={RAM}\n"
    f"NUMBER(KERNEL_LINK_ADDR)={IMAGE:#x}\n"
    f"NUMBER(va_kernel_pa_offset)={IMAGE - RAM:#x}\n"
)


def program(note: str) -> tuple[Program, SparseMemory]:
    from drgn import Architecture, Platform

    prog = Program(Platform(Architecture.RISCV64, LITTLE))
    memory = SparseMemory()
    prog.add_memory_segment(
        0, (1 << 64) - 1, lambda address, count, offset, physical: memory.read(address, count), True
    )
    prog.set_linux_kernel_custom(note, False)
    return prog, memory


def put(memory: SparseMemory, address: int, value: int) -> None:
    memory.add(address, 8)
    memory.write(address, struct.pack("<Q", value))


def test_kernel_addresses_can_be_read() -> None:
    prog, memory = program(NOTE + "NUMBER(VA_BITS)=39\n")
    address = 0xFFFFFFC800000000
    indices = [(address >> shift) & 511 for shift in (30, 21, 12)]
    put(memory, ROOT + 8 * indices[0], (ROOT + PAGE) >> 2 | 1)
    put(memory, ROOT + PAGE + 8 * indices[1], (ROOT + 2 * PAGE) >> 2 | 1)
    for page in range(2):
        put(memory, ROOT + 2 * PAGE + 8 * (indices[2] + page), (RAM + 0x50000) >> 2 | 0xF)
    memory.add(RAM + 0x50000, PAGE)
    memory.write(RAM + 0x50000, bytes(range(256)) * 16)
    # A huge page, too.
    put(memory, ROOT + 8 * 511, 0x40000000 >> 2 | 0xF)
    memory.add(0x40000000, PAGE)
    with pytest.raises(FaultError, match="could not find memory segment"):
        prog.read(address, 8)
    provide_kernel_translation(prog)
    assert prog.read(address + 5, 4) == bytes([5, 6, 7, 8])
    assert prog.read(address + PAGE - 2, 4) == bytes([254, 255, 0, 1])
    assert prog.read(0xFFFFFFFFC0000000, 4) == bytes(4)
    with pytest.raises(FaultError):
        prog.read(address + 2 * PAGE, 4)
    with pytest.raises(FaultError):
        prog.read(address + 2 * PAGE - 4, 8)


@pytest.mark.parametrize(
    ("line", "mode"),
    [
        ("NUMBER(VA_BITS)=39", "Sv39"),
        ("NUMBER(VA_BITS)=57", "Sv57"),
        ("NUMBER(satp)=0x9000000000080010", "Sv48"),
    ],
)
def test_mode_is_read_from_the_note(line: str, mode: str) -> None:
    prog, _ = program(NOTE + line + "\n")
    prog.cache["ptinspect.paging"] = None
    assert read_paging(prog).mode == mode


def test_notes_that_tell_too_little_are_refused() -> None:
    prog, _ = program(NOTE)
    with pytest.raises(TargetError, match="0 address bits"):
        provide_kernel_translation(prog)
    prog, _ = program(NOTE.replace("va_kernel_pa_offset", "x") + "NUMBER(VA_BITS)=39\n")
    with pytest.raises(TargetError, match="va_kernel_pa_offset"):
        provide_kernel_translation(prog)
