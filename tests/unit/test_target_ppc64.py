# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels of ppc64 whose VMCOREINFO does not name the MMU (before NUMBER(RADIX_MMU))."""

from __future__ import annotations

import pytest
from drgn import Architecture, Platform, Program

from ptinspect.target import chained

NOTE = (
    b"OSRELEASE=6.1.0\nPAGESIZE=65536\nSYMBOL(init_uts_ns)=c000000000001000\n"
    b"SYMBOL(swapper_pg_dir)=c000000000010000\nSYMBOL(_stext)=c000000000000000\n"
)


def over(note: bytes) -> Program:
    memory = bytes(range(256)) * 256
    base = Program(Platform(Architecture.PPC64))
    base.add_memory_segment(
        0, len(memory), lambda address, count, offset, physical: memory[offset:][:count], True
    )
    return chained.over_program(base, Platform(Architecture.PPC64), note, live=False)


def test_the_linear_map_is_read() -> None:
    assert over(NOTE).read(0xC000000000000102, 4) == b"\x02\x03\x04\x05"


def test_what_lies_above_it_needs_page_tables() -> None:
    with pytest.raises(LookupError, match="cur_cpu_spec"):
        over(NOTE).read(0xC008000000000000, 4)


def test_the_mmu_that_a_note_names_counts() -> None:
    """drgn is right to refuse what it cannot translate."""
    with pytest.raises(Exception, match="Radix"):
        over(NOTE + b"NUMBER(RADIX_MMU)=0\n").read(0xC000000000000102, 4)
