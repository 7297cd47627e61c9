# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
powerpc: several PTE or PMD tables, called fragments, in one page, counted by its descriptor.

A page starts with the count of all its fragments, and ``mm->context.pte_frag`` (``pmd_frag``)
points to the next one to hand out. Handing one out leaves the count alone, giving one back takes
one off. So while that cache points to fragment k of a page of N, the count is the fragments in use
plus N - k; else it is the fragments in use. A page that lost the race for the cache has the count
1 and serves one table only. Sources: arch/powerpc/mm/pgtable-frag.c, book3s64/pgtable.c,
book3s64/mmu_context.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from drgn import Program, offsetof

from ptinspect.kernel.descriptor import byte_order, flags_bit, ptdesc_has_member
from ptinspect.kernel.direct_map import direct_map_offset
from ptinspect.kernel.paging.model import object_or_none
from ptinspect.memory import AddressArray, BoolArray, read_blocks
from ptinspect.state.shared_pages import lowest_by_page, mm_numbers, read_descriptors
from ptinspect.state.told import Told
from ptinspect.tables.memmap import Memmap
from ptinspect.tables.scan import MemmapScan, descriptor_indices
from ptinspect.tables.spaces import Space
from ptinspect.tables.walk import RowState, Tables

#: Level of a page in which no fragment was found.
UNKNOWN_LEVEL = 255
#: The levels whose tables are fragments, and what their variables and members are called after.
_LEVELS = ("pte", "pmd")
_NO_ADDRESSES: AddressArray = np.empty(0, np.uint64)

#: What can be wrong with a page; the index into this tuple is what :attr:`Fragments.problem` keeps.
PAGE_PROBLEMS = (
    "",
    "tables of two levels in one page",
    "fragments of more than one mm",
    "a fragment that the cache still has to hand out is in use",
    "a fragment is linked, and also deposited or waiting to be freed",
    "more than one cache points into it",
    "a boot table has a count",
    "the count is none that a page can have",
    "the count is less than the fragments in use",
    "the count is more than was found: frees that wait, or a leak",
)
(
    _TWO_LEVELS,
    _TWO_MMS,
    _BEYOND_CACHE,
    _TWICE,
    _TWO_CACHES,
    _BOOT_COUNT,
    _IMPOSSIBLE,
    _TOO_LOW,
    _TOO_HIGH,
) = range(1, len(PAGE_PROBLEMS))


class FragmentShape(NamedTuple):
    """How the pages of one level are divided."""

    #: Fragments in a page.
    number: int
    #: Bytes of one.
    size: int


@dataclass(frozen=True)
class FragmentCache:
    """A pointer to the next fragment that an mm will get."""

    #: Index into the spaces of the walk.
    space: int
    #: 0 for PTE, 1 for PMD.
    level: int
    #: Address that is kept there.
    pointer: int
    #: Page frame, and number of the fragment in it; ``None`` if the pointer is impossible.
    pfn: int | None
    fragment: int | None
    #: Why it is impossible or wrong; empty if it is right.
    problem: str
    #: It means nothing: the mm is exiting and has given back what the cache had, which leaves the
    #: pointer as it is (arch_exit_mmap()), or it is a child's copy of its parent's.
    dropped: bool = False


@dataclass(frozen=True)
class Fragments:
    """
    Every page of fragments: columns, one row for each page, in order of the page frame.

    In use are the fragments that a tree, a deposit or a pending free holds.
    """

    tables: Tables
    #: Of PTE and PMD pages.
    shapes: tuple[FragmentShape, FragmentShape]
    #: The caches that are not empty.
    caches: tuple[FragmentCache, ...]
    #: uint64, page frames.
    pfn: AddressArray
    #: int64, index of the descriptor in the scan; -1 if the page is not typed.
    descriptor: npt.NDArray[np.int64]
    #: uint8, 0 for PTE, 1 for PMD, or :data:`UNKNOWN_LEVEL`.
    level: npt.NDArray[np.uint8]
    #: int64, index of the first space that has a fragment of it, or caches it; -1 for none.
    space: npt.NDArray[np.int64]
    #: int64, fragments in a page of that level; 0 if the level is not known.
    number: npt.NDArray[np.int64]
    #: int64, fragments that a tree reaches, that wait at a huge page, that wait to be freed.
    linked: npt.NDArray[np.int64]
    deposited: npt.NDArray[np.int64]
    pending: npt.NDArray[np.int64]
    #: int64, fragments in use, each once.
    used: npt.NDArray[np.int64]
    #: int64, number of the fragment that a cache points to; -1 if none does.
    cached: npt.NDArray[np.int64]
    #: int64, ``pt_frag_refcount``.
    refcount: npt.NDArray[np.int64]
    #: bool, tables from before the page allocator, which are not counted.
    boot: BoolArray
    #: bool, whether the descriptor could be read.
    readable: BoolArray
    #: uint8, index into :data:`PAGE_PROBLEMS`.
    problem: npt.NDArray[np.uint8]
    missing: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pfn)

    @property
    def reserve(self) -> npt.NDArray[np.int64]:
        """int64, what the count has for fragments that a cache still has to hand out."""
        return np.where(self.cached >= 0, self.number - self.cached, 0)

    @property
    def expected(self) -> npt.NDArray[np.int64]:
        """int64, what the count should be."""
        return np.where(self.boot, 0, self.used + self.reserve)

    @property
    def free(self) -> npt.NDArray[np.int64]:
        """int64, fragments that are not in use: still to be handed out, or lost for this page."""
        free: npt.NDArray[np.int64] = np.maximum(self.number - self.used, 0)
        return free

    @property
    def held_pfns(self) -> AddressArray:
        """uint64: page frames that a cache keeps, whatever else does."""
        return self.pfn[self.cached >= 0]

    def arithmetic(self, row: int) -> str:
        """Say how the count comes about, in words."""
        if self.boot[row]:
            return "boot table: not counted"
        text = f"{self.used[row]} in use"
        if self.cached[row] >= 0:
            text += f" + ({self.number[row]} - {self.cached[row]}) to be handed out"
        return f"{text} = {self.expected[row]}"


