# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Corruption of a kernel's memory, for as long as a ``with`` block lasts.

A running guest is written to. Over a dump bytes are laid: a memory segment of drgn cannot be taken
away again, so each one stays and answers from :class:`Overlay`, which gives the dump's own bytes
where nothing is laid over them.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from drgn import Object, PlatformFlags, Program, sizeof
from drgn.helpers.linux.mm import follow_phys

from ptinspect.kernel.paging import paging_of
from ptinspect.tables.lookup import walk_address

#: Bytes that are translated at once, and that one segment covers. Small enough that reads beside a
#: corruption stay as they are.
_BLOCK = 4096


class Mendable(ABC):
    """The memory of one opened target, to be damaged and mended again."""

    def __init__(self, prog: Program) -> None:
        self.prog = prog

    @abstractmethod
    def _store(self, physical: int, data: bytes) -> None:
        """Change memory within one block."""

    def _translate(self, base: int) -> int:
        """Get the physical address of a virtual block."""
        init_mm = self.prog["init_mm"].address_of_()
        try:
            return int(follow_phys(init_mm, base).value_())
        except NotImplementedError:
            # drgn 0.3 does not walk the page tables of riscv64.
            paging = paging_of(self.prog)
            root = paging.kernel_root(self.prog)
            found = walk_address(self.prog, paging, root, base, kernel=True).physical
            assert found is not None, f"{base:#x} is not mapped"
            return found

    @contextmanager
    def bytes_at(self, address: int, data: bytes, *, physical: bool = False) -> Iterator[None]:
        """
        Put bytes into memory, at a virtual address unless *physical*, and the old ones back.

        In a dump, a physical address below a virtual one that was never laid over is seen by
        readers of physical memory and of whatever the target translates there itself.
        """
        pieces = list(self._pieces(address, data, physical))
        before = [(where, self.prog.read(where, len(part), True)) for where, part in pieces]
        try:
            for where, part in pieces:
                self._store(where, part)
            yield
        finally:
            for where, old in before:
                self._store(where, old)

    @contextmanager
    def word_at(self, address: int, value: int, *, physical: bool = False) -> Iterator[None]:
        """Put one ``unsigned long`` in the target's byte order into memory."""
        data = struct.pack(f"{self._order()}Q", value & (1 << 64) - 1)
        with self.bytes_at(address, data, physical=physical):
            yield

    @contextmanager
    def value_of(self, obj: Object, value: object) -> Iterator[None]:
        """Give a reference object another value: a number, a pointer, a structure."""
        assert obj.address_ is not None, "only what lies in memory can be damaged"
        data = Object(self.prog, obj.type_, value).to_bytes_()
        assert len(data) == sizeof(obj)
        with self.bytes_at(obj.address_, data):
            yield

    def _order(self) -> str:
        platform = self.prog.platform
        assert platform is not None
        return "<" if platform.flags & PlatformFlags.IS_LITTLE_ENDIAN else ">"

    def _pieces(self, address: int, data: bytes, physical: bool) -> Iterator[tuple[int, bytes]]:
        """Split bytes by blocks: the physical address of each part."""
        done = 0
        while done < len(data):
            here = address + done
            base = here // _BLOCK * _BLOCK
            length = min(len(data) - done, base + _BLOCK - here)
            start = base if physical else self._translate(base)
            yield start + here - base, data[done : done + length]
            done += length


class Overlay(Mendable):
    """A dump, over which bytes are laid."""

    def __init__(self, prog: Program) -> None:
        super().__init__(prog)
        #: By physical address of the block.
        self._current: dict[int, bytearray] = {}
        #: Virtual blocks that have a segment of their own already.
        self._mapped: set[int] = set()

    def _store(self, physical: int, data: bytes) -> None:
        base = physical // _BLOCK * _BLOCK
        self._block(base)[physical - base : physical - base + len(data)] = data

    def _translate(self, base: int) -> int:
        found = super()._translate(base)
        self._block(found)
        if base not in self._mapped:
            self._mapped.add(base)
            self.prog.add_memory_segment(base, _BLOCK, self._reader(found), False)
        return found

    def _block(self, base: int) -> bytearray:
        if base not in self._current:
            self._current[base] = bytearray(self.prog.read(base, _BLOCK, True))
            self.prog.add_memory_segment(base, _BLOCK, self._reader(base), True)
        return self._current[base]

    def _reader(self, base: int):  # type: ignore[no-untyped-def]
        def read(address: int, count: int, offset: int, physical: bool) -> bytes:
            return bytes(self._current[base][offset : offset + count])

        return read
