# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Bulk reads of the target's memory into NumPy arrays.

Every read answers for each block whether it could be read at all: a block that is not in the dump
is never confused with one that is all zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Program

#: Bytes asked for in one read. Larger reads cost memory without being faster (see docs/bench.md).
CHUNK_BYTES = 512 << 10

#: What a filtered dump leaves out and what a page table maps: no architecture has smaller pages.
SMALLEST_PAGE = 4096

ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]
AddressArray = npt.NDArray[np.uint64]


class Chunk(NamedTuple):
    """A run of consecutive bytes of the target, all of them readable or none of them."""

    address: int
    size: int
    #: ``None`` if no byte of the run can be read.
    data: bytes | None


def read_range(
    prog: Program,
    address: int,
    size: int,
    *,
    physical: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Chunk]:
    """
    Read a range in large chunks, in order, without losing what lies beside a hole.

    Chunks end at multiples of *chunk_bytes*, so that only the first and the last are short. A chunk
    that faults is split until the pages that cannot be read stand alone.

    :param size: Length in bytes.
    :raises Exception: whatever drgn raises apart from FaultError (a target that vanished)
    """
    end = address + size
    while address < end:
        stop = min(end, (address // chunk_bytes + 1) * chunk_bytes)
        yield from _read_splitting(prog, address, stop, physical)
        address = stop


def _read_splitting(prog: Program, start: int, end: int, physical: bool) -> Iterator[Chunk]:
    try:
        data = prog.read(start, end - start, physical)
    except FaultError:
        middle = _split_point(start, end)
        if middle is None:
            yield Chunk(start, end - start, None)
            return
        yield from _read_splitting(prog, start, middle, physical)
        yield from _read_splitting(prog, middle, end, physical)
    else:
        yield Chunk(start, end - start, data)


def _split_point(start: int, end: int) -> int | None:
    """The page boundary nearest to the middle of a range, or None if it lies within one page."""
    middle = (start + end) // 2 // SMALLEST_PAGE * SMALLEST_PAGE
    if middle <= start:
        middle += SMALLEST_PAGE
    return middle if middle < end else None


class Blocks(NamedTuple):
    """Equally sized blocks of memory, in the order in which they were asked for."""

    #: uint8, shape (n, size); rows that could not be read are zero.
    data: ByteArray
    #: bool, shape (n,); False where the block is not in the dump or went away.
    readable: BoolArray


def read_blocks(
    prog: Program,
    addresses: AddressArray,
    size: int,
    *,
    physical: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
) -> Blocks:
    """
    Read equally sized blocks, adjacent ones together.

    :param addresses: uint64, shape (n,), in any order, repeats allowed.
    :param size: Bytes in a block.
    """
    count = len(addresses)
    data = np.zeros((count, size), np.uint8)
    readable = np.zeros(count, np.bool_)
    if not count:
        return Blocks(data, readable)
    order = np.argsort(addresses, kind="stable")
    ordered = addresses[order].astype(np.uint64, copy=False)
    # A run is a set of consecutive blocks without a gap, cut so that it fits one read.
    breaks = np.flatnonzero(np.diff(ordered) != size) + 1
    per_read = max(1, chunk_bytes // size)
    starts: list[int] = []
    for first, last in zip(np.r_[0, breaks].tolist(), np.r_[breaks, count].tolist()):
        starts.extend(range(first, last, per_read))
    starts.append(count)
    for first, last in zip(starts[:-1], starts[1:]):
        _read_run(prog, int(ordered[first]), size, physical, order[first:last], data, readable)
    return Blocks(data, readable)


def _read_run(
    prog: Program,
    address: int,
    size: int,
    physical: bool,
    rows: npt.NDArray[np.intp],
    data: ByteArray,
    readable: BoolArray,
) -> None:
    try:
        raw = prog.read(address, size * len(rows), physical)
    except FaultError:
        if len(rows) == 1:
            return
        half = len(rows) // 2
        _read_run(prog, address, size, physical, rows[:half], data, readable)
        _read_run(prog, address + half * size, size, physical, rows[half:], data, readable)
        return
    data[rows] = np.frombuffer(raw, np.uint8).reshape(len(rows), size)
    readable[rows] = True


class BlockBatch(NamedTuple):
    """Some consecutive ones of the blocks that were asked for."""

    #: Index of the first block in the array of addresses.
    first: int
    #: uint8, shape (n, size), read-only. Unreadable rows are zero.
    data: ByteArray
    #: bool, shape (n,), False where the block is not in the dump or went away; ``None`` if all
    #: could be read.
    readable: BoolArray | None


def iter_blocks(
    prog: Program,
    addresses: AddressArray,
    size: int,
    *,
    physical: bool = True,
    batch_bytes: int = CHUNK_BYTES,
) -> Iterator[BlockBatch]:
    """
    Read equally sized blocks in batches, so that memory does not grow with their number.

    Blocks smaller than a page are read with the whole page around them: neighbours are then read
    together although there are gaps between them.

    :param addresses: uint64, shape (n,), ascending and without repeats; multiples of *size*.
    :param size: Bytes in a block; a divisor or a multiple of 4096.
    """
    if size < SMALLEST_PAGE:
        yield from _iter_fractions(prog, addresses, size, physical, batch_bytes)
        return
    count = len(addresses)
    if not count:
        return
    per_batch = max(1, batch_bytes // size)
    new_run = np.ones(count + 1, np.bool_)
    new_run[1:-1] = np.diff(addresses) != size
    firsts = _batch_starts(np.flatnonzero(new_run), per_batch)
    # A read ends where the next block is not adjacent, and at the end of a batch.
    new_run[firsts] = True
    bounds = np.flatnonzero(new_run)
    starts = addresses[bounds[:-1]].tolist()
    sizes = (np.diff(bounds) * size).tolist()
    runs = np.searchsorted(bounds, [*firsts, count]).tolist()
    read = prog.read
    for first, end, run, next_run in zip(firsts, [*firsts[1:], count], runs[:-1], runs[1:]):
        try:
            if next_run - run == 1:
                raw = read(starts[run], sizes[run], physical)
            else:
                raw = b"".join(
                    [
                        read(address, length, physical)
                        for address, length in zip(starts[run:next_run], sizes[run:next_run])
                    ]
                )
        except FaultError:
            yield BlockBatch(first, *_read_one_by_one(prog, addresses[first:end], size, physical))
            continue
        yield BlockBatch(first, np.ndarray((end - first, size), np.uint8, raw), None)
        # Freed before the next read, which then gets the same memory, still in the cache.
        del raw


def _batch_starts(bounds: npt.NDArray[np.intp], per_batch: int) -> list[int]:
    """
    Decide where batches begin: a long run of blocks is cut from its own begin.

    So that most batches are one read, and their parts need not be put together.

    :param bounds: Where runs of adjacent blocks begin, and behind them their number.
    """
    lengths = np.diff(bounds)
    long = lengths * 2 >= per_batch
    cuts = np.unique(np.concatenate((bounds[:1], bounds[:-1][long], bounds[1:][long], bounds[-1:])))
    starts: list[int] = []
    for begin, end in zip(cuts[:-1].tolist(), cuts[1:].tolist()):
        starts.extend(range(begin, end, per_batch))
    return starts


def _read_one_by_one(
    prog: Program, addresses: AddressArray, size: int, physical: bool
) -> tuple[ByteArray, BoolArray]:
    """Read the blocks of a batch in which something faults; tell which could be read."""
    data = np.zeros((len(addresses), size), np.uint8)
    readable = np.ones(len(addresses), np.bool_)
    for row, address in enumerate(addresses.tolist()):
        try:
            data[row] = np.frombuffer(prog.read(address, size, physical), np.uint8)
        except FaultError:
            readable[row] = False
    return data, readable


def _iter_fractions(
    prog: Program, addresses: AddressArray, size: int, physical: bool, batch_bytes: int
) -> Iterator[BlockBatch]:
    page_of = addresses // np.uint64(SMALLEST_PAGE)
    new_page = np.ones(len(addresses), np.bool_)
    new_page[1:] = page_of[1:] != page_of[:-1]
    firsts = np.flatnonzero(new_page)
    ends = np.append(firsts[1:], len(addresses))
    pages = page_of[firsts] * np.uint64(SMALLEST_PAGE)
    part = (addresses % np.uint64(SMALLEST_PAGE) // np.uint64(size)).astype(np.intp)
    page_row = np.cumsum(new_page) - 1
    for batch in iter_blocks(
        prog, pages, SMALLEST_PAGE, physical=physical, batch_bytes=batch_bytes
    ):
        first = int(firsts[batch.first])
        end = int(ends[batch.first + len(batch.data) - 1])
        rows = page_row[first:end] - batch.first
        data = batch.data.reshape(len(batch.data), -1, size)[rows, part[first:end]]
        readable = None if batch.readable is None else batch.readable[rows]
        yield BlockBatch(first, data, readable)


def among(few: AddressArray, many: AddressArray) -> set[int]:
    """
    Get which of some numbers are among many others, which are not sorted for it.

    :param few: uint64, shape (n,), in any order, repeats allowed.
    :param many: uint64, shape (m,), likewise.
    """
    if not len(few):
        return set()
    wanted = np.unique(few)
    place = np.minimum(np.searchsorted(wanted, many), len(wanted) - 1)
    return set(many[wanted[place] == many].tolist())
