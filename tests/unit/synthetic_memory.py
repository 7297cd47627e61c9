# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Page tables made of random entries in synthetic physical memory, with what they mean.

The entries are written here straight from each architecture's format, without the code under test,
so that three answers can be compared: what was meant, what ptinspect reads, and what drgn's own
walker reads.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from _drgn import _linux_helper_follow_phys
from drgn import (
    Architecture,
    FaultError,
    FindObjectFlags,
    Object,
    Platform,
    PlatformFlags,
    Program,
    TypeMember,
)

from ptinspect.kernel.paging import Paging, Root, aarch64, ppc64, riscv64, s390x, x86_64
from ptinspect.kernel.paging.model import EntryClass

PAGE = 4096
LITTLE = PlatformFlags.IS_64_BIT | PlatformFlags.IS_LITTLE_ENDIAN
BIG = PlatformFlags.IS_64_BIT

#: Where synthetic programs see physical memory, as a kernel's direct map; above it and above user
#: addresses, and without the top byte, which drgn ignores on arm64.
DIRECT_MAP = 1 << 53


class SparseMemory:
    """Physical memory of which only some pages exist."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}

    def add(self, address: int, size: int) -> None:
        """Make memory exist, zeroed unless it existed already."""
        for page in range(address // PAGE, (address + size - 1) // PAGE + 1):
            self.pages.setdefault(page, bytearray(PAGE))

    def write(self, address: int, data: bytes) -> None:
        """Write to memory that exists."""
        while data:
            page, offset = divmod(address, PAGE)
            part = data[: PAGE - offset]
            self.pages[page][offset : offset + len(part)] = part
            address += len(part)
            data = data[len(part) :]

    def read(self, address: int, count: int) -> bytes:
        """
        Read memory.

        :raises FaultError: where none exists
        """
        result = bytearray()
        while count:
            page, offset = divmod(address, PAGE)
            size = min(count, PAGE - offset)
            if page not in self.pages:
                raise FaultError("no such memory", address)
            result += self.pages[page][offset : offset + size]
            address += size
            count -= size
        return bytes(result)

    def attach(self, prog: Program) -> None:
        """Make a Program see this memory, physically and at DIRECT_MAP."""

        def physical(address: int, count: int, offset: int, physical: bool) -> bytes:
            return self.read(address, count)

        def virtual(address: int, count: int, offset: int, physical: bool) -> bytes:
            return self.read(address - DIRECT_MAP, count)

        prog.add_memory_segment(0, (1 << 64) - 1, physical, True)
        prog.add_memory_segment(DIRECT_MAP, DIRECT_MAP, virtual, False)


@dataclass
class Mode:
    """A paging mode: how to write its entries, and how to ask drgn about them."""

    name: str
    paging: Paging
    #: Level and index of a table entry, its physical address, and random bits.
    table: Callable[[int, int, Random], int]
    leaf: Callable[[int, int, Random], int]
    #: An entry that keeps its page but hides it, or None where the level has no such thing.
    hidden: Callable[[int, int, Random], int | None]
    #: A swap entry of a type.
    swap: Callable[[int, int, Random], int | None]
    empty: Callable[[int], int]
    #: Whether a level has leaves.
    has_leaves: Callable[[int], bool]
    #: log2 of the highest physical address.
    physical_bits: int
    platform: Platform
    #: vmcoreinfo lines for a root at a physical address, and what drgn calls that root.
    drgn_root: Callable[[int], tuple[str, int]] | None
    #: Alignment of tables where it is more than their size.
    table_alignment: int = 1
    #: Memory that must exist behind a table because drgn reads it.
    bytes_read: int = 0
    #: First root entry that belongs to the space and the one after the last; root level.
    root_entries: tuple[int, int] | None = None
    root_level: int | None = None
    base: int = 0
    page_bytes: int = 4096
    needs_objects: bool = False
    #: A slow walker for architectures that drgn does not walk: memory, root, address.
    reference: Callable[[SparseMemory, int, int], int | None] | None = None

    def __str__(self) -> str:
        return self.name

    def program(self, memory: SparseMemory, root: int) -> tuple[Program, int]:
        """Get a Program that translates through a root, and drgn's handle of that root."""
        prog = Program(self.platform)
        lines, handle = "", 0
        if self.drgn_root is not None:
            lines, handle = self.drgn_root(root)
        if self.needs_objects:
            _add_cpu_spec(prog, memory)
        text = f"OSRELEASE=6.12.0\nPAGESIZE={self.page_bytes}\n{lines}"
        if self.drgn_root is not None:
            prog.set_linux_kernel_custom(text, False)
        memory.attach(prog)
        return prog, handle


