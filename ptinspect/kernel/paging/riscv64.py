# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
riscv64: Sv39, Sv48 and Sv57 (arch/riscv/include/asm/pgtable-64.h, pgtable-bits.h).

drgn 0.3 does not translate kernel addresses of this architecture; :mod:`ptinspect.target.riscv64`
does it for whoever reads kernel memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from drgn import Program

from ptinspect.errors import TargetError
from ptinspect.kernel.paging.model import (
    ALL_BITS,
    PLAIN_SWAP,
    AddressField,
    EntryArray,
    EntryClass,
    Level,
    Match,
    MmFields,
    Paging,
    Permission,
    PermissionRule,
    Root,
    Rule,
    SwapClasses,
)
from ptinspect.kernel.paging.swap import swap_classes
from ptinspect.kernel.paging.vmcoreinfo import fields, number

PAGE_BYTES = 4096
ENTRIES = 512

VALID = 1 << 0
READ = 1 << 1
WRITE = 1 << 2
EXEC = 1 << 3
USER = 1 << 4
#: _PAGE_PROT_NONE, which is G of a valid entry.
PROT_NONE = 1 << 5
NAPOT = 1 << 63

_PFN = (1 << 54) - (1 << 10)
_LEAF_BITS = READ | WRITE | EXEC
#: A 64K contiguous range has the low bits of its page frame number replaced by 1000 (Svnapot).
_NAPOT_PAGES = 16
_NAPOT_PATTERN = 0b1000

_NONE = Rule(EntryClass.NONE, ALL_BITS, 0)
_LEAF_RULES = (
    Rule(EntryClass.LEAF, VALID | READ, VALID | READ),
    Rule(EntryClass.LEAF, VALID | EXEC, VALID | EXEC),
    Rule(EntryClass.LEAF, VALID | WRITE, VALID | WRITE),
)
_NOT_VALID_RULES = (
    Rule(EntryClass.PROT_NONE, VALID | PROT_NONE, PROT_NONE),
    # pmd_present() counts a huge page that is being split by its permissions.
    Rule(EntryClass.PROT_NONE, VALID | READ, READ),
    Rule(EntryClass.SWAP, VALID, 0),
)
_LEAF_PERMISSIONS = (
    PermissionRule(Permission.READ, READ, READ),
    PermissionRule(Permission.WRITE, WRITE, WRITE),
    PermissionRule(Permission.USER, USER, USER),
    PermissionRule(Permission.EXECUTE_USER, EXEC, EXEC),
    PermissionRule(Permission.EXECUTE_KERNEL, EXEC, EXEC),
)

_NAMES = {
    39: ("PTE", "PMD", "PGD"),
    48: ("PTE", "PMD", "PUD", "PGD"),
    57: ("PTE", "PMD", "PUD", "P4D", "PGD"),
}
#: SATP.MODE (7.3 exports the register in vmcoreinfo).
_SATP_MODES = {8: 39, 9: 48, 10: 57}


