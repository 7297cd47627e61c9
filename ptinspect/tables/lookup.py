# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""One address through all levels, and back: what reaches a table or a page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Program

from ptinspect.kernel.paging.model import (
    ALL_PERMISSIONS,
    EntryArray,
    EntryClass,
    Match,
    Paging,
    Permission,
    Root,
)
from ptinspect.memory import iter_blocks
from ptinspect.tables.entries import raw_entries
from ptinspect.tables.physical import PhysicalRanges
from ptinspect.tables.walk import RowState, Tables

#: Classes whose entries name a page of memory.
_MAPPING = (EntryClass.LEAF, EntryClass.PROT_NONE)


class Outcome(Enum):
    """How the translation of one address ended."""

    MAPPED = "mapped"
    #: An entry on the way is empty.
    NOT_MAPPED = "not mapped"
    #: The page is kept but hidden from the hardware.
    PROT_NONE = "prot none"
    #: The page is elsewhere; the class of the last entry tells where.
    NOT_PRESENT = "not present"
    #: An entry that no kernel writes.
    BAD = "bad entry"
    #: A table's memory is not in the dump.
    UNREADABLE = "table cannot be read"
    #: An entry points outside the target's memory.
    OUTSIDE = "table outside memory"
    #: The space cannot contain the address.
    NO_ADDRESS = "not an address of this space"


@dataclass(frozen=True)
class Step:
    """The entry of one level that translates an address."""

    #: Index into :attr:`Paging.levels`.
    level: int
    #: Physical address of the table.
    table: int
    index: int
    #: ``None`` if the table cannot be read.
    value: int | None
    kind: EntryClass | None
    #: Of this entry alone, if it is a table or a mapping.
    permissions: Permission | None

    @property
    def entry_address(self) -> int:
        """Physical address of the entry."""
        return self.table + 8 * self.index


@dataclass(frozen=True)
class Translation:
    """One virtual address through all levels."""

    address: int
    outcome: Outcome
    #: From the root down.
    steps: tuple[Step, ...]
    #: Where the address lies, also if the hardware does not see it (PROT_NONE).
    physical: int | None = None
    #: Bytes that the last entry maps, alone.
    mapped_bytes: int | None = None
    #: Bytes of the mapping of which the entry is a part (contiguous entries).
    page_bytes: int | None = None
    #: Of the whole path, if it ends at a page.
    permissions: Permission | None = None


def walk_address(
    prog: Program,
    paging: Paging,
    root: Root,
    address: int,
    *,
    memory: PhysicalRanges | None = None,
    kernel: bool = False,
    kvm_owned: bool = False,
) -> Translation:
    """
    Translate one address, step by step.

    :param prog: The kernel.
    :param paging: What :func:`paging_of` says of it.
    :param root: The root table: ``space.root``.
    :param address: Virtual.
    :param memory: Where the target has memory.
    :param kernel: Whether the space is the kernel's (:meth:`Paging.kernel_kinds`).
    :param kvm_owned: Whether its tables are KVM's own (:meth:`Paging.kvm_kinds`).
    :return: Each table on the way with its entry, how the way ended, and where it leads.
    """
    slot = paging.index_of(root, address)
    if slot is None:
        return Translation(address, Outcome.NO_ADDRESS, ())
    steps: list[Step] = []
    table, permissions = root.address, ALL_PERMISSIONS
    for level in range(root.level, -1, -1):
        shape = paging.levels[level]
        if level != root.level:
            slot = (address >> shape.shift) % shape.entries
        if memory is not None and not memory.contain(np.array([table], np.uint64), 8)[0]:
            steps.append(Step(level, table, slot, None, None, None))
            return Translation(address, Outcome.OUTSIDE, tuple(steps))
        try:
            data = prog.read(table + 8 * slot, 8, True)
        except FaultError:
            steps.append(Step(level, table, slot, None, None, None))
            return Translation(address, Outcome.UNREADABLE, tuple(steps))
        value = paging.values(np.frombuffer(data, np.uint64))
        kinds = paging.classify(value, level)
        if kernel:
            kinds = paging.kernel_kinds(kinds, value, level)
        if kvm_owned:
            kinds = paging.kvm_kinds(kinds)
        kind = EntryClass(int(kinds[0]))
        own = None
        if kind in (EntryClass.TABLE, *_MAPPING):
            leaf = kind is not EntryClass.TABLE
            own = Permission(int(paging.permissions(value, level, leaf=leaf)[0]))
            permissions &= own
        steps.append(Step(level, table, slot, int(value[0]), kind, own))
        if kind is EntryClass.TABLE:
            table = int(paging.table_targets(value, level)[0])
            continue
        if kind not in _MAPPING:
            return Translation(address, _outcome(kind), tuple(steps))
        base = int(paging.leaf_targets(value, level, np.array([slot]))[0])
        return Translation(
            address,
            Outcome.MAPPED if kind is EntryClass.LEAF else Outcome.PROT_NONE,
            tuple(steps),
            base | address & (shape.entry_span - 1),
            shape.entry_span,
            int(paging.leaf_bytes(value, level)[0]),
            permissions,
        )
    # A table of the lowest level never points to a table.
    raise AssertionError("level 0 has table entries")


