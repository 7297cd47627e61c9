# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
One measurement in a process of its own, so that its memory is its own too.

Run as ``python -m bench.probe WHAT OPTIONS-AS-JSON``; prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from drgn import Program, sizeof
from drgn.helpers.linux.mm import for_each_page

from ptinspect.kernel.descriptor import page_is_pgtable
from ptinspect.memory import CHUNK_BYTES
from ptinspect.tables.scan import memmap_ranges, scan_memmap
from ptinspect.target import TargetOptions, open_target

#: How many pages the naive loop is given: it would take minutes for all.
NAIVE_PAGES = 100_000


def raw_reads(prog: Program) -> int:
    """Read the whole memory map and do nothing with it: the limit of any scan."""
    size = sizeof(prog.type("struct page"))
    pages = 0
    for run in memmap_ranges(prog):
        address = run.memmap
        end = address + (run.end_pfn - run.start_pfn) * size
        while address < end:
            count = min(CHUNK_BYTES, end - address)
            prog.read(address, count)
            address += count
        pages += run.end_pfn - run.start_pfn
    return pages


def scan(prog: Program) -> int:
    """The scan of ``ptinspect list`` and ``summary``."""
    return scan_memmap(prog).scanned_pages


def naive(prog: Program) -> int:
    """What one would write in drgn's shell."""
    pages = 0
    for page in islice(for_each_page(prog), NAIVE_PAGES):
        page_is_pgtable(page)
        pages += 1
    return pages


MEASUREMENTS: dict[str, tuple[Callable[[Program], int], int]] = {
    "raw": (raw_reads, 5),
    "scan": (scan, 5),
    "naive": (naive, 1),
}


def main() -> None:
    """Measure and report: pages, and the seconds of every round."""
    what, text = sys.argv[1:]
    given: dict[str, Any] = json.loads(text)
    options = TargetOptions(
        core=Path(given["core"]) if "core" in given else None,
        qemu=given.get("qemu"),
        symbols=(Path(given["symbols"]),),
    )
    function, rounds = MEASUREMENTS[what]
    seconds = []
    with open_target(options) as target:
        for _ in range(rounds):
            start = time.perf_counter()
            pages = function(target.prog)
            seconds.append(time.perf_counter() - start)
    print(json.dumps({"pages": pages, "seconds": seconds}))


if __name__ == "__main__":
    main()