def has_fragments(prog: Program) -> bool:
    """Whether this kernel keeps several tables in a page and counts them in the descriptor."""
    counted = ptdesc_has_member(prog, "pt_frag_refcount")
    return counted and object_or_none(prog, "__pte_frag_nr") is not None


def fragment_shapes(prog: Program) -> tuple[FragmentShape, FragmentShape]:
    """
    Get how PTE and PMD pages are divided: variables that the MMU's mode sets at boot.

    :raises LookupError: if this kernel has no fragments
    """
    pte, pmd = (
        FragmentShape(
            int(prog[f"__{name}_frag_nr"].value_()),
            1 << int(prog[f"__{name}_frag_size_shift"].value_()),
        )
        for name in _LEVELS
    )
    return pte, pmd


def read_fragments(
    prog: Program,
    tables: Tables,
    scan: MemmapScan,
    *,
    deposited: AddressArray = _NO_ADDRESSES,
    pending: AddressArray = _NO_ADDRESSES,
    perhaps: AddressArray = _NO_ADDRESSES,
    missing: tuple[str, ...] = (),
) -> Fragments | None:
    """
    Count the fragments of every page, and compare.

    :param deposited: uint64, physical addresses of spare tables of huge pages.
    :param pending: uint64, physical addresses of tables that wait to be freed, as far as known.
    :param perhaps: uint64, physical addresses in batches that may be done already, in part or all
        of it: they count where the page's count needs them.
    :param missing: What could not be seen of those, in sentences.
    :return: ``None`` if this kernel has no fragments.
    """
    if not has_fragments(prog):
        return None
    shapes = fragment_shapes(prog)
    shift = np.uint64(prog["PAGE_SHIFT"].value_())
    there = np.flatnonzero((tables.state <= RowState.UNREADABLE) & (tables.level <= 1))
    linked = tables.address[there]
    memmap = Memmap(prog)
    caches, unread = _read_caches(prog, tables, shapes, memmap)
    good = [cache for cache in caches if cache.pfn is not None]
    cache_pfns = np.array([cache.pfn for cache in good], np.uint64)
    pfns = np.unique(
        np.concatenate(
            (
                *(linked >> shift, deposited >> shift, pending >> shift),
                *(cache_pfns, scan.pfns),
            )
        )
    )
    problems = _Problems(len(pfns))
    place = np.searchsorted(pfns, linked >> shift)
    level, two_levels = lowest_by_page(len(pfns), place, tables.level[there].astype(np.int64))
    # All mms' spaces differ, so two spaces of one page are two mms.
    space, two_mms = lowest_by_page(len(pfns), place, mm_numbers(tables)[tables.space[there]])
    parts = (linked, deposited, pending)
    every = np.unique(np.concatenate(parts))
    used = _count(pfns, every >> shift)
    refcount, boot, readable = _descriptors(prog, scan, memmap, pfns)
    typed = descriptor_indices(scan, pfns) >= 0
    cached = np.full(len(pfns), -1, np.int64)
    cache_space = np.full(len(pfns), -1, np.int64)
    checked = []
    for cache in sorted(caches, key=lambda each: not tables.spaces[each.space].tasks):
        here = int(np.searchsorted(pfns, np.uint64(cache.pfn or 0)))
        if cache.pfn is not None:
            left = shapes[cache.level].number - (cache.fragment or 0)
            own = typed[here] and space[here] in (-1, cache.space)
            cache = _checked(
                cache,
                tables.spaces,
                int(space[here]),
                typed=bool(typed[here]),
                kept=bool(own and refcount[here] >= used[here] + left),
            )
        checked.append(cache)
        if cache.pfn is None or cache.dropped:
            continue
        if cached[here] >= 0 and not tables.spaces[cache.space].tasks:
            # Still the parent's pointer, which init_new_context() will clear.
            checked[-1] = replace(cache, dropped=True, problem="")
            continue
        if cached[here] >= 0:
            problems.flag(np.array([here]), _TWO_CACHES)
        cached[here], cache_space[here] = cache.fragment or 0, cache.space
        level[here] = cache.level if level[here] < 0 else level[here]
    # Only PTE tables are deposited.
    level[np.searchsorted(pfns, deposited >> shift)] = 0
    number = np.array([*(shape.number for shape in shapes), 0], np.int64)[level]
    size = np.array([*(shape.size for shape in shapes), 1], np.uint64)[level]
    reserve = np.where(cached >= 0, number - cached, 0)
    counted = readable & ~boot
    unsure = perhaps[np.isin(perhaps >> shift, pfns) & ~np.isin(perhaps, every)]
    most_unsure = _count(pfns, np.unique(unsure) >> shift)
    unseen = np.clip(refcount - used - reserve, 0, np.where(counted, most_unsure, 0))
    used += unseen
    waiting = _count(pfns, pending >> shift) + unseen
    problems.flag(two_levels, _TWO_LEVELS)
    problems.flag(two_mms, _TWO_MMS)
    problems.flag(_beyond_cache(pfns, shift, every, cached, size), _BEYOND_CACHE)
    problems.flag(_in_two(pfns, shift, parts), _TWICE)
    problems.flag(readable & boot & (refcount != 0), _BOOT_COUNT)
    # The last fragment is back, and the page itself waits (pte_free_defer()).
    counted &= ~((refcount == 0) & (waiting > 0))
    most = np.where(number > 0, number, max(shape.number for shape in shapes))
    problems.flag(counted & ((refcount < 1) | (refcount > most)), _IMPOSSIBLE)
    problems.flag(counted & (refcount < used + reserve), _TOO_LOW)
    problems.flag(counted & (refcount > used + reserve), _TOO_HIGH)
    # What only a pointer that means nothing any more leads to is left out.
    kept = typed | (used > 0) | (cached >= 0)
    columns = {
        "pfn": pfns,
        "descriptor": descriptor_indices(scan, pfns).astype(np.int64),
        "level": np.where(level < 0, UNKNOWN_LEVEL, level).astype(np.uint8),
        "space": np.where(space >= 0, space, cache_space),
        "number": number,
        "linked": _count(pfns, linked >> shift),
        "deposited": _count(pfns, deposited >> shift),
        "pending": waiting,
        "used": used,
        "cached": cached,
        "refcount": refcount,
        "boot": boot,
        "readable": readable,
        "problem": problems.found,
    }
    return Fragments(
        tables=tables,
        shapes=shapes,
        caches=tuple(checked),
        missing=(*missing, *unread, *_missing(tables, readable[kept])),
        **{name: column[kept] for name, column in columns.items()},
    )


