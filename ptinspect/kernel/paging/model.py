# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Paging as data: what the tables of one target look like, level by level.

An architecture module fills a :class:`Paging` with numbers read from the target; everything here
interprets those numbers, a whole array of entries at a time, and knows no architecture.

Entries come in two shapes. *Raw* entries are the bytes of a table viewed as native integers, which
is the cheapest way to look at many of them. *Values* are the same numbers in the byte order of the
table, as the kernel's pte_val() gives them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from drgn import Object, Program

EntryArray = npt.NDArray[np.uint64]
ClassArray = npt.NDArray[np.uint8]
PermissionArray = npt.NDArray[np.uint8]
IndexArray = npt.NDArray[np.int64]

ALL_BITS = (1 << 64) - 1


class EntryClass(IntEnum):
    """What a table entry is. The number is the column in the counts of a walk."""

    #: Nothing was ever here, or it was cleared.
    NONE = 0
    #: Points to a table of the next level.
    TABLE = 1
    #: Maps memory.
    LEAF = 2
    #: Keeps its page but hides it from the hardware: PROT_NONE, NUMA hinting, a huge page that is
    #: being split, a kernel page that was taken out of the direct map.
    PROT_NONE = 3
    #: The page is in a swap area.
    SWAP = 4
    #: The page is being moved.
    MIGRATION = 5
    #: A userfaultfd write-protect, guard or poison marker; no page.
    MARKER = 6
    #: Device memory, or a page that the hardware found broken.
    SPECIAL = 7
    #: No kernel writes such an entry at this level.
    BAD = 8


class Permission(IntFlag):
    """What an entry permits; along a path all entries must permit it."""

    READ = 1
    WRITE = 2
    #: User mode may use the mapping at all.
    USER = 4
    #: Execution by user mode.
    EXECUTE_USER = 8
    #: Execution by the kernel.
    EXECUTE_KERNEL = 16


ALL_PERMISSIONS = Permission(31)


class Match(NamedTuple):
    """Holds for an entry if ``entry & mask == value``."""

    mask: int
    value: int


class Rule(NamedTuple):
    """Entries for which ``entry & mask == value`` belong to *kind*."""

    kind: EntryClass
    mask: int
    value: int


class PermissionRule(NamedTuple):
    """Entries permit *permission* only if ``entry & mask == value``."""

    permission: Permission
    mask: int
    value: int


class AddressField(NamedTuple):
    """Part of the physical address in an entry: ``(entry & mask) << shift`` (>> if negative)."""

    mask: int
    shift: int = 0


class Attribute(NamedTuple):
    """A named bit of a leaf entry that is neither address nor permission, as ptdump prints it."""

    name: str
    mask: int


@dataclass(frozen=True)
class Level:
    """One level of tables; level 0 holds the smallest pages."""

    #: The kernel's name of a table of this level: PTE, PMD, PUD, P4D or PGD.
    name: str
    #: The architecture's own name.
    own_name: str
    #: Each entry covers ``1 << shift`` bytes of address space.
    shift: int
    #: Entries in a full table. A root table can have fewer that matter (:class:`Root`).
    entries: int
    #: First match wins; an entry without any is BAD.
    rules: tuple[Rule, ...]
    #: A cleared entry, as the kernel writes it.
    empty: int = 0
    #: The usual leaf: a subset of what the rules call LEAF, counted without looking at each entry.
    usual_leaf: Match | None = None
    #: Where a TABLE entry has the address of its table.
    table_address: tuple[AddressField, ...] = ()
    #: Where a LEAF entry has the address of its memory.
    leaf_address: tuple[AddressField, ...] = ()
    table_permissions: tuple[PermissionRule, ...] = ()
    leaf_permissions: tuple[PermissionRule, ...] = ()
    #: Bit at which a swap-like entry has its swap type.
    swap_type_shift: int = 0
    #: Where a swap-like entry that stands for a page has its physical address; empty if that is not
    #: known here.
    swap_address: tuple[AddressField, ...] = ()
    #: Leaves of kernel tables that the hardware does not see. In user tables they are only old.
    kernel_hidden: Match | None = None
    #: Consecutive entries that one contiguous hint joins, and the bit of the hint.
    contiguous: tuple[int, int] | None = None

    @property
    def table_bytes(self) -> int:
        """Bytes of one table."""
        return 8 * self.entries

    @property
    def entry_span(self) -> int:
        """Bytes of address space that an entry covers."""
        return 1 << self.shift


@dataclass(frozen=True)
class Root:
    """The table where an address space starts, and which of its entries belong to that space."""

    #: Physical address.
    address: int
    #: Index into :attr:`Paging.levels`.
    level: int
    #: Half-open ranges of entries; what lies outside is another space's.
    entries: tuple[tuple[int, int], ...]
    #: Virtual address of entry 0.
    base: int = 0


#: 5-bit swap types to the class of the entry that bears them.
SwapClasses = tuple[EntryClass, ...]

PLAIN_SWAP: SwapClasses = (EntryClass.SWAP,) * 32


