# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The direct map: where the kernel sees all of physical memory, at one constant distance."""

from __future__ import annotations

from drgn import Program
from drgn.helpers.linux.mm import phys_to_virt

_ALL_BITS = (1 << 64) - 1


def direct_map_offset(prog: Program) -> int:
    """
    Get the virtual address of physical address 0, in 64 bits, whether or not there is memory.

    :raises LookupError: if it cannot be found
    """
    try:
        offset = prog.cache["ptinspect_direct_map"]
    except KeyError:
        offset = prog.cache["ptinspect_direct_map"] = _find_offset(prog)
    return int(offset)


def _find_offset(prog: Program) -> int:
    try:
        return int(phys_to_virt(prog, 0).value_())
    except NotImplementedError:
        # drgn 0.3 does not translate on riscv64 (arch/riscv/include/asm/page.h).
        return int(prog["kernel_map"].va_pa_offset.value_()) & _ALL_BITS


def physical_to_virtual(prog: Program, physical: int) -> int:
    """Get the direct-map address of a physical address."""
    return (direct_map_offset(prog) + physical) & _ALL_BITS


def virtual_to_physical(prog: Program, virtual: int) -> int:
    """
    Get the physical address of a direct-map address.

    Other addresses give a number too, but there is no memory: look for it in the memory map.
    """
    return (virtual - direct_map_offset(prog)) & _ALL_BITS
