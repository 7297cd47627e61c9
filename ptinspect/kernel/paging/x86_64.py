# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
x86_64: 4 or 5 levels of 512 entries (arch/x86/include/asm/pgtable_types.h, pgtable_64.h).

With 4 levels the P4D is folded into the PGD, so that the levels are PTE, PMD, PUD and PGD.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Program
from drgn.helpers.linux.boot import pgtable_l5_enabled
from drgn.helpers.linux.mm import virt_to_phys

from ptinspect.kernel.paging.model import (
    ALL_BITS,
    PLAIN_SWAP,
    AddressField,
    Attribute,
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
    object_or_none,
)
from ptinspect.kernel.paging.swap import swap_address, swap_classes
from ptinspect.kernel.paging.vmcoreinfo import number

PAGE_BYTES = 4096
ENTRIES = 512

PRESENT = 1 << 0
RW = 1 << 1
USER = 1 << 2
ACCESSED = 1 << 5
DIRTY = 1 << 6
#: At level 0 this bit is part of the memory type (PAT).
PSE = 1 << 7
#: G of a present entry.
PROTNONE = 1 << 8
NX = 1 << 63

#: Entry bits that can hold an address.
ADDRESS_BITS = (1 << 52) - PAGE_BYTES

#: An erratum can set A and D in an empty entry (_PAGE_KNL_ERRATUM_MASK).
_NONE = Rule(EntryClass.NONE, ALL_BITS & ~(ACCESSED | DIRTY), 0)

#: pte_present() is P or PROTNONE. Swap entries have both clear.
_PTE_RULES = (
    _NONE,
    Rule(EntryClass.LEAF, PRESENT, PRESENT),
    Rule(EntryClass.PROT_NONE, PROTNONE, PROTNONE),
    Rule(EntryClass.SWAP, PRESENT, 0),
)

#: pmd_present() is P, PROTNONE or PSE; pmd_mkinvalid() leaves only PSE.
_HUGE_RULES = (
    _NONE,
    Rule(EntryClass.LEAF, PRESENT | PSE, PRESENT | PSE),
    Rule(EntryClass.TABLE, PRESENT, PRESENT),
    Rule(EntryClass.PROT_NONE, PSE, PSE),
    Rule(EntryClass.BAD, PROTNONE, PROTNONE),
    Rule(EntryClass.SWAP, PRESENT, 0),
)

_UPPER_RULES = (_NONE, Rule(EntryClass.TABLE, PRESENT | PSE, PRESENT))

_PERMISSIONS = (
    PermissionRule(Permission.WRITE, RW, RW),
    PermissionRule(Permission.USER, USER, USER),
    PermissionRule(Permission.EXECUTE_USER, NX, 0),
    PermissionRule(Permission.EXECUTE_KERNEL, NX, 0),
)

_ATTRIBUTES = (
    Attribute("PWT", 1 << 3),
    Attribute("PCD", 1 << 4),
    Attribute("GLB", 1 << 8),
)

_SWAP_TYPE_SHIFT = 59
#: SWP_OFFSET_FIRST_BIT
_SWAP_OFFSET_SHIFT = 9

#: First entry of the kernel half of a root table (KERNEL_PGD_BOUNDARY).
_KERNEL_HALF = ENTRIES // 2
#: LDT_PGD_ENTRY (-240), the only kernel-half entry that is an mm's own, and only with PTI.
_LDT_ENTRY = ENTRIES - 240
_START_KERNEL_MAP = 0xFFFFFFFF80000000
#: X86_FEATURE_PTI, as word and bit (arch/x86/include/asm/cpufeatures.h).
_FEATURE_PTI = (7, 11)


