# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
s390x: page tables of 256 entries below segment and region tables of 2048 (CRST tables).

Which table an address space starts with is its own choice, told by the address-space-control
element (ASCE) in mm->context.asce; see arch/s390/include/asm/pgtable.h and the Principles of
Operation, chapter "Dynamic Address Translation". The kernel is a space of its own.

Two generations of software bits exist: in 7.3, unlike 6.12, segment and region-third entries have
a present bit, and their read and write bits lie elsewhere. No symbol tells them apart, so the
kernel's own tables are asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from drgn import FaultError, Program
from drgn.helpers.linux.mm import follow_phys, virt_to_phys

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

PAGE_BYTES = 4096
PAGE_ENTRIES = 256
CRST_ENTRIES = 2048

#: In page-table entries.
PAGE_PRESENT = 0x001
PAGE_READ = 0x010
PAGE_NOEXEC = 0x100
PAGE_PROTECT = 0x200
PAGE_INVALID = 0x400

#: In segment and region entries.
INVALID = 0x20
TYPE_MASK = 0x0C
LARGE = 0x400
NOEXEC = 0x100
PROTECT = 0x200
#: New generation only.
CRST_PRESENT = 0x01
CRST_SWAP = 0x10
NEW_READ = 0x4000
NEW_WRITE = 0x8000
OLD_SEGMENT_READ = 0x01

_ORIGIN = ALL_BITS & ~0xFFF
_SEGMENT_ORIGIN = ALL_BITS & ~0x7FF
_ASCE_TYPE_SHIFT = 2
_ASCE_REAL_SPACE = 0x20

_PTE_RULES = (
    Rule(EntryClass.NONE, ALL_BITS, PAGE_INVALID),
    Rule(EntryClass.PROT_NONE, PAGE_PRESENT | PAGE_READ, PAGE_PRESENT),
    # Invalid too if the page is old: the access is how the kernel learns that it is young.
    Rule(EntryClass.LEAF, PAGE_PRESENT, PAGE_PRESENT),
    Rule(EntryClass.LEAF, PAGE_INVALID, 0),
    Rule(EntryClass.SWAP, PAGE_PROTECT | PAGE_PRESENT, PAGE_PROTECT),
)

#: In KVM's own tables (from 7.0) an invalid entry can bear a token: where the guest has no memory,
#: the program interruption that an access gives (union crste, union pte: tok; _DAT_TOKEN_PIC in
#: arch/s390/kvm/gmap/dat.h). Type 1 stands in the upper 16 bits, the interruption in the next.
_TOKEN_MASK, _TOKEN = ALL_BITS & ~(0xFFFF << 32), 1 << 48
#: A segment entry of a virtual CPU's own gmap that names a segment of its machine, not yet a table
#: (crste_is_ucas()): invalid, with a table length of 1.
_TABLE_LENGTH, _UCAS_LENGTH = 0x03, 0x01

_TABLE_PERMISSIONS = (
    PermissionRule(Permission.WRITE, PROTECT, 0),
    PermissionRule(Permission.EXECUTE_USER, NOEXEC, 0),
    PermissionRule(Permission.EXECUTE_KERNEL, NOEXEC, 0),
)
#: The same bits mean the same in page-table entries.
_LEAF_PERMISSIONS = _TABLE_PERMISSIONS


@dataclass(frozen=True)
class S390Paging(Paging):
    """Paging of s390x."""

    architecture: ClassVar[str] = "s390x"

    def root_of_asce(self, asce: int) -> Root:
        """
        Get the root table that an address-space-control element names.

        :raises ValueError: if it designates a real space, which has no tables
        """
        if asce & _ASCE_REAL_SPACE:
            raise ValueError(f"ASCE {asce:#x} designates a real space, which has no tables")
        level = 1 + (asce >> _ASCE_TYPE_SHIFT & 3)
        # The table length counts blocks of 512 entries.
        return Root(asce & _ORIGIN, level, ((0, ((asce & 3) + 1) * 512),))

    def virtual_to_physical(self, prog: Program, address: int) -> int:
        """Translate an address of the identity mapping, or else of the kernel image."""
        try:
            return int(follow_phys(prog["init_mm"].address_of_(), address))
        except FaultError:
            return int(virt_to_phys(prog, address))

    def user_root(self, prog: Program, mm: MmFields) -> Root:
        """Get the root that the mm's ASCE names."""
        return self.root_of_asce(mm.asce)

    def kernel_root(self, prog: Program) -> Root:
        """Get the root of the kernel ASCE (arch/s390/boot/vmem.c, arch/s390/mm/init.c)."""
        return self.root_of_asce(prog["init_mm"].context.asce.value_())


