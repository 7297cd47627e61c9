# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a riscv64 kernel tells of its paging."""

from __future__ import annotations

import pytest
from drgn import Architecture, Platform, Program
from synthetic_memory import LITTLE

from ptinspect.errors import TargetError
from ptinspect.kernel.paging import Root
from ptinspect.kernel.paging.riscv64 import read_paging

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


def program(note: str) -> Program:
    prog = Program(Platform(Architecture.RISCV64, LITTLE))
    prog.set_linux_kernel_custom(note, False)
    return prog


def test_linear_addresses() -> None:
    prog = program(NOTE + "NUMBER(VA_BITS)=39\n")
    paging = read_paging(prog)
    assert paging.virtual_to_physical(prog, IMAGE + 0x10000) == ROOT
    assert paging.virtual_to_physical(prog, LINEAR + 0x5000) == RAM + 0x5000
    assert paging.kernel_root(prog) == Root(ROOT, 2, ((0, 512),))


@pytest.mark.parametrize(
    ("line", "mode"),
    [
        ("NUMBER(VA_BITS)=39", "Sv39"),
        ("NUMBER(VA_BITS)=57", "Sv57"),
        ("NUMBER(satp)=0x9000000000080010", "Sv48"),
    ],
)
def test_mode_is_read_from_the_note(line: str, mode: str) -> None:
    prog = program(NOTE + line + "\n")
    assert read_paging(prog).mode == mode


def test_notes_that_tell_too_little_are_refused() -> None:
    prog = program(NOTE)
    with pytest.raises(TargetError, match="0 address bits"):
        read_paging(prog)
    prog = program(NOTE.replace("va_kernel_pa_offset", "x") + "NUMBER(VA_BITS)=39\n")
    with pytest.raises(TargetError, match="va_kernel_pa_offset"):
        read_paging(prog).kernel_root(prog)