def tell_fragments(story: Fragments | None, pfn: int) -> Iterator[Told]:
    """Say how the count of a page comes about."""
    rows = () if story is None else np.flatnonzero(story.pfn == pfn).tolist()
    for row in rows:
        assert story is not None
        number = int(story.number[row])
        shape = story.shapes[int(story.level[row])] if number else None
        of = f" of {number} of {shape.size} bytes" if shape is not None else ""
        text = f"{int(story.refcount[row])}: fragments{of}: {story.arithmetic(row)}"
        problem = PAGE_PROBLEMS[int(story.problem[row])]
        yield Told(f"{text}; {problem}" if problem else text, "pt_frag_refcount")


class _Problems:
    """The first problem of each page."""

    def __init__(self, count: int) -> None:
        self.found = np.zeros(count, np.uint8)

    def flag(self, where: npt.NDArray[np.intp] | BoolArray, problem: int) -> None:
        marked = np.zeros(len(self.found), np.bool_)
        marked[where] = True
        self.found[marked & (self.found == 0)] = problem


def _count(pfns: AddressArray, of: AddressArray) -> npt.NDArray[np.int64]:
    return np.bincount(np.searchsorted(pfns, of), minlength=len(pfns)).astype(np.int64)


def _in_two(pfns: AddressArray, shift: np.uint64, parts: tuple[AddressArray, ...]) -> BoolArray:
    """By page: whether a fragment is in more than one of the parts."""
    each = np.concatenate([np.unique(part) for part in parts])
    addresses, times = np.unique(each, return_counts=True)
    twice: AddressArray = addresses[times > 1]
    return _count(pfns, twice >> shift) > 0


