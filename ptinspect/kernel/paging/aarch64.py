# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
arm64: granules of 4K, 16K and 64K, virtual addresses of 36 to 52 bits.

See arch/arm64/include/asm/pgtable-hwdef.h, pgtable-prot.h and the Arm Architecture Reference
Manual, "The AArch64 Virtual Memory System Architecture". User and kernel have separate roots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from drgn import FaultError, Program
from drgn.helpers.linux.mm import virt_to_phys

from ptinspect.errors import TargetError
from ptinspect.kernel.paging.model import (
    ALL_BITS,
    PLAIN_SWAP,
    AddressField,
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
    object_or_none,
)
from ptinspect.kernel.paging.swap import swap_address, swap_classes
from ptinspect.kernel.paging.vmcoreinfo import number

VALID = 1 << 0
TYPE_MASK = 3
#: At level 0 a page, above a table.
TYPE_TABLE = 3
TYPE_BLOCK = 1
USER = 1 << 6
RDONLY = 1 << 7
NG = 1 << 11
CONT = 1 << 52
PXN = 1 << 53
UXN = 1 << 54
TABLE_PXN = 1 << 59
TABLE_UXN = 1 << 60
#: APTable: no access from user mode, no writes.
TABLE_NO_USER = 1 << 61
TABLE_RDONLY = 1 << 62

#: Bits that mark an entry as present although it is not valid: in 6.1 PTE_PROT_NONE, and for huge
#: pages PMD_PRESENT_INVALID too; in 6.12 one for all, PTE_PRESENT_INVALID, which is the nG bit.
OLD_PROT_NONE = 1 << 58
OLD_PMD_INVALID = 1 << 59
PRESENT_INVALID = NG

_NAMES = {
    2: ("PTE", "PGD"),
    3: ("PTE", "PMD", "PGD"),
    4: ("PTE", "PMD", "PUD", "PGD"),
    5: ("PTE", "PMD", "PUD", "P4D", "PGD"),
}

#: Granule to entries joined by the contiguous hint at the two lowest levels (CONT_PTES, CONT_PMDS
#: with the default CONFIG_ARM64_CONT_{PTE,PMD}_SHIFT).
_CONTIGUOUS = {12: (16, 16), 14: (128, 32), 16: (32, 32)}

_TABLE_PERMISSIONS = (
    PermissionRule(Permission.WRITE, TABLE_RDONLY, 0),
    PermissionRule(Permission.USER, TABLE_NO_USER, 0),
    PermissionRule(Permission.EXECUTE_USER, TABLE_UXN, 0),
    PermissionRule(Permission.EXECUTE_KERNEL, TABLE_PXN, 0),
)
_LEAF_PERMISSIONS = (
    PermissionRule(Permission.WRITE, RDONLY, 0),
    PermissionRule(Permission.USER, USER, USER),
    PermissionRule(Permission.EXECUTE_USER, UXN, 0),
    PermissionRule(Permission.EXECUTE_KERNEL, PXN, 0),
)


@dataclass(frozen=True)
class Arm64Paging(Paging):
    """Paging of arm64."""

    architecture: ClassVar[str] = "arm64"

    def virtual_to_physical(self, prog: Program, address: int) -> int:
        """
        Translate a direct map or kernel image address.

        The image lies above PAGE_END, which is -(1 << (VA_BITS_MIN - 1)). Without 52-bit addresses
        in the machine, VA_BITS_MIN are left: 48, but 47 with 16K pages (asm/memory.h).
        """
        offset = number(prog, "kimage_voffset", 0)
        least = 47 if self.va_bits == 52 and self.page_bytes == 1 << 14 else 48
        page_end = (1 << 64) - (1 << (min(self.va_bits, least) - 1))
        if offset and address >= page_end:
            return (address - offset) & ALL_BITS
        return int(virt_to_phys(prog, address))

    def user_root(self, prog: Program, mm: MmFields) -> Root:
        """Get the table of TTBR0."""
        return self.whole_root(prog, mm.pgd)

    def kernel_root(self, prog: Program) -> Root:
        """Get the table of TTBR1, ``swapper_pg_dir``."""
        return self._upper_root(prog, prog["init_mm"].pgd.value_())

    def isolated_root(self, prog: Program, mm: MmFields) -> Root | None:
        """
        Get what TTBR1 has in user mode, ``tramp_pg_dir``: one for all, which maps the way in.

        It is empty unless the kernel is unmapped in user mode (map_entry_trampoline() in
        arch/arm64/mm/mmu.c). 6.12 leaves its tables untyped, 7.2 does not.
        """
        if mm.address != prog["init_mm"].address_of_().value_():
            return None
        try:
            root = self._upper_root(prog, prog.symbol("tramp_pg_dir").address)
        except LookupError:
            # Without CONFIG_UNMAP_KERNEL_AT_EL0.
            return None
        try:
            entries = prog.read(root.address, self.levels[root.level].table_bytes, True)
        except FaultError:
            return None
        return root if any(entries) else None

    def _upper_root(self, prog: Program, pgd: int) -> Root:
        root = self.whole_root(prog, self.virtual_to_physical(prog, pgd))
        return replace(root, base=(1 << 64) - (1 << self.va_bits))


