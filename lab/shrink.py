# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A dump small enough for git: the pages that nobody needs to look at page tables left out.

Left out, by each page's struct page: free pages, anonymous and page-cache pages (what user space
maps), the kernel's text, and what is not System RAM. Everything else stays: page tables, the memory
map, slabs, stacks, per-CPU areas, all kernel data. Pages of zeroes stay too but cost nothing: they
are the part of a segment that is in memory but not in the file (p_memsz > p_filesz). So a page that
was left out is a hole, never a page of zeroes. The notes are kept as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import drgn
import numpy as np

from lab.dump import (
    PT_LOAD,
    PT_NOTE,
    ElfDump,
    Pages,
    count_typed,
    nr_page_table_pages,
    open_dump,
    read_pages,
    tails,
    typed_pages,
)
from lab.errors import LabError
from lab.run import made_whole, say

#: mm/page_alloc.c: buddy pages keep their order in page->private.
_MAX_ORDER = 20


class Shrunk(NamedTuple):
    """What became of the pages of a dump, in pages."""

    kept: int
    zero: int  #: of those kept
    left_out: dict[str, int]

    def section(self) -> list[str]:
        """Write it down for a sample's README, as lines."""
        return [
            "## Left out when shrinking",
            "",
            "Holes in the dump, in pages; a page of zeroes is never a hole.",
            "",
            "| left out | pages |",
            "|---|---|",
            *(f"| {why} | {count} |" for why, count in self.left_out.items()),
            f"| kept | {self.kept} (of them {self.zero} all zero) |",
        ]


def _buddy(program: drgn.Program, pages: Pages, kinds: np.ndarray[Any, Any]) -> Any:
    """Mark the pages of free blocks: each block's first page has the type and the order."""
    page = program.type("struct page")
    try:
        first = kinds >> 24 == int(program.constant("PGTY_buddy"))
    except LookupError:
        first = (kinds & 0xF0000080) == 0xF0000000
    orders = pages.word(drgn.offsetof(page, "private"))
    marks = np.zeros(len(kinds) + 1, dtype=np.int64)
    for pfn in np.flatnonzero(first & pages.exists):
        order = int(orders[pfn])
        if order > _MAX_ORDER:
            raise LabError(f"page frame {pfn:#x} is free with order {order}")
        marks[pfn] += 1
        marks[min(pfn + (1 << order), len(kinds))] -= 1
    return np.cumsum(marks[:-1]) > 0


