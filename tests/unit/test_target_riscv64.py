# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel virtual memory of riscv64, in all paging modes and sizes of leaf."""

from __future__ import annotations

import struct

import pytest
import target_files
from drgn import Architecture, FaultError, Platform, Program

from ptinspect.errors import TargetError
from ptinspect.target.riscv64 import add_virtual_memory

VALID, LEAF, NAPOT = 0x1, 0xE, 1 << 63
#: swapper_pg_dir is at this offset from the physical address 0.
KERNEL = 0xFFFFFFFF80000000
TABLES = 0x10000

#: Where the leaf of each size begins, by virtual address in the lowest mode, with its size.
LEAVES = {
    "4 KiB": (0xFFFFFFD600000000, 1 << 12),
    "64 KiB": (0xFFFFFFD600010000, 1 << 16),
    "2 MiB": (0xFFFFFFD600200000, 1 << 21),
    "1 GiB": (0xFFFFFFD640000000, 1 << 30),
}


class Kernel:
    """Page tables with one leaf of each size; the byte at each physical address tells it."""

    def __init__(self, bits: int) -> None:
        self.tables = bytearray(0x10000)
        self.used = 1
        self.levels = {39: 3, 48: 4, 57: 5}[bits]
        self.put(LEAVES["4 KiB"][0], 0, 0x800001 << 10 | LEAF | VALID)
        for page in range(16):
            self.put(LEAVES["64 KiB"][0] + (page << 12), 0, 0x800018 << 10 | LEAF | VALID | NAPOT)
        self.put(LEAVES["2 MiB"][0], 1, 0x800200 << 10 | LEAF | VALID)
        self.put(LEAVES["1 GiB"][0], 2, 0xC0000 << 10 | LEAF | VALID)
        text = target_files.vmcoreinfo_text(
            KERNEL + TABLES,
            KERNEL,
            extra=f"NUMBER(va_kernel_pa_offset)={KERNEL:#x}\nNUMBER(VA_BITS)={bits}\n",
        )
        self.prog = Program(Platform(Architecture.RISCV64))
        self.prog.add_memory_segment(0, 1 << 56, self.pattern, physical=True)
        self.prog.add_memory_segment(TABLES, len(self.tables), self.table, physical=True)
        self.prog.set_linux_kernel_custom(text, False)
        add_virtual_memory(self.prog)

    def put(self, address: int, level: int, entry: int) -> None:
        table = 0
        for above in reversed(range(level + 1, self.levels)):
            at = table + 8 * (address >> (12 + 9 * above) & 0x1FF)
            (link,) = struct.unpack_from("<Q", self.tables, at)
            if not link:
                link = (TABLES + 0x1000 * self.used) >> 12 << 10 | VALID
                self.used += 1
                struct.pack_into("<Q", self.tables, at, link)
            table = (link >> 10 << 12) - TABLES
        struct.pack_into(
            "<Q", self.tables, table + 8 * (address >> (12 + 9 * level) & 0x1FF), entry
        )

    @staticmethod
    def pattern(address: int, count: int, offset: int, physical: bool) -> bytes:
        start = address // 8
        words = range(start, (address + count + 7) // 8)
        data = b"".join(struct.pack("<Q", word) for word in words)
        return data[address - start * 8 :][:count]

    def table(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        return bytes(self.tables[offset : offset + count])


@pytest.fixture(params=[39, 48, 57])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return Kernel(request.param)


@pytest.mark.parametrize(
    ("name", "physical"),
    [
        ("4 KiB", 0x800001000),
        ("64 KiB", 0x800010000),
        ("2 MiB", 0x800200000),
        ("1 GiB", 0xC0000000),
    ],
)
def test_leaves(kernel: Kernel, name: str, physical: int) -> None:
    address, size = LEAVES[name]
    for offset in (0, 8, size // 2, size - 8):
        assert kernel.prog.read_u64(address + offset) == (physical + offset) // 8
    assert kernel.prog.read(address + 3, 11) == kernel.prog.read(physical + 3, 11, True)


def test_across_leaves(kernel: Kernel) -> None:
    start, size = LEAVES["64 KiB"]
    inside = kernel.prog.read(start + 0x100, size - 0x200)
    assert inside == kernel.prog.read(0x800010100, size - 0x200, True)
    two, _ = LEAVES["2 MiB"]
    with pytest.raises(FaultError, match="not mapped"):
        kernel.prog.read(two - 8, 16)


@pytest.mark.parametrize(
    "address", [0, 0x1000, LEAVES["4 KiB"][0] + 0x1000, LEAVES["64 KiB"][0] + 0x10000, KERNEL]
)
def test_not_mapped(kernel: Kernel, address: int) -> None:
    with pytest.raises(FaultError, match="not mapped"):
        kernel.prog.read(address, 1)


def test_not_canonical(kernel: Kernel) -> None:
    with pytest.raises(FaultError, match="not a canonical address"):
        kernel.prog.read(1 << 60, 1)


def test_table_for_a_leaf(kernel: Kernel) -> None:
    """An entry of the last level that has no permission is no leaf."""
    kernel.put(LEAVES["4 KiB"][0], 0, 0x800001 << 10 | VALID)
    with pytest.raises(FaultError, match="no leaf"):
        kernel.prog.read(LEAVES["4 KiB"][0], 1)


@pytest.mark.parametrize(
    ("extra", "missing"),
    [
        ("", "va_kernel_pa_offset"),
        ("NUMBER(va_kernel_pa_offset)=0x1\n", "VA_BITS"),
        ("NUMBER(va_kernel_pa_offset)=0x1\nNUMBER(VA_BITS)=40\n", "40"),
    ],
)
def test_unusable_note(extra: str, missing: str) -> None:
    prog = Program(Platform(Architecture.RISCV64))
    prog.set_linux_kernel_custom(target_files.vmcoreinfo_text(1, 1, extra=extra), False)
    with pytest.raises(TargetError, match=missing):
        add_virtual_memory(prog)


def test_others_are_left_alone() -> None:
    prog = Program(Platform(Architecture.X86_64))
    prog.set_linux_kernel_custom(target_files.x86_text(), False)
    add_virtual_memory(prog)
    add_virtual_memory(Program())