@dataclass(frozen=True)
class RiscvPaging(Paging):
    """Paging of riscv64."""

    architecture: ClassVar[str] = "riscv64"

    def leaf_targets(
        self, values: EntryArray, level: int, index: npt.NDArray[np.integer[Any]]
    ) -> EntryArray:
        """Get the physical addresses that leaves map; NAPOT entries are all alike."""
        targets = super().leaf_targets(values, level, index)
        if level == 0:
            joined = _is_napot(values)
            if joined.any():
                place = index[joined].astype(np.uint64) % np.uint64(_NAPOT_PAGES)
                block = np.uint64(_NAPOT_PAGES * PAGE_BYTES - 1)
                targets[joined] = (targets[joined] & ~block) | place * np.uint64(PAGE_BYTES)
        return targets

    def leaf_patterns(self, address: int, level: int) -> tuple[Match, ...]:
        """Get the pattern of an address, at level 0 also that of its contiguous range."""
        plain = super().leaf_patterns(address, level)
        if level:
            return plain
        block = _NAPOT_PAGES * PAGE_BYTES
        base = address & ~(block - 1) | _NAPOT_PATTERN * PAGE_BYTES
        (joined,) = super().leaf_patterns(base, 0)
        return (*plain, Match(joined.mask | NAPOT, joined.value | NAPOT))

    def leaf_bytes(self, values: EntryArray, level: int) -> npt.NDArray[np.uint64]:
        """Get the size of the mapping of which each leaf is a part, in bytes."""
        sizes = super().leaf_bytes(values, level)
        if level == 0:
            sizes[_is_napot(values)] = np.uint64(_NAPOT_PAGES * PAGE_BYTES)
        return sizes

    def virtual_to_physical(self, prog: Program, address: int) -> int:
        """
        Translate an address of the direct map or the kernel image.

        :raises TargetError: if the vmcoreinfo note does not tell where the kernel lies (before 6.3)
        """
        return _linear_to_physical(prog, address)

    def user_root(self, prog: Program, mm: MmFields) -> Root:
        """Get the lower half of the mm's PGD; the upper is a copy of the kernel's."""
        return Root(mm.pgd, len(self.levels) - 1, ((0, ENTRIES // 2),))

    def kernel_root(self, prog: Program) -> Root:
        """Get ``swapper_pg_dir``."""
        root = int(fields(prog)["SYMBOL(swapper_pg_dir)"], 16)
        return self.whole_root(prog, self.virtual_to_physical(prog, root))


def _is_napot(values: EntryArray) -> npt.NDArray[np.bool_]:
    # The pattern is checked too: bit 63 alone is a memory type on T-Head cores.
    mask = np.uint64(NAPOT | VALID | (_NAPOT_PAGES - 1) << 10)
    joined: npt.NDArray[np.bool_] = (values & mask) == np.uint64(
        NAPOT | VALID | _NAPOT_PATTERN << 10
    )
    return joined


def make_paging(*, va_bits: int, swap: SwapClasses = PLAIN_SWAP) -> RiscvPaging:
    """Build the paging of Sv39, Sv48 or Sv57."""
    levels = []
    names = _NAMES[va_bits]
    for number_, name in enumerate(names):
        shift = 12 + 9 * number_
        table = () if number_ == 0 else (Rule(EntryClass.TABLE, VALID | _LEAF_BITS, VALID),)
        not_valid = _NOT_VALID_RULES[:1] + _NOT_VALID_RULES[1 if number_ else 2 :]
        levels.append(
            Level(
                name=name,
                own_name=f"level {number_}",
                shift=shift,
                entries=ENTRIES,
                rules=(_NONE, *_LEAF_RULES, *table, *not_valid),
                usual_leaf=Match(VALID | READ, VALID | READ) if number_ == 0 else None,
                table_address=(AddressField(_PFN, 2),) if number_ else (),
                leaf_address=(AddressField(_PFN & ~((1 << (shift - 2)) - 1), 2),),
                leaf_permissions=_LEAF_PERMISSIONS,
                swap_type_shift=7,
            )
        )
    return RiscvPaging(
        mode=f"Sv{va_bits}",
        levels=tuple(levels),
        page_bytes=PAGE_BYTES,
        dtype=np.dtype("<u8"),
        va_bits=va_bits,
        sign_extended=True,
        swap_classes=swap,
    )


def read_paging(prog: Program) -> RiscvPaging:
    """
    Read the mode from a target.

    :raises TargetError: if the vmcoreinfo note does not tell it
    """
    return make_paging(va_bits=_va_bits(prog), swap=swap_classes(prog))


def _va_bits(prog: Program) -> int:
    """Get the mode from SATP, or from VA_BITS, which follows it (asm/pgtable.h)."""
    satp = number(prog, "satp", 0)
    va_bits = _SATP_MODES.get(satp >> 60) or number(prog, "VA_BITS", 0)
    if va_bits not in _NAMES:
        raise TargetError(f"riscv64 with {va_bits} address bits")
    return va_bits


def _linear_to_physical(prog: Program, address: int) -> int:
    try:
        image = int(fields(prog)["NUMBER(KERNEL_LINK_ADDR)"], 0)
        image_offset = int(fields(prog)["NUMBER(va_kernel_pa_offset)"], 0)
        linear = int(fields(prog)["NUMBER(PAGE_OFFSET)"], 0)
        ram_base = int(fields(prog)["NUMBER(phys_ram_base)"], 0)
    except KeyError as error:
        raise TargetError(
            f"the riscv64 kernel's vmcoreinfo note has no {error.args[0]}; ptinspect needs it to "
            "translate addresses"
        ) from None
    if address >= image:
        return address - image_offset & ALL_BITS
    return address - linear + ram_base
