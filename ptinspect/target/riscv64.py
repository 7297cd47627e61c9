# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Kernel virtual memory on riscv64, whose page tables drgn does not walk.

Without this, only addresses that a dump happens to give as such could be read; the memory map is
never among them.
"""

from __future__ import annotations

from drgn import Architecture, FaultError, Program, ProgramFlags

from ptinspect.errors import TargetError
from ptinspect.target import vmcoreinfo

_PAGE_SHIFT = 12
_INDEX_BITS = 9
_ENTRY_BYTES = 8

#: Levels of page tables by VA_BITS: Sv39, Sv48, Sv57.
_LEVELS = {39: 3, 48: 4, 57: 5}

#: Of a page table entry (RISC-V privileged specification; arch/riscv/include/asm/pgtable-bits.h).
_VALID = 1 << 0
_LEAF = 7 << 1
_PFN_MASK = (1 << 44) - 1
_PFN_SHIFT = 10
_NAPOT = 1 << 63
#: The only size of a NAPOT leaf: 16 pages; the low bits of its PFN say so.
_NAPOT_BITS = 4

_WHOLE_ADDRESS_SPACE = (1 << 64) - 1


def add_virtual_memory(prog: Program) -> None:
    """
    Let a riscv64 kernel program read virtual memory through the kernel's page tables.

    Programs of other architectures, and the running kernel, which /proc/kcore gives by virtual
    address, are left as they are.

    :raises TargetError: if VMCOREINFO lacks what is needed for it
    """
    if (
        prog.platform is None
        or prog.platform.arch != Architecture.RISCV64
        or prog.flags & ProgramFlags.IS_LOCAL
    ):
        return
    walker = _Walker(prog)
    prog.add_memory_segment(0, _WHOLE_ADDRESS_SPACE, walker.read, physical=False)


class _Walker:
    """Reads kernel virtual memory by way of swapper_pg_dir."""

    def __init__(self, prog: Program) -> None:
        self._prog = prog
        fields = vmcoreinfo.parse(prog["VMCOREINFO"].string_())
        try:
            swapper = int(fields["SYMBOL(swapper_pg_dir)"], 16)
            # swapper_pg_dir is part of the kernel image (arch/riscv/kernel/vmcore_info.c, 6.0).
            self._root = swapper - int(fields["NUMBER(va_kernel_pa_offset)"], 0)
            self._address_bits = int(fields["NUMBER(VA_BITS)"])
            self._levels = _LEVELS[self._address_bits]
        except (KeyError, ValueError) as error:
            raise TargetError(
                f"riscv64: VMCOREINFO does not tell where the page tables are (no usable {error})"
            ) from None

    def read(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        """drgn's callback; a range is read leaf by leaf."""
        parts = []
        end = address + count
        while address < end:
            start, size = self._translate(address)
            part = min(size, end - address)
            parts.append(self._prog.read(start, part, True))
            address += part
        return b"".join(parts)

    def _translate(self, address: int) -> tuple[int, int]:
        """The physical address, and how many bytes from there on the same leaf maps."""
        if address >> (self._address_bits - 1) not in (
            0,
            (1 << (65 - self._address_bits)) - 1,
        ):
            raise FaultError("not a canonical address", address)
        table = self._root
        for level in reversed(range(self._levels)):
            shift = _PAGE_SHIFT + _INDEX_BITS * level
            index = address >> shift & (1 << _INDEX_BITS) - 1
            entry = self._prog.read_u64(table + _ENTRY_BYTES * index, True)
            if not entry & _VALID:
                raise FaultError("address is not mapped", address)
            frame = entry >> _PFN_SHIFT & _PFN_MASK
            if entry & _LEAF:
                if entry & _NAPOT:
                    shift += _NAPOT_BITS
                inside = (1 << shift) - 1
                start = (frame << _PAGE_SHIFT) & ~inside | address & inside
                return start, inside + 1 - (address & inside)
            table = frame << _PAGE_SHIFT
        raise FaultError("a page table entry of the last level is no leaf", address)