@dataclass(frozen=True)
class Paging:
    """
    The tables of one target.

    Subclasses add what is not a mask: how an mm names its root, and encodings that take arithmetic.
    """

    #: Name of the paging mode, for people: ``5-level``, ``Sv48``, ``4K pages, 39-bit``.
    mode: str
    #: From the smallest pages upwards.
    levels: tuple[Level, ...]
    #: Bytes of a page (the kernel's PAGE_SIZE).
    page_bytes: int
    #: Byte order of the entries.
    dtype: np.dtype[np.uint64]
    #: Bits of a virtual address that are translated; the rest repeats the highest of them.
    va_bits: int
    #: Whether virtual addresses are sign extended.
    sign_extended: bool = False
    #: Class of each swap type (:func:`ptinspect.kernel.paging.swap.swap_classes`).
    swap_classes: SwapClasses = PLAIN_SWAP
    attributes: tuple[Attribute, ...] = ()

    #: Name of the architecture.
    architecture: ClassVar[str] = ""
    _luts: dict[str, npt.NDArray[Any]] = field(
        default_factory=dict, repr=False, compare=False, init=False
    )

    @property
    def swapped(self) -> bool:
        """Whether entries have the other byte order than this machine."""
        return not self.dtype.isnative

    def raw_constant(self, value: int) -> np.uint64:
        """Get a constant that can be compared with raw entries."""
        constant = np.uint64(value & ALL_BITS)
        swapped: np.uint64 = constant.byteswap() if self.swapped else constant
        return swapped

    def values(self, raw: EntryArray) -> EntryArray:
        """Get the values of raw entries (a copy if the byte order differs, else the same array)."""
        return raw.byteswap() if self.swapped else raw

    def classify(self, values: EntryArray, level: int) -> ClassArray:
        """
        Get what each entry is.

        :return: uint8 of :class:`EntryClass`, of the shape of *values*.
        """
        usual = self.levels[level].usual_leaf
        if usual is not None and (values & np.uint64(usual.mask) == np.uint64(usual.value)).all():
            return np.full(values.shape, EntryClass.LEAF, np.uint8)
        result = np.full(values.shape, EntryClass.BAD, np.uint8)
        undecided = np.ones(values.shape, np.bool_)
        for rule in self.levels[level].rules:
            hit = (values & np.uint64(rule.mask)) == np.uint64(rule.value)
            hit &= undecided
            np.copyto(result, np.uint8(rule.kind), where=hit)
            undecided ^= hit
            if not undecided.any():
                break
        swap = result == EntryClass.SWAP
        if swap.any():
            types = values[swap] >> np.uint64(self.levels[level].swap_type_shift) & np.uint64(31)
            result[swap] = self._swap_lut()[types]
        return result

    def kernel_kinds(self, kinds: ClassArray, values: EntryArray, level: int) -> ClassArray:
        """
        Correct the classes of entries that are in tables of a kernel space.

        Kernel memory is never swapped: what looks like it is a page that was taken out of the
        mapping and kept (``set_memory_np()``, ``debug_pagealloc``), and is called PROT_NONE too.

        :param kinds: What :meth:`classify` says of *values*.
        """
        hidden = (kinds > EntryClass.PROT_NONE) & (kinds < EntryClass.BAD)
        match = self.levels[level].kernel_hidden
        if match is not None:
            unseen = (values & np.uint64(match.mask)) == np.uint64(match.value)
            hidden |= unseen & (kinds == EntryClass.LEAF)
        return np.where(hidden, np.uint8(EntryClass.PROT_NONE), kinds)

    @staticmethod
    def kvm_kinds(kinds: ClassArray) -> ClassArray:
        """
        Correct the classes of entries that are in tables of KVM's own (s390, from 7.0).

        Those have no read bit: what looks as if it were hidden from the hardware maps a page.

        :param kinds: What :meth:`classify` says of them.
        """
        hidden = kinds == EntryClass.PROT_NONE
        return np.where(hidden, np.uint8(EntryClass.LEAF), kinds)

    def _swap_lut(self) -> ClassArray:
        if "swap" not in self._luts:
            self._luts["swap"] = np.array(self.swap_classes, np.uint8)
        return self._luts["swap"]

    def table_targets(self, values: EntryArray, level: int) -> EntryArray:
        """Get the physical addresses of the tables that TABLE entries point to."""
        return gather(values, self.levels[level].table_address)

    def leaf_targets(
        self, values: EntryArray, level: int, index: npt.NDArray[np.integer[Any]]
    ) -> EntryArray:
        """
        Get the physical addresses that LEAF and PROT_NONE entries map.

        :param index: Position of each entry in its table.
        """
        return gather(values, self.levels[level].leaf_address)

    def swap_targets(self, values: EntryArray, level: int) -> EntryArray | None:
        """
        Get the physical addresses of the pages that MIGRATION and SPECIAL entries stand for.

        Source: swp_offset_pfn() in include/linux/swapops.h (leafops.h in 7.x).

        :return: ``None`` if it is not known where this architecture keeps them.
        """
        fields = self.levels[level].swap_address
        return gather(values, fields) if fields else None

    def leaf_patterns(self, address: int, level: int) -> tuple[Match, ...]:
        """
        Get what an entry of a level looks like that may map the byte at a physical address.

        Any entry that maps it has one of the patterns; what has one need not be a leaf.
        """
        base = address & ~((1 << self.levels[level].shift) - 1)
        return (scatter(base, self.levels[level].leaf_address),)

    def permissions(self, values: EntryArray, level: int, *, leaf: bool) -> PermissionArray:
        """
        Get what entries of one kind permit by themselves.

        :return: uint8 of :class:`Permission`.
        """
        rules = (
            self.levels[level].leaf_permissions if leaf else self.levels[level].table_permissions
        )
        result = np.full(values.shape, int(ALL_PERMISSIONS), np.uint8)
        for rule in rules:
            denied = (values & np.uint64(rule.mask)) != np.uint64(rule.value)
            rest = np.uint8(ALL_PERMISSIONS & ~rule.permission)
            np.bitwise_and(result, rest, out=result, where=denied)
        return result

    def leaf_bytes(self, values: EntryArray, level: int) -> npt.NDArray[np.uint64]:
        """Get the size of the mapping of which each leaf is a part, in bytes."""
        shape = self.levels[level]
        sizes = np.full(values.shape, shape.entry_span, np.uint64)
        if shape.contiguous is not None:
            count, hint = shape.contiguous
            sizes[(values & np.uint64(hint)) != 0] *= np.uint64(count)
        return sizes

    def canonical(self, addresses: EntryArray) -> EntryArray:
        """Sign-extend virtual addresses where the architecture wants it."""
        if not self.sign_extended:
            return addresses
        sign = np.uint64(1 << (self.va_bits - 1))
        low = addresses & np.uint64((1 << self.va_bits) - 1)
        return cast(EntryArray, (low ^ sign) - sign)

    def index_of(self, root: Root, address: int) -> int | None:
        """
        Get the index of the root entry that translates a virtual address.

        :return: ``None`` if the space cannot contain the address.
        """
        shape = self.levels[root.level]
        if self.sign_extended:
            high = address >> (self.va_bits - 1)
            if high not in (0, ALL_BITS >> (self.va_bits - 1)):
                return None
            offset = address & ((1 << self.va_bits) - 1)
        else:
            offset = address - root.base
        index = offset >> shape.shift
        if offset < 0 or not any(first <= index < end for first, end in root.entries):
            return None
        return index

    def level_named(self, name: str) -> int:
        """
        Get the index of a level by either of its names.

        :raises KeyError: if this target has no such level
        """
        for number, level in enumerate(self.levels):
            if name.lower() in (level.name.lower(), level.own_name.lower()):
                return number
        raise KeyError(name)

    def virtual_to_physical(self, prog: Program, address: int) -> int:
        """
        Translate a kernel address of the direct map or the kernel image.

        :raises FaultError: if it is not mapped
        """
        raise NotImplementedError

    def user_root(self, prog: Program, mm: MmFields) -> Root:
        """Get the root of the user part of an mm."""
        raise NotImplementedError

    def kernel_root(self, prog: Program) -> Root:
        """
        Get the root of the kernel's own address space (``init_mm.pgd``).

        :raises FaultError: if it cannot be found
        """
        raise NotImplementedError

    def isolated_root(self, prog: Program, mm: MmFields) -> Root | None:
        """
        Get the second root that user mode runs on, if there is one (kernel page-table isolation).
        """
        return None

    def whole_root(self, prog: Program, pgd: int) -> Root:
        """
        Get the root of a space in which user and kernel part are both its own (``efi_mm``).

        :param pgd: Physical address.
        """
        top = len(self.levels) - 1
        return Root(pgd, top, ((0, self.levels[top].entries),))


class MmFields(NamedTuple):
    """The members of ``struct mm_struct`` that lead to its tables."""

    #: Virtual address of the mm.
    address: int
    #: ``mm->pgd``, translated to a physical address.
    pgd: int
    #: ``mm->context.asce``; 0 where the architecture has none.
    asce: int
    #: Whether ``mm->context.ldt`` is set.
    has_ldt: bool


def gather(values: EntryArray, fields: tuple[AddressField, ...]) -> EntryArray:
    """Put a physical address together from its parts in each entry."""
    result = np.zeros(values.shape, np.uint64)
    for mask, shift in fields:
        part = values & np.uint64(mask)
        result |= part << np.uint64(shift) if shift >= 0 else part >> np.uint64(-shift)
    return result


def scatter(address: int, fields: tuple[AddressField, ...]) -> Match:
    """Get the pattern that entries with a given physical address have."""
    mask = value = 0
    for part, shift in fields:
        mask |= part
        value |= (address >> shift if shift >= 0 else address << -shift) & part
    return Match(mask, value)


def object_or_none(prog: Program, name: str) -> Object | None:
    """Get a variable of the kernel, or ``None`` if this kernel has none of that name."""
    try:
        return prog.variable(name)
    except LookupError:
        return None
