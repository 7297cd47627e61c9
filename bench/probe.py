# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
One measurement in a process of its own, so that its memory is its own too.

What it is a share of is measured in the same process, in turn with it, so that whatever else the
machine does meets both. Run as ``python -m bench.probe WHAT OPTIONS-AS-JSON``; prints one JSON
object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from drgn import FaultError, Object, Program, sizeof
from drgn.helpers.linux.mm import follow_phys, for_each_page

from bench.watch import watching_memory
from ptinspect.census import distinct_tables, take_census
from ptinspect.checks import run_checks
from ptinspect.kernel.descriptor import page_is_pgtable
from ptinspect.kernel.paging import paging_of
from ptinspect.memory import CHUNK_BYTES, AddressArray
from ptinspect.tables.physical import physical_ranges
from ptinspect.tables.resident import resident_pages
from ptinspect.tables.scan import READ_BYTES, memmap_ranges, scan_memmap
from ptinspect.tables.spaces import Space, find_spaces
from ptinspect.tables.usage import space_usage
from ptinspect.tables.walk import Tables, walk_spaces
from ptinspect.target import TargetOptions, open_target

#: How many pages and addresses the naive loops are given: all would take minutes.
NAIVE_PAGES = 100_000
NAIVE_ADDRESSES = 20_000

#: Something to be timed: returns how many things it did.
Work = Callable[[], int]


def read_coalesced(prog: Program, addresses: AddressArray, size: int) -> int:
    """Read blocks of physical memory, adjacent ones together, and do nothing with them."""
    breaks = np.flatnonzero(np.diff(addresses) != size) + 1
    per_read = CHUNK_BYTES // size
    first = np.r_[0, breaks].tolist()
    last = np.r_[breaks, len(addresses)].tolist()
    for start, end in zip(first, last):
        for at in range(start, end, per_read):
            prog.read(int(addresses[at]), size * min(per_read, end - at), True)
    return len(addresses)


def raw_memmap(prog: Program) -> Work:
    """Read the whole memory map and do nothing with it: the limit of any scan."""
    size = sizeof(prog.type("struct page"))

    def work() -> int:
        pages = 0
        for run in memmap_ranges(prog):
            address = run.memmap
            end = address + (run.end_pfn - run.start_pfn) * size
            while address < end:
                count = min(READ_BYTES, end - address)
                prog.read(address, count)
                address += count
            pages += run.end_pfn - run.start_pfn
        return pages

    return work


def scan(prog: Program) -> Work:
    """The scan of ``ptinspect list`` and ``summary``."""
    return lambda: scan_memmap(prog).scanned_pages


def naive_scan(prog: Program) -> Work:
    """What one would write in drgn's shell."""

    def work() -> int:
        pages = 0
        for page in islice(for_each_page(prog), NAIVE_PAGES):
            page_is_pgtable(page)
            pages += 1
        return pages

    return work


def largest_space(prog: Program) -> Space:
    """The process with the most page tables."""
    spaces = find_spaces(prog, slab=False, isolated=False).spaces
    return max(spaces, key=lambda s: s.mm.pgtables_bytes if s.mm and not s.kernel else 0)


def walk_of(prog: Program, space: Space, *, leaf_counts: bool) -> Tables:
    """Walk one space."""
    memory = physical_ranges(prog)
    return walk_spaces(prog, paging_of(prog), [space], leaf_counts=leaf_counts, memory=memory)


def raw_tables(prog: Program) -> Work:
    """Read all tables of the largest space and do nothing with them: the limit of any walk."""
    tables = walk_of(prog, largest_space(prog), leaf_counts=False)
    sizes = tables.table_bytes
    groups = [(int(s), np.unique(tables.address[sizes == s])) for s in np.unique(sizes).tolist()]
    return lambda: sum(read_coalesced(prog, addresses, size) for size, addresses in groups)


def walk(prog: Program) -> Work:
    """The largest space with the entries of its lowest level counted."""
    space = largest_space(prog)
    return lambda: len(walk_of(prog, space, leaf_counts=True))


def walk_upper(prog: Program) -> Work:
    """The largest space, its lowest tables found but not read."""
    space = largest_space(prog)
    return lambda: len(walk_of(prog, space, leaf_counts=False))