def _outcome(kind: EntryClass) -> Outcome:
    if kind is EntryClass.NONE:
        return Outcome.NOT_MAPPED
    return Outcome.BAD if kind is EntryClass.BAD else Outcome.NOT_PRESENT


@dataclass(frozen=True)
class TableOwner:
    """One way in which a table is reached."""

    #: Row in the tables of the walk.
    row: int
    #: Index of the space.
    space: int
    level: int
    #: First virtual address that the table translates.
    va: int
    #: Physical address of the entry that points to it; ``None`` for a root.
    entry_address: int | None
    #: Physical address of the table.
    table: int


@dataclass(frozen=True)
class PageOwner:
    """One entry that maps a page."""

    #: Row of the table that holds the entry.
    row: int
    space: int
    level: int
    #: Virtual address at which the page (or the part asked for) is seen.
    va: int
    entry_address: int
    value: int
    #: LEAF or PROT_NONE.
    kind: EntryClass
    #: Of the whole path.
    permissions: Permission


def table_owners(tables: Tables, address: int) -> list[TableOwner]:
    """
    Get every way in which the table that holds a physical address is reached.

    A table that is reached through a shared one further up is given for each space that shares.

    :param tables: A walk of all spaces (``census.tables``).
    :param address: Physical.
    :return: One for each entry, or root, and space; empty if no table lies there.
    """
    sizes = tables.table_bytes.astype(np.uint64)
    here = np.uint64(address)
    holds = (tables.address <= here) & (here - tables.address < sizes)
    entries = tables.entry_address
    owners = []
    for row in np.flatnonzero(holds).tolist():
        parent = int(entries[row]) if int(tables.parent[row]) >= 0 else None
        for space, va in _views(tables, row, int(tables.va[row])):
            level, table = int(tables.level[row]), int(tables.address[row])
            owners.append(TableOwner(row, space, level, va, parent, table))
    return owners


def tables_within(tables: Tables, begin: int, end: int) -> list[int]:
    """
    Get the tables that lie in a range of memory, wholly or in part.

    :param tables: A walk of all spaces (``census.tables``).
    :param begin: Physical address.
    :param end: Physical address behind the last byte.
    :return: Their physical addresses, each once, in order.
    """
    first = tables.address
    overlap = (first < np.uint64(end)) & (first + tables.table_bytes.astype(np.uint64) > begin)
    addresses: list[int] = np.unique(first[overlap]).tolist()
    return addresses