def _beyond_cache(
    pfns: AddressArray,
    shift: np.uint64,
    used: AddressArray,
    cached: npt.NDArray[np.int64],
    size: npt.NDArray[np.uint64],
) -> BoolArray:
    """By page: whether a fragment at or behind the cache's pointer is in use."""
    place = np.searchsorted(pfns, used >> shift)
    within = used & np.uint64((1 << int(shift)) - 1)
    fragment = (within // size[place]).astype(np.int64)
    beyond = (cached[place] >= 0) & (fragment >= cached[place])
    result = np.zeros(len(pfns), np.bool_)
    result[place[beyond]] = True
    return result


def _descriptors(
    prog: Program, scan: MemmapScan, memmap: Memmap, pfns: AddressArray
) -> tuple[npt.NDArray[np.int64], BoolArray, BoolArray]:
    """By page: ``pt_frag_refcount``, whether it is a boot table, whether it could be read."""
    raw, readable = read_descriptors(prog, scan, memmap, pfns)
    reserved = np.uint64(flags_bit(prog, "PG_reserved") or 0)
    boot = (raw["pt_flags"] & reserved) != 0
    return raw["pt_frag_refcount"].astype(np.int64), boot, readable


def _read_caches(
    prog: Program,
    tables: Tables,
    shapes: tuple[FragmentShape, FragmentShape],
    memmap: Memmap,
) -> tuple[tuple[FragmentCache, ...], list[str]]:
    """Read the two cache pointers of every mm; those that are NULL are left out."""
    numbers, mms = [], []
    own = mm_numbers(tables)
    for number, space in enumerate(tables.spaces):
        if space.mm is not None and own[number] == number:
            numbers.append(number)
            mms.append(space.mm.address)
    caches: list[FragmentCache] = []
    missing = []
    type_ = prog.type("struct mm_struct")
    for level, name in enumerate(_LEVELS):
        offset = np.uint64(offsetof(type_, f"context.{name}_frag"))
        blocks = read_blocks(prog, np.array(mms, np.uint64) + offset, 8, physical=False)
        pointers = blocks.data.reshape(-1).view(f"{byte_order(prog)}u8").tolist()
        unread = int(np.count_nonzero(~blocks.readable))
        if unread:
            missing.append(f"{name}_frag of {unread} mms cannot be read")
        for number, pointer in zip(numbers, pointers):
            if pointer:
                caches.append(_cache(prog, number, level, pointer, shapes[level], memmap))
    return tuple(caches), missing


def _cache(
    prog: Program, space: int, level: int, pointer: int, shape: FragmentShape, memmap: Memmap
) -> FragmentCache:
    page = 1 << int(prog["PAGE_SHIFT"].value_())
    physical = (pointer - direct_map_offset(prog)) & ((1 << 64) - 1)
    pfn, fragment = physical // page, physical % page // shape.size
    problem = ""
    if not memmap.addresses(np.array([pfn], np.uint64))[1][0]:
        problem = "points to no memory"
    elif physical % shape.size:
        problem = "does not point to the start of a fragment"
    elif shape.number == 1 or not fragment:
        # The first fragment is given to whoever allocates the page.
        problem = "points to the first fragment of a page"
    if problem:
        return FragmentCache(space, level, pointer, None, None, problem)
    return FragmentCache(space, level, pointer, pfn, fragment, "")


def _checked(
    cache: FragmentCache, spaces: tuple[Space, ...], owner: int, *, typed: bool, kept: bool
) -> FragmentCache:
    """
    Check a cache against its page.

    :param owner: Index of the first space that has a fragment of the page, or -1.
    :param kept: Whether the page is the mm's and counts what the cache has.
    """
    space = spaces[cache.space]
    if space.mm is not None and not space.mm.users and not kept:
        return replace(cache, dropped=True)
    if owner not in (-1, cache.space):
        return replace(cache, problem=f"points into a page of {spaces[owner].name}")
    # PTE tables of the kernel are not typed everywhere: only since 7.x.
    if not typed and not space.kernel:
        return replace(cache, problem="points into a page that is no page table")
    return cache


def _missing(tables: Tables, readable: BoolArray) -> Iterator[str]:
    unread = int(np.count_nonzero(tables.state[tables.level > 0] == RowState.UNREADABLE))
    if unread:
        yield f"fragments below {unread} tables that cannot be read"
    gone = int(np.count_nonzero(~readable))
    if gone:
        yield f"{gone} descriptors of fragment pages cannot be read"