@dataclass(frozen=True)
class X86Paging(Paging):
    """Paging of x86_64."""

    #: Whether user mode runs on page tables of its own (page-table isolation).
    isolated: bool = False

    architecture: ClassVar[str] = "x86_64"

    def leaf_targets(
        self, values: EntryArray, level: int, index: npt.NDArray[np.integer[Any]]
    ) -> EntryArray:
        """
        Get the physical addresses that leaves map.

        Entries that are not present store the address inverted (pgtable-invert.h).
        """
        hidden = (values & np.uint64(PRESENT)) == 0
        return super().leaf_targets(np.where(hidden, ~values, values), level, index)

    def swap_targets(self, values: EntryArray, level: int) -> EntryArray | None:
        """Get the pages of swap-like entries, which store the offset inverted (__swp_offset())."""
        return super().swap_targets(~values, level)

    def leaf_patterns(self, address: int, level: int) -> tuple[Match, ...]:
        """Get the plain and the inverted pattern of an address."""
        (plain,) = super().leaf_patterns(address, level)
        return plain, Match(plain.mask, ~plain.value & plain.mask)

    def virtual_to_physical(self, prog: Program, address: int) -> int:
        """Translate a kernel image or direct map address."""
        if address >= _START_KERNEL_MAP:
            return address - _START_KERNEL_MAP + number(prog, "phys_base", 0)
        return int(virt_to_phys(prog, address))

    def user_root(self, prog: Program, mm: MmFields) -> Root:
        """Get the lower half of an mm's PGD, and with it the entry of a remapped LDT."""
        entries: tuple[tuple[int, int], ...] = ((0, _KERNEL_HALF),)
        if self.isolated and mm.has_ldt:
            entries += ((_LDT_ENTRY, _LDT_ENTRY + 1),)
        return Root(mm.pgd, len(self.levels) - 1, entries)

    def kernel_root(self, prog: Program) -> Root:
        """Get ``init_top_pgt``."""
        pgd = prog["init_mm"].pgd.value_()
        return self.whole_root(prog, self.virtual_to_physical(prog, pgd))

    def isolated_root(self, prog: Program, mm: MmFields) -> Root | None:
        """Get the PGD of user mode, which lies behind the kernel's (kernel_to_user_pgdp())."""
        if not self.isolated:
            return None
        return self.whole_root(prog, mm.pgd | PAGE_BYTES)


def make_paging(
    *,
    five_levels: bool,
    physical_mask: int = (1 << 52) - 1,
    isolated: bool = False,
    swap: SwapClasses = PLAIN_SWAP,
    physmem_bits: int = 0,
) -> X86Paging:
    """
    Build the paging of one x86_64 mode from its numbers.

    :param physmem_bits: MAX_PHYSMEM_BITS; 0 if that is not known.
    """
    names = ["PTE", "PMD", "PUD", "P4D", "PGD"] if five_levels else ["PTE", "PMD", "PUD", "PGD"]
    own_names = ["PT", "PD", "PDPT", "PML4", "PML5"]
    address = physical_mask & ADDRESS_BITS
    levels = []
    for number_, name in enumerate(names):
        shift = 12 + 9 * number_
        huge = number_ in (1, 2)
        levels.append(
            Level(
                name=name,
                own_name=own_names[number_],
                shift=shift,
                entries=ENTRIES,
                rules=_PTE_RULES if number_ == 0 else _HUGE_RULES if huge else _UPPER_RULES,
                usual_leaf=Match(PRESENT, PRESENT) if number_ == 0 else None,
                table_address=(AddressField(address),) if number_ else (),
                leaf_address=(AddressField(address & ~((1 << shift) - 1)),),
                table_permissions=_PERMISSIONS,
                leaf_permissions=_PERMISSIONS,
                swap_type_shift=_SWAP_TYPE_SHIFT,
                swap_address=swap_address(_SWAP_OFFSET_SHIFT, 12, physmem_bits),
            )
        )
    return X86Paging(
        mode=f"{len(levels)}-level",
        levels=tuple(levels),
        page_bytes=PAGE_BYTES,
        dtype=np.dtype("<u8"),
        va_bits=12 + 9 * len(levels),
        sign_extended=True,
        swap_classes=swap,
        attributes=_ATTRIBUTES,
        isolated=isolated,
    )


def read_paging(prog: Program) -> X86Paging:
    """Read the mode from a target."""
    return make_paging(
        five_levels=pgtable_l5_enabled(prog),
        physical_mask=_physical_mask(prog),
        isolated=_isolated(prog),
        swap=swap_classes(prog),
        physmem_bits=number(prog, "MAX_PHYSMEM_BITS", 0),
    )


def _physical_mask(prog: Program) -> int:
    """
    Get __PHYSICAL_MASK.

    With CONFIG_DYNAMIC_PHYSICAL_MASK it is a variable, from which memory encryption takes its bit;
    entries of encrypted memory have that bit set at every level.
    """
    variable = object_or_none(prog, "physical_mask")
    if variable is not None:
        return int(variable)
    return ((1 << 52) - 1) & ~number(prog, "sme_mask", 0)


def _isolated(prog: Program) -> bool:
    word, bit = _FEATURE_PTI
    try:
        return bool(prog["boot_cpu_data"].x86_capability[word].value_() >> bit & 1)
    except (LookupError, FaultError, AttributeError):
        return False