def make_paging(
    *,
    page_shift: int,
    va_bits: int,
    lpa2: bool = False,
    present_invalid: int = PRESENT_INVALID,
    swap: SwapClasses = PLAIN_SWAP,
    physmem_bits: int = 0,
) -> Arm64Paging:
    """
    Build the paging of one arm64 mode from its numbers.

    :param va_bits: What the root tables are laid out for.
    :param lpa2: Whether 4K and 16K entries have 52-bit addresses.
    :param present_invalid: The bit of an entry that is present but not valid.
    :param physmem_bits: MAX_PHYSMEM_BITS; 0 if that is not known.
    """
    per_level = page_shift - 3
    count = -(-(va_bits - page_shift) // per_level)
    address = _address_fields(page_shift, lpa2)
    # __SWP_TYPE_SHIFT and __SWP_OFFSET_SHIFT moved together with the bit.
    old = present_invalid == OLD_PROT_NONE
    levels = []
    for number_, name in enumerate(_NAMES[count]):
        shift = page_shift + per_level * number_
        top = number_ == count - 1
        keep = ALL_BITS & ~((1 << shift) - 1)
        levels.append(
            Level(
                name=name,
                own_name=f"level {4 - 1 - number_}",
                shift=shift,
                entries=1 << (va_bits - shift if top else per_level),
                rules=_rules(number_, page_shift, lpa2, present_invalid),
                usual_leaf=Match(TYPE_MASK, TYPE_TABLE) if number_ == 0 else None,
                table_address=address if number_ else (),
                leaf_address=(AddressField(address[0].mask & keep), *address[1:]),
                table_permissions=_TABLE_PERMISSIONS,
                leaf_permissions=_LEAF_PERMISSIONS,
                swap_type_shift=3 if old else 6,
                swap_address=swap_address(8 if old else 12, page_shift, physmem_bits),
                contiguous=(_CONTIGUOUS[page_shift][number_], CONT) if number_ < 2 else None,
            )
        )
    return Arm64Paging(
        mode=f"{1 << (page_shift - 10)}K pages, {va_bits}-bit" + (", LPA2" if lpa2 else ""),
        levels=tuple(levels),
        page_bytes=1 << page_shift,
        dtype=np.dtype("<u8"),
        va_bits=va_bits,
        swap_classes=swap,
    )


def _address_fields(page_shift: int, lpa2: bool) -> tuple[AddressField, ...]:
    """Where entries have the physical address (PTE_ADDR_LOW, PTE_ADDR_HIGH)."""
    if page_shift == 16:
        # Always: without 52-bit physical addresses bits 12 to 15 are zero.
        return AddressField((1 << 48) - (1 << 16)), AddressField(0xF000, 36)
    if lpa2:
        return AddressField((1 << 50) - (1 << page_shift)), AddressField(0x300, 42)
    return (AddressField((1 << 48) - (1 << page_shift)),)


def _rules(level: int, page_shift: int, lpa2: bool, present_invalid: int) -> tuple[Rule, ...]:
    none = Rule(EntryClass.NONE, ALL_BITS, 0)
    bits = [present_invalid]
    if present_invalid == OLD_PROT_NONE and level:
        bits.append(OLD_PMD_INVALID)
    hidden = [Rule(EntryClass.PROT_NONE, VALID | bit, bit) for bit in bits]
    not_valid = (*hidden, Rule(EntryClass.SWAP, VALID, 0))
    if level == 0:
        return (none, Rule(EntryClass.LEAF, TYPE_MASK, TYPE_TABLE), *not_valid)
    table = Rule(EntryClass.TABLE, TYPE_MASK, TYPE_TABLE)
    # Blocks exist at level 2, at level 1 with 4K pages or larger addresses.
    if level == 1 or (level == 2 and (page_shift == 12 or lpa2)):
        return (none, table, Rule(EntryClass.LEAF, TYPE_MASK, TYPE_BLOCK), *not_valid)
    return (none, table)


def read_paging(prog: Program) -> Arm64Paging:
    """
    Read the mode from a target.

    VA_BITS is what the kernel was built for. With 4K and 16K pages tables are laid out for what
    the machine can do (TCR_EL1.T1SZ), the level above is folded at run time; with 64K pages they
    are always laid out for VA_BITS (arch/arm64/include/asm/pgtable-hwdef.h, head.S).

    :raises TargetError: if the sizes make no sense
    """
    page_shift = prog["PAGE_SHIFT"].value_()
    configured = number(prog, "VA_BITS", 0)
    t1sz = number(prog, "TCR_EL1_T1SZ", 0)
    va_bits = configured if page_shift == 16 or not t1sz else 64 - t1sz
    if page_shift not in _CONTIGUOUS or not page_shift + 1 < va_bits <= 52:
        raise TargetError(f"arm64 with {1 << page_shift} byte pages and {va_bits} address bits")
    return make_paging(
        page_shift=page_shift,
        va_bits=va_bits,
        # The kernel has 52-bit physical addresses with 4K and 16K pages only if virtual ones too.
        lpa2=page_shift != 16 and va_bits == 52,
        present_invalid=_present_invalid(prog),
        swap=swap_classes(prog),
        physmem_bits=number(prog, "MAX_PHYSMEM_BITS", 0),
    )


def _present_invalid(prog: Program) -> int:
    """
    Get the bit of entries that are present but not valid.

    ``protection_map[VM_NONE]`` is PAGE_NONE, whose value has it (arch/arm64/mm/mmap.c).
    """
    protection_map = object_or_none(prog, "protection_map")
    if protection_map is None:
        return PRESENT_INVALID
    try:
        page_none = protection_map[0].pgprot.value_()
    except FaultError:
        return PRESENT_INVALID
    return OLD_PROT_NONE if page_none & OLD_PROT_NONE else PRESENT_INVALID