def raw_census(prog: Program) -> Work:
    """Read the memory map and all tables of all spaces: the limit of any census."""
    tables = take_census(prog, leaf_counts=False).tables
    rows = distinct_tables(tables)
    sizes = tables.table_bytes[rows]
    groups = [
        (int(s), np.unique(tables.address[rows][sizes == s])) for s in np.unique(sizes).tolist()
    ]
    memmap = raw_memmap(prog)

    def work() -> int:
        memmap()
        return sum(read_coalesced(prog, addresses, size) for size, addresses in groups)

    return work


def census(prog: Program) -> Work:
    """Every space walked with leaf counts, joined with the scan."""
    return lambda: int(np.count_nonzero(distinct_tables(take_census(prog).tables)))


def check(prog: Program) -> Work:
    """Every invariant on a census of its own: what ``ptinspect check`` does before it prints."""
    number = int(np.count_nonzero(distinct_tables(take_census(prog, leaf_counts=False).tables)))

    def work() -> int:
        run_checks(prog)
        return number

    return work


def ps(prog: Program) -> Work:
    """What ``ptinspect ps`` does before it prints."""

    def work() -> int:
        spaces = find_spaces(prog).spaces
        tables = walk_spaces(prog, paging_of(prog), spaces, memory=physical_ranges(prog))
        space_usage(tables)
        for space in spaces:
            resident_pages(prog, space)
        return len(tables)

    return work


def naive_walk(prog: Program) -> Work:
    """drgn's follow_phys(), an address at a time, one in each table of the largest space."""
    space = largest_space(prog)
    tables = walk_of(prog, space, leaf_counts=True)
    lowest = np.flatnonzero(tables.level == 0)[:NAIVE_ADDRESSES]
    addresses = tables.va[lowest].tolist()
    assert space.mm is not None
    mm = Object(prog, "struct mm_struct *", space.mm.address)

    def work() -> int:
        for address in addresses:
            # Not every table maps its first page: the way down is the same.
            with suppress(FaultError):
                follow_phys(mm, address)
        return len(addresses)

    return work


class Measurement(NamedTuple):
    """How something is measured."""

    #: Makes ready what is not to be timed.
    prepare: Callable[[Program], Work]
    #: Name of the measurement that it is a share of, if it is not such a limit itself.
    limit: str | None = None
    #: What takes long is done once.
    once: bool = False


MEASUREMENTS = {
    "raw memmap": Measurement(raw_memmap),
    "scan": Measurement(scan, "raw memmap"),
    "naive scan": Measurement(naive_scan, "raw memmap", once=True),
    "raw tables": Measurement(raw_tables),
    "walk": Measurement(walk, "raw tables"),
    "walk, no leaf tables": Measurement(walk_upper, "raw tables"),
    "follow_phys": Measurement(naive_walk, "raw tables", once=True),
    "raw census": Measurement(raw_census),
    "census": Measurement(census, "raw census"),
    "check": Measurement(check, "raw census"),
    "ps": Measurement(ps, "raw census"),
}

#: Rounds: as many as fit the seconds, but at least and at most so many.
_SECONDS = 10
_ROUNDS = (2, 15)


class Round(NamedTuple):
    """One round of a measurement."""

    number: int
    seconds: float
    #: Time that this process was running, in the kernel or not. Nothing measured waits for a disk,
    #: so without other work on the machine it is the same.
    cpu_seconds: float


def timed(work: Work) -> Round:
    """Do something once."""
    start, start_cpu = time.perf_counter(), time.process_time()
    number = work()
    return Round(number, time.perf_counter() - start, time.process_time() - start_cpu)


def main() -> None:
    """Measure and report: the rounds, those of the limit in turn with them, and the memory."""
    what, text = sys.argv[1:]
    given: dict[str, Any] = json.loads(text)
    options = TargetOptions(
        core=Path(given["core"]) if "core" in given else None,
        qemu=given.get("qemu"),
        symbols=(Path(given["symbols"]),),
    )
    measurement = MEASUREMENTS[what]
    with open_target(options) as target:
        with watching_memory() as peak:
            work = measurement.prepare(target.prog)
            work()
        limit = None
        if measurement.limit is not None:
            limit = MEASUREMENTS[measurement.limit].prepare(target.prog)
            limit()
        rounds: list[Round] = []
        limits: list[Round] = []
        end = time.perf_counter() + _SECONDS
        least, most = (1, 1) if measurement.once else _ROUNDS
        while len(rounds) < least or (len(rounds) < most and time.perf_counter() < end):
            rounds.append(timed(work))
            limits.append(rounds[-1] if limit is None else timed(limit))
    print(json.dumps({"rounds": rounds, "limits": limits, "peak": peak.bytes}))


if __name__ == "__main__":
    main()