class Mapping(NamedTuple):
    """What one entry means."""

    level: int
    va: int
    kind: EntryClass
    #: Physical address; for what maps memory.
    physical: int | None


class TableFact(NamedTuple):
    """One table that the root reaches."""

    level: int
    va: int
    address: int
    entry_address: int | None


@dataclass
class Tree:
    """Random tables and what they mean."""

    mode: Mode
    memory: SparseMemory
    root: Root
    tables: list[TableFact] = field(default_factory=list)
    #: Every entry that is not empty and not a table.
    mappings: list[Mapping] = field(default_factory=list)

    def translate(self, address: int) -> Mapping | None:
        """Get the mapping that contains a virtual address."""
        for mapping in self.mappings:
            span = 1 << self.mode.paging.levels[mapping.level].shift
            if mapping.va <= address < mapping.va + span:
                return mapping
        return None


def build_tree(mode: Mode, random: Random, *, tables: int = 24, fill: int = 12) -> Tree:
    """
    Fill synthetic memory with a random tree.

    :param tables: About how many tables there shall be.
    :param fill: How many entries of each table are filled.
    """
    paging = mode.paging
    memory = SparseMemory()
    top = mode.root_level if mode.root_level is not None else len(paging.levels) - 1
    allocate = _allocator(mode, random, memory)
    root_address = allocate(top)
    own = mode.root_entries or (0, paging.levels[top].entries)
    root = Root(root_address, top, (own,), mode.base)
    tree = Tree(mode, memory, root)
    waiting = [TableFact(top, mode.base, root_address, None)]
    while waiting:
        table = waiting.pop(0)
        tree.tables.append(table)
        level = table.level
        count = paging.levels[level].entries
        first, end = own if table.entry_address is None else (0, count)
        slots = sorted(random.sample(range(first, end), min(fill, end - first)))
        for slot in slots:
            va = table.va + (slot << paging.levels[level].shift)
            va = _canonical(paging, va)
            room = len(tree.tables) + len(waiting) < tables
            entry, fact = _random_entry(mode, random, level, va, room, allocate)
            if entry is None:
                continue
            where = table.address + 8 * slot
            memory.write(where, _packed(paging, entry))
            if isinstance(fact, int):
                waiting.append(TableFact(level - 1, va, fact, where))
            elif fact is not None:
                tree.mappings.append(fact)
    return tree


def _random_entry(
    mode: Mode,
    random: Random,
    level: int,
    va: int,
    room: bool,
    allocate: Callable[[int], int],
) -> tuple[int | None, Mapping | int | None]:
    kind = random.choice(["table", "table", "leaf", "leaf", "hidden", "swap"])
    if kind == "table":
        if not level or not room:
            return None, None
        address = allocate(level - 1)
        return mode.table(level, address, random), address
    if not mode.has_leaves(level):
        return None, None
    shift = mode.paging.levels[level].shift
    physical = random.randrange(1 << (mode.physical_bits - shift)) << shift
    if kind == "leaf":
        return mode.leaf(level, physical, random), Mapping(level, va, EntryClass.LEAF, physical)
    if kind == "hidden":
        entry = mode.hidden(level, physical, random)
        return entry, entry and Mapping(level, va, EntryClass.PROT_NONE, physical)
    entry = mode.swap(level, random.randrange(24), random)
    return entry, entry and Mapping(level, va, EntryClass.SWAP, None)


