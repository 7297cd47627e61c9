# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Corruption of a real dump: bytes laid over its memory, for as long as a ``with`` block lasts.

A memory segment of drgn cannot be taken away again, so each one stays and answers from
:class:`Overlay`, which gives the dump's own bytes where nothing is laid over them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

from drgn import Object, PlatformFlags, Program, sizeof
from drgn.helpers.linux.mm import follow_phys

#: Bytes that one segment covers. Small enough that reads beside a corruption stay as they are.
_BLOCK = 4096


class Overlay:
    """The memory of one opened target, to be damaged and mended again."""

    def __init__(self, prog: Program) -> None:
        self.prog = prog
        #: By physical address of the block: the bytes that the dump has there.
        self._original: dict[int, bytes] = {}
        self._current: dict[int, bytearray] = {}
        #: Virtual blocks that have a segment of their own already.
        self._mapped: set[int] = set()

    @contextmanager
    def bytes_at(self, address: int, data: bytes, *, physical: bool = False) -> Iterator[None]:
        """
        Lay bytes over memory, at a virtual address unless *physical*.

        A physical address below a virtual one that was never laid over is seen by readers of
        physical memory and of whatever the target translates there itself.
        """
        places = list(self._places(address, len(data), physical))
        before = [bytes(block[at : at + size]) for block, at, size, _ in places]
        for block, at, size, done in places:
            block[at : at + size] = data[done : done + size]
        try:
            yield
        finally:
            for (block, at, size, _), old in zip(places, before):
                block[at : at + size] = old

    @contextmanager
    def word_at(self, address: int, value: int, *, physical: bool = False) -> Iterator[None]:
        """Lay one ``unsigned long`` in the target's byte order over memory."""
        data = struct.pack(f"{self._order()}Q", value & (1 << 64) - 1)
        with self.bytes_at(address, data, physical=physical):
            yield

    @contextmanager
    def value_of(self, obj: Object, value: object) -> Iterator[None]:
        """Lay another value over a reference object: a number, a pointer, a structure."""
        assert obj.address_ is not None, "only what lies in memory can be damaged"
        data = Object(self.prog, obj.type_, value).to_bytes_()
        assert len(data) == sizeof(obj)
        with self.bytes_at(obj.address_, data):
            yield

    def _order(self) -> str:
        platform = self.prog.platform
        assert platform is not None
        return "<" if platform.flags & PlatformFlags.IS_LITTLE_ENDIAN else ">"

    def _places(
        self, address: int, size: int, physical: bool
    ) -> Iterator[tuple[bytearray, int, int, int]]:
        """Split a range by blocks: the block's bytes, offset there, length, offset in the range."""
        done = 0
        while done < size:
            here = address + done
            base = here // _BLOCK * _BLOCK
            length = min(size - done, base + _BLOCK - here)
            if physical:
                block = self._block(base)
            else:
                init_mm = self.prog["init_mm"].address_of_()
                found = int(follow_phys(init_mm, base).value_())
                block = self._block(found)
                self._cover_virtual(base, found)
            yield block, here - base, length, done
            done += length

    def _block(self, base: int) -> bytearray:
        if base not in self._current:
            self._original[base] = self.prog.read(base, _BLOCK, True)
            self._current[base] = bytearray(self._original[base])
            self.prog.add_memory_segment(base, _BLOCK, self._reader(base), True)
        return self._current[base]

    def _cover_virtual(self, base: int, physical: int) -> None:
        if base not in self._mapped:
            self._mapped.add(base)
            self.prog.add_memory_segment(base, _BLOCK, self._reader(physical), False)

    def _reader(self, base: int):  # type: ignore[no-untyped-def]
        def read(address: int, count: int, offset: int, physical: bool) -> bytes:
            return bytes(self._current[base][offset : offset + count])

        return read
