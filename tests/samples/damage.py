# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Small wounds for a kernel: one entry, one member of one descriptor, one pointer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np
from drgn import Object, Program
from overlay import Mendable

from ptinspect.census import Census
from ptinspect.checks.context import Context
from ptinspect.kernel.paging import EntryClass
from ptinspect.kernel.paging.model import AddressField
from ptinspect.tables.contents import Contents, read_contents
from ptinspect.tables.spaces import SpaceKind
from ptinspect.tables.walk import RowState

ALL = (1 << 64) - 1


class NotHereError(Exception):
    """This target has nothing that could be damaged in this way: why."""


class Damage:
    """Damages one target until the stack is closed."""

    def __init__(self, memory: Mendable, census: Census, stack: ExitStack) -> None:
        self.prog: Program = memory.prog
        self.census = census
        self.context = Context(self.prog, census)
        self.tables = census.tables
        self.paging = census.paging
        self.arch = census.paging.architecture
        self._memory = memory
        self._stack = stack

    # Writing.

    def write(self, address: int, data: bytes, *, physical: bool = False) -> None:
        """Lay bytes over memory."""
        self._stack.enter_context(self._memory.bytes_at(address, data, physical=physical))

    def write_object(self, obj: Object, value: object) -> int:
        """Give a variable or member another value; get its address."""
        self._stack.enter_context(self._memory.value_of(obj, value))
        assert obj.address_ is not None
        return int(obj.address_)

    def write_entry(self, address: int, value: int) -> int:
        """Give an entry (physical address) another value."""
        data = np.array([value & ALL], self.paging.dtype).tobytes()
        self.write(address, data, physical=True)
        return address

    def write_member(self, index: int, name: str, value: int) -> int:
        """Give a member of a typed descriptor another value; get the descriptor's address."""
        address = int(self.census.scan.addresses[index])
        self._write_field(address, name, value)
        return address

    def write_page_member(self, pfn: int, name: str, value: int) -> int:
        """Give a word of any page's struct page another value."""
        addresses, known = self.context.page_reader._memmap.addresses(np.array([pfn], np.uint64))
        assert known[0]
        self._write_field(int(addresses[0]), name, value)
        return int(addresses[0])

    def _write_field(self, address: int, name: str, value: int) -> None:
        fields = self.census.scan.descriptors.dtype.fields
        if fields is None or name not in fields:
            raise NotHereError(f"this kernel's descriptor has no {name}")
        dtype, offset = fields[name][:2]
        if dtype.kind not in "ui":
            raise NotHereError(f"{name} is no number here")
        bits = 8 * dtype.itemsize
        unsigned = np.array([value & (1 << bits) - 1], f"{dtype.str[0]}u{dtype.itemsize}")
        self.write(address + offset, unsigned.tobytes())

    # Choosing.

    def space(self, name: str) -> int:
        """Get the space of the process that the workload named so."""
        for number, space in enumerate(self.tables.spaces):
            if space.kind is SpaceKind.USER and any(t.comm == name for t in space.tasks):
                return number
        raise NotHereError(f"the workload made no process {name}")

    def rows(
        self, level: int, *, space: int | None = None, typed: bool = True, shared: bool = False
    ) -> list[int]:
        """Get the rows of tables of processes that were read; those of others too if *shared*."""
        tables = self.tables
        here = (tables.level == level) & (tables.state == RowState.READ) & (tables.parent >= 0)
        here &= self.context.process_space[tables.space]
        if space is not None:
            here &= tables.space == space
        if typed:
            here &= self.census.descriptor >= 0
        if not shared:
            here[np.unique(tables.first[tables.first >= 0])] = False
        return [int(row) for row in np.flatnonzero(here)]

    def row(self, level: int, **chosen: Any) -> int:
        """Get the first of :meth:`rows`."""
        rows = self.rows(level, **chosen)
        if not rows:
            raise NotHereError("no such table")
        return rows[0]

    def index(self, row: int) -> int:
        """Get the descriptor of a row."""
        index = int(self.census.descriptor[row])
        assert index >= 0
        return index

    def member(self, index: int, name: str) -> int:
        """Get a member of a descriptor."""
        if name not in (self.census.scan.descriptors.dtype.names or ()):
            raise NotHereError(f"this kernel's descriptor has no {name}")
        return int(self.census.scan.descriptors[name][index])

    def entry_address(self, row: int) -> int:
        """Get the physical address of the entry that points to the table of a row."""
        return int(self.tables.entry_address[row])

    def entry(self, address: int) -> int:
        """Get an entry by its physical address."""
        raw = np.frombuffer(self.prog.read(address, 8, True), np.uint64)
        return int(self.paging.values(raw)[0])

    def contents(self, row: int) -> Contents:
        """Get the entries of the table of a row."""
        found = read_contents(
            self.prog, self.paging, int(self.tables.address[row]), int(self.tables.level[row])
        )
        assert found is not None
        return found

    def retarget(self, value: int, address: int, *, level: int, leaf: bool = False) -> int:
        """Make an entry point to another table or page."""
        shape = self.paging.levels[level]
        fields: Iterable[AddressField] = shape.leaf_address if leaf else shape.table_address
        for mask, shift in fields:
            part = address >> shift if shift >= 0 else address << -shift
            value = value & ~mask | part & mask
        return value

    def slots(self, row: int, kind: EntryClass) -> list[int]:
        """Get the slots of a table that hold entries of a kind."""
        return [int(slot) for slot in np.flatnonzero(self.contents(row).kinds == kind)]

    def slot_address(self, row: int, slot: int) -> int:
        """Get the physical address of an entry."""
        return int(self.tables.address[row]) + 8 * slot

    def slot_va(self, row: int, slot: int) -> int:
        """Get the virtual address that an entry translates."""
        shift = self.paging.levels[int(self.tables.level[row])].shift
        return int(self.tables.va[row]) + (slot << shift)

    def covered(self, row: int, slot: int) -> bool:
        """Whether what an entry translates touches an area of its process."""
        areas = self.context.areas(int(self.tables.space[row]))
        assert areas is not None
        start = self.slot_va(row, slot)
        span = self.paging.levels[int(self.tables.level[row])].entry_span
        ends = np.array([start + span], np.uint64)
        return bool(areas.touch(np.array([start], np.uint64), ends)[0])

    def free_page(self) -> int:
        """Get the page frame of a page that is free."""
        scan = self.census.scan
        begin = int(scan.pfns[0])
        pfns = np.arange(begin, begin + 4096, dtype=np.uint64)
        pages = self.context.page_reader.read(pfns)
        for place in np.flatnonzero(pages.buddy).tolist():
            return int(pfns[place])
        raise NotHereError("no free page near the tables")
