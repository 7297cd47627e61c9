# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
ppc64 (Book3S, radix): four levels whose sizes are variables of the kernel.

Entries are big-endian on kernels of both byte orders (arch/powerpc/include/asm/book3s/64/pgtable.h,
radix.h). Tables smaller than a page share pages (fragments). User and kernel have separate roots.
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
from ptinspect.kernel.paging.swap import swap_classes
from ptinspect.kernel.paging.vmcoreinfo import fields

EXEC = 1 << 0
WRITE = 1 << 1
READ = 1 << 2
PRIVILEGED = 1 << 3
DIRTY = 1 << 7
ACCESSED = 1 << 8
#: _PAGE_INVALID: present, though PRESENT is clear while the entry is being changed.
INVALID = 1 << 61
#: _PAGE_PTE: a leaf, or the remains of one.
PTE = 1 << 62
PRESENT = 1 << 63

#: Root entry 0 of the kernel's tables translates this address (quadrant 3).
KERNEL_BASE = 0xC000000000000000

_RWX = READ | WRITE | EXEC
_TABLE_ADDRESS = ALL_BITS & ~0xC0000000000000FF
#: Next level size of a directory entry.
_NLS = 0x1F
#: _PAGE_PA_MAX
_PHYSICAL_BITS = 53
#: MMU_FTR_TYPE_RADIX (asm/mmu.h)
_FEATURE_RADIX = 0x40

#: RADIX_PTE_NONE_MASK: the hardware may set these in an empty entry.
_NONE = Rule(EntryClass.NONE, ALL_BITS & ~(DIRTY | ACCESSED), 0)
_LEAF_RULES = (
    Rule(EntryClass.PROT_NONE, PRESENT | PTE | _RWX, PRESENT | PTE),
    Rule(EntryClass.LEAF, PRESENT | PTE, PRESENT | PTE),
    Rule(EntryClass.PROT_NONE, PRESENT | PTE | INVALID, PTE | INVALID),
    Rule(EntryClass.SWAP, PRESENT | PTE, PTE),
)
_LEAF_PERMISSIONS = (
    PermissionRule(Permission.READ, READ, READ),
    PermissionRule(Permission.WRITE, WRITE, WRITE),
    PermissionRule(Permission.USER, PRIVILEGED, 0),
    PermissionRule(Permission.EXECUTE_USER, EXEC, EXEC),
    PermissionRule(Permission.EXECUTE_KERNEL, EXEC, EXEC),
)

_NAMES = ("PTE", "PMD", "PUD", "PGD")
#: RADIX_{PTE,PMD,PUD,PGD}_INDEX_SIZE by page shift (radix-4k.h, radix-64k.h).
RADIX_INDEX_SIZES = {12: (9, 9, 9, 13), 16: (5, 9, 9, 13)}


@dataclass(frozen=True)
class Ppc64Paging(Paging):
    """Paging of ppc64 with the radix MMU."""

    architecture: ClassVar[str] = "ppc64"

    def virtual_to_physical(self, prog: Program, address: int) -> int:
        """Translate a direct map address; the kernel image lies in the direct map."""
        return int(virt_to_phys(prog, address))

    def user_root(self, prog: Program, mm: MmFields) -> Root:
        """Get the mm's own root table."""
        return self.whole_root(prog, mm.pgd)

    def kernel_root(self, prog: Program) -> Root:
        """Get ``init_mm.pgd``."""
        pgd = self.virtual_to_physical(prog, prog["init_mm"].pgd.value_())
        return replace(self.whole_root(prog, pgd), base=KERNEL_BASE)


def make_paging(
    *, page_shift: int, index_sizes: tuple[int, ...] = (), swap: SwapClasses = PLAIN_SWAP
) -> Ppc64Paging:
    """
    Build the paging of one radix mode from its numbers.

    :param index_sizes: log2 of the entries of each level, from PTE up; by default the kernel's
        constants.
    """
    index_sizes = index_sizes or RADIX_INDEX_SIZES[page_shift]
    levels = []
    shift = page_shift
    for number_, name in enumerate(_NAMES):
        table: tuple[Rule, ...] = ()
        if number_:
            # A directory entry says how large the table is; anything else is not ours.
            mask = PRESENT | PTE | _NLS
            table = (Rule(EntryClass.TABLE, mask, PRESENT | index_sizes[number_ - 1]),)
        leaves = number_ < 3
        levels.append(
            Level(
                name=name,
                own_name=("page table", "page middle", "page upper", "page global")[number_],
                shift=shift,
                entries=1 << index_sizes[number_],
                rules=(_NONE, *table, *(_LEAF_RULES if leaves else ())),
                usual_leaf=Match(PRESENT | PTE | READ, PRESENT | PTE | READ) if leaves else None,
                table_address=(AddressField(_TABLE_ADDRESS),) if number_ else (),
                leaf_address=(AddressField((1 << _PHYSICAL_BITS) - (1 << shift)),),
                leaf_permissions=_LEAF_PERMISSIONS,
                # _PAGE_BIT_SWAP_TYPE is 0: swap types take the place of the permissions.
                swap_type_shift=0,
            )
        )
        shift += index_sizes[number_]
    return Ppc64Paging(
        mode=f"radix, {1 << (page_shift - 10)}K pages",
        levels=tuple(levels),
        page_bytes=1 << page_shift,
        dtype=np.dtype(">u8"),
        va_bits=shift,
        swap_classes=swap,
    )


def read_paging(prog: Program) -> Ppc64Paging:
    """
    Read the mode from a target.

    :raises TargetError: for the hash MMU, and for page sizes that radix does not have
    """
    if not _is_radix(prog):
        raise TargetError(
            "this ppc64 kernel runs on the hash MMU, whose page tables ptinspect does not walk "
            "(drgn translates addresses on the radix MMU only)"
        )
    page_shift = prog["PAGE_SHIFT"].value_()
    if page_shift not in RADIX_INDEX_SIZES:
        raise TargetError(f"ppc64 with {1 << page_shift} byte pages")
    return make_paging(
        page_shift=page_shift, index_sizes=_index_sizes(prog), swap=swap_classes(prog)
    )


def _index_sizes(prog: Program) -> tuple[int, ...]:
    """Get __pte_index_size and its like (arch/powerpc/mm/book3s64/pgtable.c)."""
    sizes = []
    for name in ("pte", "pmd", "pud", "pgd"):
        variable = object_or_none(prog, f"__{name}_index_size")
        if variable is None:
            return ()
        try:
            sizes.append(variable.value_())
        except FaultError:
            return ()
    return tuple(sizes)


def _is_radix(prog: Program) -> bool:
    told = fields(prog).get("NUMBER(RADIX_MMU)")
    if told is not None:
        return told != "0"
    return bool(prog["cur_cpu_spec"].mmu_features.value_() & _FEATURE_RADIX)