def classify(
    program: drgn.Program, pages: Pages, ram: Sequence[tuple[int, int]] | None = None
) -> dict[str, Any]:
    """
    Tell which page frames to leave out, and why.

    :param ram: System RAM as physical [start, end) pairs; None means everything
    :return: a mask for each reason; reasons do not overlap
    """
    page = program.type("struct page")
    frames = len(pages.exists)
    kinds = pages.word(drgn.offsetof(page, "page_type"), 4)
    # A word that is neither a type nor "no type" is the number of mappings of a user page.
    has_type = (kinds >= 0xF0000000) & (kinds != 0xFFFFFFFF)
    try:
        slab_bit = int(program.constant("PG_slab"))
        slab = pages.word(drgn.offsetof(page, "flags")) >> np.uint64(slab_bit) & np.uint64(1) == 1
        slab &= np.bool_("PGTY_slab" not in _page_types(program))
    except LookupError:
        slab = np.zeros(frames, dtype=np.bool_)
    owner = np.maximum.accumulate(np.where(tails(program, pages), 0, np.arange(frames)))
    mapping = np.where(has_type | slab, np.uint64(0), pages.word(drgn.offsetof(page, "mapping")))
    mapping = mapping[owner]
    huge = _hugetlb(program, kinds, pages)[owner]
    reserved_bit = np.uint64(int(program.constant("PG_reserved")))
    reserved = pages.word(drgn.offsetof(page, "flags")) >> reserved_bit & np.uint64(1) == 1

    inside = np.zeros(frames, dtype=np.bool_)
    for start, end in ram if ram is not None else [(0, frames * pages.page_size)]:
        inside[start // pages.page_size : -(-end // pages.page_size)] = True
    text = np.zeros(frames, dtype=np.bool_)
    start, end = _image_range(program, "_stext", "_etext")
    text[-(-start // pages.page_size) : end // pages.page_size] = True

    reasons = {
        "not System RAM": ~inside | ~pages.exists,
        "free": _buddy(program, pages, kinds),
        "anonymous": (mapping & np.uint64(1) == 1) & ~reserved & ~huge,
        "page cache": (mapping != 0) & (mapping & np.uint64(3) == 0) & ~reserved & ~huge,
        "hugetlb": huge,
        "kernel text": text,
    }
    typed = typed_pages(program, pages)
    typed = typed | (typed[owner] & tails(program, pages))
    taken = np.zeros(frames, dtype=np.bool_)
    for reason, mask in reasons.items():
        if np.any(mask & typed):
            raise LabError(f"a page table would be left out as {reason}")
        reasons[reason] = mask & ~taken
        taken |= mask
    return reasons


def _page_types(program: drgn.Program) -> list[str]:
    try:
        enumerators = program.type("enum pagetype").enumerators
    except LookupError:
        return []
    return [enumerator.name for enumerator in enumerators or ()]


def _hugetlb(program: drgn.Program, kinds: Any, pages: Pages) -> Any:
    """Mark first pages of hugetlb pages."""
    if "PGTY_hugetlb" in _page_types(program):
        return kinds >> 24 == int(program.constant("PGTY_hugetlb"))
    # 6.1: the second page says how a compound page is freed (enum compound_dtor_id).
    try:
        destructor = int(program.constant("HUGETLB_PAGE_DTOR"))
        at = drgn.offsetof(program.type("struct page"), "compound_dtor")
    except LookupError:
        return np.zeros(len(kinds), dtype=np.bool_)
    following = np.roll(pages.raw[:, at] == destructor, -1)
    return following & np.roll(tails(program, pages), -1) & ~tails(program, pages)


def _image_range(program: drgn.Program, first: str, last: str) -> tuple[int, int]:
    """Get where a part of the kernel's image lies in physical memory; it is contiguous there."""
    from drgn.helpers.linux.mm import follow_phys

    init_mm = program["init_mm"].address_of_()
    start = program.symbol(first).address
    physical = int(follow_phys(init_mm, start))
    return physical, physical + program.symbol(last).address - start


def _runs(mask: Any) -> list[tuple[int, int]]:
    """Get the [start, end) ranges where a mask is set."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.view(np.int8), [0]))))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _user_frames(
    program: drgn.Program, frames: int, wanted: Sequence[tuple[int, int]]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mark the page frames of pages that are named by process ID and address."""
    from drgn.helpers.linux.mm import follow_phys
    from drgn.helpers.linux.pid import find_task

    marks = np.zeros(frames, dtype=np.bool_)
    for pid, address in wanted:
        physical = int(follow_phys(find_task(program, pid).mm, address))
        marks[physical // int(program["PAGE_SIZE"])] = True
    return marks


def shrink(
    full: Path,
    vmlinux: Path,
    into: Path,
    ram: Sequence[tuple[int, int]] | None = None,
    wanted: Sequence[tuple[int, int]] = (),
    unwanted: Sequence[tuple[str, str]] = (),
) -> Shrunk:
    """
    Write the small dump of a full one.

    :param wanted: Pages of processes to keep, each a process ID and an address
    :param unwanted: Data of the kernel's image to leave out, each from a symbol to another
    :raises LabError: if a page table would be lost
    """
    program = open_dump(full, vmlinux)
    pages = read_pages(program)
    reasons = classify(program, pages, ram)
    for names in unwanted:
        mask = np.zeros(len(pages.exists), dtype=np.bool_)
        lowest, highest = _image_range(program, *names)
        mask[-(-lowest // pages.page_size) : highest // pages.page_size] = True
        for other in reasons.values():
            mask &= ~other
        reasons[" to ".join(names)] = mask
    kept = _user_frames(program, len(pages.exists), wanted)
    reasons = {reason: mask & ~kept for reason, mask in reasons.items()}
    dump = ElfDump(full)
    size = pages.page_size
    frames = len(pages.exists)
    drop = np.logical_or.reduce(list(reasons.values()))
    present = np.zeros(frames, dtype=np.bool_)
    nonzero = np.zeros(frames, dtype=np.bool_)
    outside = 0
    for segment in dump.segments:
        first, count = segment.physical // size, segment.size // size
        outside += max(0, first + count - max(first, frames))
        count = max(0, min(count, frames - first))
        present[first : first + count] = True
        for at in range(first, first + count, 4096):
            step = min(4096, first + count - at)
            block = np.frombuffer(dump.read(at * size, step * size), dtype=np.uint64)
            nonzero[at : at + step] = block.reshape(step, -1).any(axis=1)
    keep = present & ~drop
    pieces: list[tuple[int, int, int]] = []  # first frame, frames in the file, frames in memory
    for start, end in _runs(keep):
        filled = _runs(nonzero[start:end])
        # Data, then the zeroes up to the next data; zeroes at the very start are their own piece.
        starts = [start + first for first, _ in filled]
        ends = [start + last for _, last in filled]
        if not starts or starts[0] > start:
            pieces.append((start, 0, (starts[0] if starts else end) - start))
        for first, last, following in zip(starts, ends, [*starts[1:], end]):
            pieces.append((first, last - first, following - first))
    _write(dump, into, pieces, size)
    dump.close()
    left_out = {why: int(np.count_nonzero(mask & present)) for why, mask in reasons.items()}
    left_out["not System RAM"] += outside
    return Shrunk(
        kept=int(np.count_nonzero(keep)),
        zero=int(np.count_nonzero(keep & ~nonzero)),
        left_out=left_out,
    )


def _write(dump: ElfDump, into: Path, pieces: Sequence[tuple[int, int, int]], size: int) -> None:
    """Write the ELF file: header, program headers, notes, data."""
    if len(pieces) + 1 >= 0xFFFF:
        raise LabError(f"{len(pieces)} segments are too many for an ELF file")
    header_size, entry_size = 64, 56
    notes_at = header_size + entry_size * (len(pieces) + 1)
    data_at = -(-(notes_at + len(dump.notes)) // 4096) * 4096
    entry = dump.order + "IIQQQQQQ"
    headers = [struct.pack(entry, PT_NOTE, 0, notes_at, 0, 0, len(dump.notes), len(dump.notes), 0)]
    at = data_at
    for first, filled, total in pieces:
        physical = first * size
        headers.append(
            struct.pack(entry, PT_LOAD, 0, at, 0, physical, filled * size, total * size, 0)
        )
        at += filled * size
    ident = dump.data[:16]
    rest = (4, dump.machine, 1, 0, header_size, 0, dump.flags, 64, 56, len(headers), 0, 0, 0)
    with made_whole(into) as unfinished, unfinished.open("wb") as stream:
        stream.write(ident + struct.pack(dump.order + "HHIQQQIHHHHHH", *rest))
        stream.write(b"".join(headers) + dump.notes)
        stream.write(bytes(data_at - stream.tell()))
        for first, filled, _ in pieces:
            stream.write(dump.read(first * size, filled * size))


def _translations(program: drgn.Program) -> dict[tuple[int, int], int | None]:
    """Translate the first, the last and some more pages of every mapping of every process."""
    from drgn.helpers.linux.mm import follow_phys, for_each_vma
    from drgn.helpers.linux.pid import for_each_task

    found: dict[tuple[int, int], int | None] = {}
    for task in for_each_task(program):
        if not task.mm:
            continue
        for vma in for_each_vma(task.mm):
            start, end = int(vma.vm_start), int(vma.vm_end)
            step = max(1, (end - start) // int(program["PAGE_SIZE"]) // 16)
            for address in range(start, end, step * int(program["PAGE_SIZE"])):
                try:
                    physical: int | None = int(follow_phys(task.mm, address))
                except drgn.FaultError as error:
                    if "not in the dump" in str(error):
                        raise LabError(f"{address:#x}: a table was left out") from error
                    physical = None
                found[int(task.pid), address] = physical
    return found


def verify(full: Path, small: Path, vmlinux: Path) -> dict[str, Any]:
    """
    Check that the small dump says the same as the full one.

    :return: what was compared, with its value
    :raises LabError: where they differ
    """
    said: list[dict[str, Any]] = []
    for path in (full, small):
        program = open_dump(path, vmlinux)
        said.append(
            {
                "typed": count_typed(program, read_pages(program)),
                "nr_page_table_pages": nr_page_table_pages(program),
                "translations": _translations(program),
            }
        )
    for name, value in said[0].items():
        if value != said[1][name]:
            raise LabError(f"{name} differs between {full.name} and {small.name}")
    translations = said[1]["translations"]
    mapped = sum(physical is not None for physical in translations.values())
    say(f"{len(translations)} translations are the same, {mapped} of them of present pages")
    return {**said[1], "translations": len(translations), "translations_mapped": mapped}