def make_paging(*, present_bits: bool, swap: SwapClasses = PLAIN_SWAP) -> S390Paging:
    """
    Build the paging of s390x.

    :param present_bits: Whether segment and region-third entries have a present bit
        (the new generation).
    """
    swapped_out = (
        (Rule(EntryClass.SWAP, CRST_SWAP | CRST_PRESENT, CRST_SWAP),) if present_bits else ()
    )
    # KVM has tables of its own in the same kernels (by version, not by cause).
    hole = (Rule(EntryClass.NONE, _TOKEN_MASK, _TOKEN | PAGE_INVALID),) if present_bits else ()
    ucas_mask = LARGE | INVALID | TYPE_MASK | _TABLE_LENGTH | CRST_SWAP
    ucas = (Rule(EntryClass.MARKER, ucas_mask, INVALID | _UCAS_LENGTH),) if present_bits else ()
    segment_read = NEW_READ if present_bits else OLD_SEGMENT_READ
    # The old generation's read and write bits of region-third entries are swapped between 6.1 and
    # 6.12; nothing can be said of PROT_NONE there without knowing which it is.
    region_read = NEW_READ if present_bits else 0
    return S390Paging(
        mode="ASCE",
        levels=(
            Level(
                name="PTE",
                own_name="page",
                shift=12,
                entries=PAGE_ENTRIES,
                rules=(*hole, *_PTE_RULES),
                empty=PAGE_INVALID,
                usual_leaf=Match(PAGE_PRESENT | PAGE_READ, PAGE_PRESENT | PAGE_READ),
                kernel_hidden=Match(PAGE_INVALID, PAGE_INVALID),
                leaf_address=(AddressField(_ORIGIN),),
                leaf_permissions=_LEAF_PERMISSIONS,
                swap_type_shift=2,
            ),
            Level(
                name="PMD",
                own_name="segment",
                shift=20,
                entries=CRST_ENTRIES,
                rules=(*_huge_rules(0, segment_read, swapped_out, present_bits), *ucas),
                empty=INVALID,
                table_address=(AddressField(_SEGMENT_ORIGIN),),
                leaf_address=(AddressField(ALL_BITS & ~((1 << 20) - 1)),),
                table_permissions=_TABLE_PERMISSIONS,
                leaf_permissions=_LEAF_PERMISSIONS,
                swap_type_shift=6,
                kernel_hidden=Match(INVALID, INVALID),
            ),
            Level(
                name="PUD",
                own_name="region-3",
                shift=31,
                entries=CRST_ENTRIES,
                rules=_huge_rules(0x04, region_read, swapped_out, present_bits),
                empty=0x04 | INVALID,
                table_address=(AddressField(_ORIGIN),),
                leaf_address=(AddressField(ALL_BITS & ~((1 << 31) - 1)),),
                table_permissions=_TABLE_PERMISSIONS,
                leaf_permissions=_LEAF_PERMISSIONS,
                swap_type_shift=6,
                kernel_hidden=Match(INVALID, INVALID),
            ),
            _upper_level("P4D", "region-2", 42, 0x08, present_bits),
            _upper_level("PGD", "region-1", 53, 0x0C, present_bits),
        ),
        page_bytes=PAGE_BYTES,
        dtype=np.dtype(">u8"),
        va_bits=64,
        swap_classes=swap,
    )


def _none_rules(table_type: int, tokens: bool) -> tuple[Rule, ...]:
    empty = INVALID | table_type
    rules = (Rule(EntryClass.NONE, ALL_BITS, empty),)
    return (*rules, Rule(EntryClass.NONE, _TOKEN_MASK, _TOKEN | empty)) if tokens else rules


def _huge_rules(
    table_type: int, read: int, swapped_out: tuple[Rule, ...], tokens: bool
) -> tuple[Rule, ...]:
    prot_none = (
        (Rule(EntryClass.PROT_NONE, LARGE | read | TYPE_MASK, LARGE | table_type),) if read else ()
    )
    return (
        *_none_rules(table_type, tokens),
        *swapped_out,
        *prot_none,
        Rule(EntryClass.LEAF, LARGE | TYPE_MASK, LARGE | table_type),
        Rule(EntryClass.TABLE, LARGE | INVALID | TYPE_MASK, table_type),
    )


def _upper_level(name: str, own_name: str, shift: int, table_type: int, tokens: bool) -> Level:
    return Level(
        name=name,
        own_name=own_name,
        shift=shift,
        entries=CRST_ENTRIES,
        rules=(
            *_none_rules(table_type, tokens),
            Rule(EntryClass.TABLE, INVALID | TYPE_MASK, table_type),
        ),
        empty=INVALID | table_type,
        table_address=(AddressField(_ORIGIN),),
        table_permissions=_TABLE_PERMISSIONS,
    )


def read_paging(prog: Program) -> S390Paging:
    """Read the generation of the entries from a target."""
    swap = swap_classes(prog)
    older = make_paging(present_bits=False, swap=swap)
    present = has_present_bits(prog, older.kernel_root(prog))
    return make_paging(present_bits=True, swap=swap) if present else older


def has_present_bits(prog: Program, kernel: Root) -> bool:
    """
    Tell from the kernel's tables whether segment entries have a present bit.

    A segment entry that points to a page table has it and nothing else in its low bits; before,
    the lowest bit was the read bit, which only large segments had. A large kernel segment is
    readable, and the old generation had no bit where the new one keeps read and write.

    :raises FaultError: if the tables cannot be read
    """
    address, level = kernel.address, kernel.level
    tables = [address]
    while level > 1:
        upper = [entry for table in tables for entry in _valid_entries(prog, table).tolist()]
        tables = [entry & _ORIGIN for entry in upper if not entry & LARGE][:_TABLES_TO_TRY]
        level -= 1
    for table in tables:
        segments = _valid_entries(prog, table)
        pointers = segments[(segments & np.uint64(LARGE)) == 0]
        if len(pointers):
            return bool(pointers[0] & np.uint64(CRST_PRESENT))
        if len(segments):
            return bool(segments[0] & np.uint64(NEW_READ | NEW_WRITE))
    return False


_TABLES_TO_TRY = 64


def _valid_entries(prog: Program, table: int) -> EntryArray:
    entries = np.frombuffer(prog.read(table, 8 * CRST_ENTRIES, True), ">u8").astype(np.uint64)
    valid: EntryArray = entries[(entries & np.uint64(INVALID)) == 0]
    return valid