def page_owners(prog: Program, tables: Tables, address: int) -> list[PageOwner]:
    """
    Get every entry that maps the byte at a physical address, in any space.

    Reads all tables again, comparing the address bits of whole tables at a time.

    :param prog: The kernel.
    :param tables: A walk of its spaces (``census.tables``).
    :param address: Physical.
    :return: One for each entry and space; empty if nothing that could be read maps it.
    """
    paging = tables.paging
    readable = tables.state == RowState.READ
    readable |= tables.state == RowState.NOT_READ
    owners: list[PageOwner] = []
    for level in range(len(paging.levels) - 1, -1, -1):
        if not any(rule.kind is EntryClass.LEAF for rule in paging.levels[level].rules):
            continue
        rows = np.flatnonzero(readable & (tables.level == level))
        rows = rows[np.argsort(tables.address[rows])]
        patterns = paging.leaf_patterns(address, level)
        for found_rows, slots, values in _matching(prog, tables, level, rows, patterns):
            owners.extend(_page_owners(tables, level, address, found_rows, slots, values))
    return owners


def _matching(
    prog: Program,
    tables: Tables,
    level: int,
    rows: npt.NDArray[np.intp],
    patterns: tuple[Match, ...],
) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], EntryArray]]:
    """Find entries with any of the patterns: their rows, their slots, their values."""
    paging = tables.paging
    size = paging.levels[level].table_bytes
    for batch in iter_blocks(prog, tables.address[rows], size):
        raw = raw_entries(batch.data)
        hit = np.zeros(raw.shape, np.bool_)
        for mask, value in patterns:
            hit |= (raw & paging.raw_constant(mask)) == paging.raw_constant(value)
        if batch.readable is not None:
            hit[~batch.readable] = False
        place, slot = np.nonzero(hit)
        if len(place):
            yield rows[batch.first + place], slot, paging.values(raw[place, slot])


def _page_owners(
    tables: Tables,
    level: int,
    address: int,
    rows: npt.NDArray[np.intp],
    slots: npt.NDArray[np.intp],
    values: EntryArray,
) -> Iterator[PageOwner]:
    paging = tables.paging
    shape = paging.levels[level]
    kinds = paging.classify(values, level)
    kernel = np.array([space.kernel for space in tables.spaces], np.bool_)[tables.space[rows]]
    kinds = np.where(kernel, paging.kernel_kinds(kinds, values, level), kinds)
    kvm = np.array([space.kvm_owned for space in tables.spaces], np.bool_)[tables.space[rows]]
    kinds = np.where(kvm, paging.kvm_kinds(kinds), kinds)
    targets = paging.leaf_targets(values, level, slots)
    permissions = paging.permissions(values, level, leaf=True) & tables.permissions[rows]
    for n, row in enumerate(rows.tolist()):
        space = tables.spaces[int(tables.space[row])]
        kind = EntryClass(int(kinds[n]))
        offset = address - int(targets[n])
        if kind not in _MAPPING or not 0 <= offset < shape.entry_span:
            continue
        slot = int(slots[n])
        if int(tables.parent[row]) < 0 and not any(a <= slot < b for a, b in space.root.entries):
            continue
        within = slot << shape.shift | offset
        for seen in (row, *np.flatnonzero(tables.first == row).tolist()):
            for number, base in _views(tables, seen, int(tables.va[seen])):
                yield PageOwner(
                    row=seen,
                    space=number,
                    level=level,
                    va=int(paging.canonical(np.array([base + within], np.uint64))[0]),
                    entry_address=int(tables.address[row]) + 8 * slot,
                    value=int(values[n]),
                    kind=kind,
                    permissions=Permission(int(permissions[n])),
                )


def _views(tables: Tables, row: int, va: int) -> Iterator[tuple[int, int]]:
    """
    Get the spaces that see a row: its own, and those that share a table above it.

    :param va: Virtual address in the row's own space.
    :return: Index of the space, and the address that *va* has there.
    """
    yield int(tables.space[row]), va
    above = int(tables.parent[row])
    while above >= 0:
        offset = va - int(tables.va[above])
        for shared in np.flatnonzero(tables.first == above).tolist():
            yield from _views(tables, shared, int(tables.va[shared]) + offset)
        above = int(tables.parent[above])