def _allocator(mode: Mode, random: Random, memory: SparseMemory) -> Callable[[int], int]:
    taken: set[int] = set()

    def allocate(level: int) -> int:
        size = mode.paging.levels[level].table_bytes
        unit = max(size, 64, mode.table_alignment)
        while True:
            # Now and then beside the last one, so that adjacent reads happen.
            if taken and random.random() < 0.5:
                address = (max(taken) // unit + 1) * unit
            else:
                address = random.randrange(1 << (min(mode.physical_bits, 44) - 20)) * unit
            span = range(address // 64, (address + size - 1) // 64 + 1)
            if not any(64 * part in taken for part in span) and address + size < 1 << 50:
                break
        taken.update(64 * part for part in span)
        memory.add(address, max(size, mode.bytes_read))
        shape = mode.paging.levels[level]
        empty = _packed(mode.paging, mode.empty(level))
        memory.write(address, empty * shape.entries)
        return address

    return allocate


def _packed(paging: Paging, value: int) -> bytes:
    return struct.pack("<Q" if paging.dtype.str[0] == "<" else ">Q", value)


def _canonical(paging: Paging, address: int) -> int:
    if not paging.sign_extended:
        return address
    low = address & ((1 << paging.va_bits) - 1)
    negative = low >> (paging.va_bits - 1)
    return low | ((1 << 64) - (1 << paging.va_bits) if negative else 0)


def drgn_translation(prog: Program, handle: int, address: int) -> int | None:
    """Ask drgn's walker where an address lies."""
    try:
        return int(_linux_helper_follow_phys(prog, handle, address))
    except FaultError:
        return None


def _add_cpu_spec(prog: Program, memory: SparseMemory) -> None:
    """Give drgn the object by which it recognises the radix MMU."""
    address = (1 << 52) - PAGE
    memory.add(address, PAGE)
    memory.write(address, struct.pack("<Q", 0x40))
    features = prog.int_type("unsigned long", 8, False)
    spec = prog.struct_type("cpu_spec", 8, (TypeMember(features, "mmu_features"),))
    pointer = prog.pointer_type(spec)

    def find(
        prog: Program, name: str, flags: FindObjectFlags, filename: str | None
    ) -> Object | None:
        if name != "cur_cpu_spec":
            return None
        return Object(prog, pointer, DIRECT_MAP + address)

    prog.register_object_finder("cpu_spec", find, enable_index=0)


def _some(random: Random, *bits: int) -> int:
    return sum(bit for bit in bits if random.random() < 0.5)


# x86_64: Intel SDM volume 3, "Paging"; software bits from asm/pgtable_types.h.


def _x86_mode(levels: int, c_bit: int = 0) -> Mode:
    mask = ((1 << 52) - PAGE) & ~c_bit
    present, rw, user, huge, prot_none, nx = 1, 2, 4, 0x80, 0x100, 1 << 63

    def table(level: int, address: int, random: Random) -> int:
        return address | present | c_bit | _some(random, rw, user, 0x20, nx)

    def leaf(level: int, address: int, random: Random) -> int:
        return (
            address
            | present
            | c_bit
            | (huge if level else 0)
            | _some(random, rw, user, 8, 16, 0x20, 0x40, 0x100, nx)
        )

    def hidden(level: int, address: int, random: Random) -> int:
        size = 1 << (12 + 9 * level)
        inverted = ~address & mask & ~(size - 1)
        return inverted | c_bit | prot_none | (huge if level else 0) | _some(random, rw, nx)

    def swap(level: int, type_: int, random: Random) -> int:
        offset = ~random.randrange(1 << 40) & ((1 << 50) - 1)
        return type_ << 59 | offset << 9 | _some(random, 2, 4, 8)

    def drgn_root(address: int) -> tuple[str, int]:
        handle = 0xFFFFFFFF80000000 + (address & 0x3FFFFFFF)
        base = address & ~0x3FFFFFFF
        text = f"SYMBOL(swapper_pg_dir)={handle:x}\nNUMBER(phys_base)={base}\n"
        return text + f"NUMBER(pgtable_l5_enabled)={int(levels == 5)}\n", handle

    return Mode(
        name=f"x86_64 {levels}-level" + (" encrypted" if c_bit else ""),
        paging=x86_64.make_paging(five_levels=levels == 5, physical_mask=((1 << 52) - 1) & ~c_bit),
        table=table,
        leaf=leaf,
        hidden=hidden,
        swap=swap,
        empty=lambda level: 0,
        has_leaves=lambda level: level < 3,
        physical_bits=46,
        platform=Platform(Architecture.X86_64, LITTLE),
        # drgn does not know of encryption bits.
        drgn_root=None if c_bit else drgn_root,
    )


# s390x: Principles of Operation, "Dynamic Address Translation"; asm/pgtable.h.


def _s390_mode(root_level: int, present_bits: bool) -> Mode:
    types = {1: 0, 2: 0x4, 3: 0x8, 4: 0xC}

    def table(level: int, address: int, random: Random) -> int:
        bits = _some(random, 0x200, 0x100)
        if level == 1:
            return address | bits | (1 if present_bits else 0)
        return address | bits | types[level] | 3

    def leaf(level: int, address: int, random: Random) -> int:
        if level == 0:
            # An old page is invalid for the hardware; drgn then does not see it.
            return address | 0x001 | 0x010 | _some(random, 0x4, 0x8, 0x20, 0x100, 0x200)
        read = 0xC001 if present_bits else 0x3
        return address | 0x400 | types[level] | read | _some(random, 0x100, 0x200, 0x1000)

    def hidden(level: int, address: int, random: Random) -> int | None:
        if level == 0:
            return address | 0x400 | 0x001 | 0x200
        if level == 2 and not present_bits:
            return None
        return address | 0x400 | 0x20 | types[level] | (0x1 if present_bits else 0)

    def swap(level: int, type_: int, random: Random) -> int | None:
        offset = random.randrange(1 << 40) << 12
        if level == 0:
            return offset | 0x400 | 0x200 | type_ << 2 | _some(random, 0x800, 0x2)
        if not present_bits:
            return None
        return offset | 0x20 | 0x10 | types[level] | type_ << 6

    return Mode(
        name=f"s390x root {root_level}" + (" with present bits" if present_bits else ""),
        paging=s390x.make_paging(present_bits=present_bits),
        table=table,
        leaf=leaf,
        hidden=hidden,
        swap=swap,
        empty=lambda level: 0x400 if level == 0 else 0x20 | types[level],
        has_leaves=lambda level: level < 3,
        physical_bits=52,
        platform=Platform(Architecture.S390X, BIG),
        drgn_root=lambda address: (f"SYMBOL(swapper_pg_dir)={address:x}\n", address),
        # drgn reads 16 KiB for a page table of 2 KiB.
        bytes_read=2048 * 8,
        root_level=root_level,
    )


# ppc64 radix: Power ISA 3.0B book III, "Radix Tree Translation"; asm/book3s/64/radix.h.


def _ppc64_mode(page_shift: int, kernel: bool) -> Mode:
    present, pte = 1 << 63, 1 << 62
    sizes = {12: (9, 9, 9, 13), 16: (5, 9, 9, 13)}[page_shift]

    def table(level: int, address: int, random: Random) -> int:
        return present | address | sizes[level - 1]

    def leaf(level: int, address: int, random: Random) -> int:
        read = 4 | _some(random, 1, 2, 8, 0x80, 0x100, 1 << 9)
        return present | pte | address | read

    def hidden(level: int, address: int, random: Random) -> int:
        if random.random() < 0.5:
            return present | pte | address | 8 | 0x100
        return pte | 1 << 61 | address | 4

    def swap(level: int, type_: int, random: Random) -> int:
        offset = random.randrange(1 << 30) << page_shift
        return pte | offset | type_ | _some(random, 0x20, 1 << 9)

    def drgn_root(address: int) -> tuple[str, int]:
        handle = DIRECT_MAP + address
        return f"SYMBOL(swapper_pg_dir)={handle + (1 << 40):x}\n", handle

    return Mode(
        name=f"ppc64 radix {1 << (page_shift - 10)}K" + (" kernel" if kernel else ""),
        paging=ppc64.make_paging(page_shift=page_shift),
        table=table,
        leaf=leaf,
        hidden=hidden,
        swap=swap,
        empty=lambda level: 0,
        has_leaves=lambda level: level < 3,
        physical_bits=52,
        platform=Platform(Architecture.PPC64, LITTLE),
        drgn_root=drgn_root,
        base=0xC000000000000000 if kernel else 0,
        page_bytes=1 << page_shift,
        needs_objects=True,
    )


# arm64: Arm ARM D8, "The AArch64 Virtual Memory System Architecture"; asm/pgtable-hwdef.h.


def _arm64_mode(
    page_shift: int, va_bits: int, *, lpa2: bool = False, kernel: bool = False, old: bool = False
) -> Mode:
    def address_bits(address: int) -> int:
        if page_shift == 16:
            return address & ((1 << 48) - 1) | address >> 48 << 12
        if lpa2:
            return address & ((1 << 50) - 1) | address >> 50 << 8
        return address

    def table(level: int, address: int, random: Random) -> int:
        return 3 | address_bits(address) | _some(random, 1 << 59, 1 << 60)

    def leaf(level: int, address: int, random: Random) -> int:
        low = 1 if level else 3
        bits = _some(random, 1 << 6, 1 << 7, 1 << 10, 1 << 11, 1 << 53, 1 << 54, 1 << 55)
        return low | address_bits(address) | bits

    def hidden(level: int, address: int, random: Random) -> int:
        mark = 1 << 58 if old else 1 << 11
        return (0 if level else 2) | mark | address_bits(address) | _some(random, 1 << 7, 1 << 54)

    def swap(level: int, type_: int, random: Random) -> int:
        offset = random.randrange(1 << 40)
        if old:
            return type_ << 3 | offset << 8 | _some(random, 4)
        return type_ << 6 | offset << 12 | _some(random, 4, 8)

    def has_leaves(level: int) -> bool:
        if level == 2:
            return len(paging.levels) > 2 and (page_shift == 12 or lpa2)
        return level == 0 or (level == 1 and len(paging.levels) > 1)

    def drgn_root(address: int) -> tuple[str, int]:
        text = f"NUMBER(VA_BITS)={va_bits}\nNUMBER(TCR_EL1_T1SZ)={hex(64 - va_bits)}\n"
        if kernel:
            handle = 0xFFFF_8000_0000_0000 + (address & 0xFFFFFFFF)
            offset = handle - address
            text += f"NUMBER(kimage_voffset)={hex(offset & ((1 << 64) - 1))}\n"
            return text + f"SYMBOL(swapper_pg_dir)={handle:x}\n", handle
        handle = DIRECT_MAP + address
        return text + f"SYMBOL(swapper_pg_dir)={handle + (1 << 40):x}\n", handle

    paging = aarch64.make_paging(
        page_shift=page_shift,
        va_bits=va_bits,
        lpa2=lpa2,
        present_invalid=aarch64.OLD_PROT_NONE if old else aarch64.PRESENT_INVALID,
    )
    return Mode(
        name=f"arm64 {1 << (page_shift - 10)}K {va_bits}-bit"
        + (" LPA2" if lpa2 else "")
        + (" kernel" if kernel else "")
        + (" 6.1" if old else ""),
        paging=paging,
        table=table,
        leaf=leaf,
        hidden=hidden,
        swap=swap,
        empty=lambda level: 0,
        has_leaves=has_leaves,
        physical_bits=52 if lpa2 or page_shift == 16 else 48,
        platform=Platform(Architecture.AARCH64, LITTLE),
        drgn_root=drgn_root,
        table_alignment=64,
        base=(1 << 64) - (1 << va_bits) if kernel else 0,
        page_bytes=1 << page_shift,
    )


# riscv64: The RISC-V Instruction Set Manual volume II, "Sv39"; asm/pgtable-bits.h.


def _riscv_mode(va_bits: int) -> Mode:
    def table(level: int, address: int, random: Random) -> int:
        return 1 | address >> 2

    def leaf(level: int, address: int, random: Random) -> int:
        permissions = random.choice([2, 8, 2 | 4, 2 | 8, 2 | 4 | 8])
        bits = _some(random, 0x10, 0x20, 0x40, 0x80, 0x100, 1 << 61, 1 << 62)
        return 1 | permissions | address >> 2 | bits

    def hidden(level: int, address: int, random: Random) -> int:
        return 0x20 | address >> 2 | _some(random, 0x40, 0x80)

    def swap(level: int, type_: int, random: Random) -> int:
        return type_ << 7 | random.randrange(1, 1 << 40) << 12 | _some(random, 0x40)

    def reference(memory: SparseMemory, table: int, address: int) -> int | None:
        """Follow the manual's algorithm ("Virtual Address Translation Process")."""
        for level in reversed(range((va_bits - 12) // 9)):
            shift = 12 + 9 * level
            where = table + 8 * (address >> shift & 511)
            (entry,) = struct.unpack("<Q", memory.read(where, 8))
            frame = entry >> 10 & (1 << 44) - 1
            if not entry & 1:
                return None
            if entry & 0xE:
                return frame << 12 | address & (1 << shift) - 1
            table = frame << 12
        return None

    return Mode(
        name=f"riscv64 Sv{va_bits}",
        reference=reference,
        paging=riscv64.make_paging(va_bits=va_bits),
        table=table,
        leaf=leaf,
        hidden=hidden,
        swap=swap,
        empty=lambda level: 0,
        has_leaves=lambda level: True,
        physical_bits=56,
        platform=Platform(Architecture.RISCV64, LITTLE),
        drgn_root=None,
    )


def all_modes() -> Iterator[Mode]:
    """Get every paging mode that ptinspect knows."""
    yield _x86_mode(4)
    yield _x86_mode(5)
    yield _x86_mode(4, c_bit=1 << 51)
    yield _x86_mode(5, c_bit=1 << 47)
    for root_level in (1, 2, 3, 4):
        for present_bits in (False, True):
            yield _s390_mode(root_level, present_bits)
    for page_shift in (12, 16):
        for kernel in (False, True):
            yield _ppc64_mode(page_shift, kernel)
    for page_shift, va_bits, lpa2 in (
        (12, 39, False),
        (12, 48, False),
        (12, 52, True),
        (14, 36, False),
        (14, 47, False),
        (14, 48, False),
        (14, 52, True),
        (16, 42, False),
        (16, 48, False),
        (16, 52, False),
    ):
        for kernel in (False, True):
            yield _arm64_mode(page_shift, va_bits, lpa2=lpa2, kernel=kernel)
    yield _arm64_mode(12, 48, old=True)
    for va_bits in (39, 48, 57):
        yield _riscv_mode(va_bits)


MODES = tuple(all_modes())
