# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A machine far larger than any that is at hand: its memory is made up when it is read.

Shows that time and memory for each page and each table stay the same as the machine grows. Run as
``python -m bench.generated WHAT COUNT`` it measures once and prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click
import numpy as np
from drgn import Architecture, FaultError, Platform, Program
from tabulate import tabulate

from bench.watch import in_own_process, watching_memory
from ptinspect.kernel.paging import Root
from ptinspect.kernel.paging.x86_64 import make_paging
from ptinspect.tables.physical import PhysicalRanges
from ptinspect.tables.scan import scan_memmap
from ptinspect.tables.spaces import Space, SpaceKind
from ptinspect.tables.walk import walk_spaces

# The made-up struct page is that of the unit tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))

from mock_kernel import CANONICAL_TYPE, NO_TYPE, PAGE_BYTES, MockKernel

TABLE_BYTES = 4096
ENTRIES = 512
#: Where the made-up tables begin: the leaf tables, then level by level up to the root.
BASE = 1 << 32
#: Present, writable, user, accessed, dirty: what the kernel writes into an entry for a table.
TABLE_BITS = 0x67
#: One typed page among so many.
TYPED_EVERY = 512


class _EndlessMemmap(MockKernel):
    """A kernel whose struct pages repeat, one of 512 of them typed."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        block = np.zeros((1 << 15, PAGE_BYTES // 4), np.uint32)
        block[:, 48 // 4] = NO_TYPE
        block[::TYPED_EVERY, 48 // 4] = CANONICAL_TYPE["7.3"]
        self._block = block.tobytes() * 2
        super().__init__("7.3", pages=pages, memory=False)

    def _read(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        start = offset % (len(self._block) // 2)
        if start + count > len(self._block):
            raise FaultError("more than one block at a time is not made up", address)
        return self._block[start : start + count]


def scan_generated(pages: int) -> tuple[int, float]:
    """Scan a memory map of so many pages: (pages, seconds)."""
    prog = _EndlessMemmap(pages).prog
    start = time.process_time()
    scan = scan_memmap(prog)
    seconds = time.process_time() - start
    if len(scan.pfns) != -(-pages // TYPED_EVERY):
        raise click.ClickException("the scan did not find the typed pages")
    return scan.scanned_pages, seconds


class _EndlessTables:
    """Four levels of tables over so many leaf tables, each of which maps one page."""

    def __init__(self, leaves: int) -> None:
        self.counts = [leaves]
        while self.counts[-1] > 1 or len(self.counts) < 4:
            self.counts.append(-(-self.counts[-1] // ENTRIES))
        #: Index of the first table of each level.
        self.first = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self.total = int(self.first[-1])
        leaf = np.zeros(ENTRIES, np.uint64)
        leaf[7] = 0x8000000000001067
        self._leaves = leaf.tobytes() * 256

    @property
    def root(self) -> int:
        """Physical address of the root table."""
        return BASE + (self.total - 1) * TABLE_BYTES

    def read(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        """Make up what lies at a physical address."""
        first, last = offset // TABLE_BYTES, (offset + count - 1) // TABLE_BYTES
        if last < self.counts[0]:
            start = offset % TABLE_BYTES
            return self._leaves[start : start + count]
        tables = b"".join(self._table(number) for number in range(first, last + 1))
        start = offset - first * TABLE_BYTES
        return bytes(tables[start : start + count])

    def _table(self, number: int) -> bytes:
        if number < self.counts[0]:
            return self._leaves[:TABLE_BYTES]
        level = int(np.searchsorted(self.first, number, side="right")) - 1
        children = (number - int(self.first[level])) * ENTRIES + np.arange(ENTRIES)
        child = self.first[level - 1] + children
        entries = (BASE + child * TABLE_BYTES).astype(np.uint64) | np.uint64(TABLE_BITS)
        entries[children >= self.counts[level - 1]] = 0
        return bytes(entries.tobytes())


def walk_generated(leaves: int) -> tuple[int, float]:
    """Walk a space with so many leaf tables and count their entries: (tables, seconds)."""
    tables = _EndlessTables(leaves)
    prog = Program(Platform(Architecture.X86_64))
    size = tables.total * TABLE_BYTES
    prog.add_memory_segment(BASE, size, tables.read, physical=True)
    space = Space(SpaceKind.USER, Root(tables.root, 3, ((0, 512),)))
    start = time.process_time()
    found = walk_spaces(
        prog,
        make_paging(five_levels=False),
        [space],
        memory=PhysicalRanges([(BASE, BASE + size)]),
    )
    seconds = time.process_time() - start
    if len(found) != tables.total:
        raise click.ClickException(f"the walk found {len(found)} of {tables.total} tables")
    return len(found), seconds


@click.command("generated")
def generated_command() -> None:
    """A made-up machine with up to 1 TiB of memory and millions of tables: does it stay flat?"""
    rows = []
    for what, counts in (
        ("scan", [1 << 24, 1 << 26, 1 << 28]),
        ("walk", [250_000, 1_000_000, 4_000_000]),
    ):
        idle = in_own_process("bench.generated", what, "1")["peak"]
        for count in counts:
            answer = in_own_process("bench.generated", what, str(count))
            peak = answer["peak"]
            rows.append(
                (
                    what,
                    f"{answer['count']:,}",
                    f"{answer['seconds']:.2f}",
                    f"{answer['seconds'] / answer['count'] * 1e9:.0f}",
                    f"{peak / 1e6:.0f}",
                    f"{max(0, peak - idle) / answer['count']:.1f}",
                )
            )
    headers = ("what", "pages or tables", "s", "ns each", "peak anon MB", "bytes each")
    click.echo(tabulate(rows, headers=headers, colalign=("left", *["right"] * 5)))


def main() -> None:
    """Measure once."""
    what, count = sys.argv[1], int(sys.argv[2])
    with watching_memory() as peak:
        done, seconds = (scan_generated if what == "scan" else walk_generated)(count)
    print(json.dumps({"count": done, "seconds": seconds, "peak": peak.bytes}))


if __name__ == "__main__":
    main()
