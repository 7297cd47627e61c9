# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
s390: page status table entries (PGSTEs), which KVM keeps behind the entries of a page table.

A page table of 256 entries is followed by as many PGSTEs. The upper bits are the machine's in all
versions (PGSTE_* in arch/s390/include/asm/pgtable.h, union pgste in arch/s390/kvm/gmap/dat.h); the
software bits moved when KVM got tables of its own in 7.0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Program

from ptinspect.kernel.paging import EntryClass, Paging
from ptinspect.memory import AddressArray, BoolArray, read_blocks
from ptinspect.tables.entries import raw_entries

#: From an entry to its PGSTE, bytes.
PGSTE_OFFSET = 2048

_LOCK = 0x0080000000000000
_MACHINE_BITS = (
    (_LOCK, "locked"),
    (0x0040000000000000, "host-referenced"),
    (0x0020000000000000, "host-changed"),
    (0x0004000000000000, "guest-referenced"),
    (0x0002000000000000, "guest-changed"),
    (0x0800000000000000, "fetch-protected"),
    (0x0000000080000000, "zero"),
    (0x0000000040000000, "nodat"),
)
_MM_BITS = (
    (0x0000800000000000, "user-dirty"),
    (0x0000400000000000, "notify"),
    (0x0000200000000000, "shadowed"),
)
_KVM_BITS = (
    (0x0000000000008000, "cmma-dirty"),
    (0x0000000000004000, "notify"),
    (0x0000000000002000, "shadowed"),
    (0x0000000000001000, "nested-memory"),
)
_USAGES = ("stable", "unused", "potentially-volatile", "volatile")


@dataclass(frozen=True)
class Pgste:
    """A PGSTE and its page-table entry."""

    #: Guest address of the page.
    guest: int
    #: Physical address of the page-table entry.
    entry_address: int
    #: The page-table entry.
    entry: int
    kind: EntryClass
    #: Physical address of the page; ``None`` if the entry maps none.
    physical: int | None
    value: int
    #: Storage key: access-control bits.
    access: int
    usage: str
    #: Names of the bits that are set.
    flags: tuple[str, ...]

    @property
    def locked(self) -> bool:
        """Whether somebody holds the lock of the entry (PCL)."""
        return bool(self.value & _LOCK)


def read_pgstes(
    prog: Program,
    paging: Paging,
    tables: AddressArray,
    guests: AddressArray,
    *,
    kvm_owned: bool,
) -> tuple[list[Pgste], BoolArray]:
    """
    Read the PGSTEs of page tables; those of empty entries only if they are not 0.

    :param tables: uint64: physical addresses of the page tables.
    :param guests: uint64: first guest address of each.
    :param kvm_owned: Whether the tables are KVM's own (from 7.0).
    :return: The PGSTEs, in order of the tables; and bool, by table, whether it could be read.
    """
    blocks = read_blocks(prog, tables, 2 * PGSTE_OFFSET)
    values = paging.values(raw_entries(blocks.data))
    found: list[Pgste] = []
    for row in np.flatnonzero(blocks.readable).tolist():
        half = values.shape[1] // 2
        found += _of_table(
            paging,
            int(tables[row]),
            int(guests[row]),
            values[row, :half],
            values[row, half:],
            kvm_owned,
        )
    return found, blocks.readable


#: PTVAL_VMADDR: three PGSTEs from the ninth on hold 16 bits each (arch/s390/kvm/gmap/dat.h).
_PTVAL_FIRST, _PTVAL_COUNT = 8, 3


def read_ptval(prog: Program, table: int) -> int | None:
    """
    Get the machine's segment that KVM noted in the PGSTEs of a page table (PTVAL_VMADDR, val16).

    :param table: Physical address.
    :return: ``None`` if they cannot be read.
    """
    try:
        data = prog.read(table + PGSTE_OFFSET + 8 * _PTVAL_FIRST, 8 * _PTVAL_COUNT, True)
    except FaultError:
        return None
    value = 0
    for pgste in struct.unpack(f">{_PTVAL_COUNT}Q", data):
        value = value << 16 | pgste >> 32 & 0xFFFF
    return value


def _of_table(
    paging: Paging,
    table: int,
    guest: int,
    entries: npt.NDArray[np.uint64],
    pgstes: npt.NDArray[np.uint64],
    kvm_owned: bool,
) -> Iterator[Pgste]:
    kinds = paging.classify(entries, 0)
    if kvm_owned:
        kinds = paging.kvm_kinds(kinds)
    slots = np.flatnonzero((kinds != EntryClass.NONE) | (pgstes != 0))
    targets = paging.leaf_targets(entries[slots], 0, slots)
    soft = _KVM_BITS if kvm_owned else _MM_BITS
    for slot, target in zip(slots.tolist(), targets.tolist()):
        kind, value = EntryClass(int(kinds[slot])), int(pgstes[slot])
        mapped = kind in (EntryClass.LEAF, EntryClass.PROT_NONE)
        yield Pgste(
            guest=guest + slot * paging.page_bytes,
            entry_address=table + 8 * slot,
            entry=int(entries[slot]),
            kind=kind,
            physical=target if mapped else None,
            value=value,
            access=value >> 60,
            usage=_USAGES[value >> 24 & 3],
            flags=tuple(name for bit, name in (*_MACHINE_BITS, *soft) if value & bit),
        )
