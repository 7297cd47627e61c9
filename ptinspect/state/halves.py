# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
s390 as of 6.1: two PTE tables of 2 KiB in a page, kept in the upper byte of its ``_refcount``.

Bits 24 and 25 say that the lower and the upper half are allocated, bits 28 and 29 that they wait
to be freed; an allocated half does not wait. A page with one allocated half is on
``mm->context.pgtable_list``, through ``page->lru``. An mm with ``alloc_pgste`` has whole pages:
both bits are set, the page is on no list, and the upper half has the PGSTEs. The kernel's own
tables are init_mm's. Source: arch/s390/mm/pgalloc.c of 6.1. Later kernels have one table in a page,
and ``mm_context_t`` has no ``pgtable_list``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from drgn import Architecture, FaultError, Program, offsetof

from ptinspect.kernel.descriptor import ptdesc_type
from ptinspect.lists import ListBreak, walk_both_ways
from ptinspect.memory import AddressArray, BoolArray
from ptinspect.state.shared_pages import lowest_by_page, mm_numbers, read_descriptors
from ptinspect.state.told import Told
from ptinspect.tables.memmap import Memmap
from ptinspect.tables.scan import MemmapScan, descriptor_indices
from ptinspect.tables.walk import RowState, Tables

HALF_BYTES = 2048
_SHIFT = 24
#: Bits of the upper byte.
LOWER, UPPER = 0x01, 0x02
BOTH = LOWER | UPPER
PENDING_SHIFT = 4
_KNOWN = BOTH | BOTH << PENDING_SHIFT
_NO_ADDRESSES: AddressArray = np.empty(0, np.uint64)

#: What can be wrong with a page; the index into this tuple is what :attr:`Halves.problem` keeps.
HALF_PROBLEMS = (
    "",
    "a half is linked, but not allocated",
    "a half is allocated and waits to be freed at once",
    "bits that mean nothing are set",
    "the count below the bits is not 1",
    "no half is allocated or waits to be freed",
    "on a list, though not just one half is allocated",
    "on no list, though just one half is allocated",
    "on the list of another mm",
    "on a list, though its mm has whole pages (PGSTE)",
    "half allocated, though its mm has whole pages (PGSTE)",
    "halves of more than one mm",
    "on a list, but not marked as a page table",
    "a half is allocated but in no tree: on its way there, or leaked",
)
(
    _NOT_ALLOCATED,
    _BOTH_STATES,
    _UNKNOWN_BITS,
    _COUNT,
    _NOTHING,
    _LISTED,
    _NOT_LISTED,
    _FOREIGN_LIST,
    _PGSTE_LISTED,
    _PGSTE_HALF,
    _TWO_MMS,
    _UNTYPED,
    _UNLINKED,
) = range(1, len(HALF_PROBLEMS))


@dataclass(frozen=True)
class PgtableList:
    """``context.pgtable_list`` of one mm."""

    #: Index into the spaces of the walk.
    space: int
    pages: int
    #: Where it breaks, if it does, and whether pages on it were not found because of that.
    broken: ListBreak | None
    lost: bool


@dataclass(frozen=True)
class Halves:
    """Every page of page tables: columns, one row for each, in order of the page frame."""

    tables: Tables
    lists: tuple[PgtableList, ...]
    #: uint64, page frames.
    pfn: AddressArray
    #: uint8, the upper byte of ``_refcount``.
    bits: npt.NDArray[np.uint8]
    #: uint32, the rest of it.
    count: npt.NDArray[np.uint32]
    #: uint8, :data:`LOWER` and :data:`UPPER`: halves that a tree reaches, that a huge page keeps.
    linked: npt.NDArray[np.uint8]
    deposited: npt.NDArray[np.uint8]
    #: int64, index of the first space that has a half of it; of its list's, if none has; or -1.
    space: npt.NDArray[np.int64]
    #: int64, index of the space on whose list it is, or -1.
    listed: npt.NDArray[np.int64]
    #: bool, its mm has whole pages.
    pgste: BoolArray
    #: bool, whether ``_refcount`` could be read.
    readable: BoolArray
    #: uint8, index into :data:`HALF_PROBLEMS`.
    problem: npt.NDArray[np.uint8]
    missing: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pfn)

    @property
    def allocated(self) -> npt.NDArray[np.uint8]:
        """uint8, :data:`LOWER` and :data:`UPPER`: allocated halves."""
        bits: npt.NDArray[np.uint8] = self.bits & np.uint8(BOTH)
        return bits

    @property
    def pending(self) -> npt.NDArray[np.uint8]:
        """uint8, :data:`LOWER` and :data:`UPPER`: halves that wait to be freed."""
        bits: npt.NDArray[np.uint8] = self.bits >> np.uint8(PENDING_SHIFT) & np.uint8(BOTH)
        return bits

    @property
    def on_the_way(self) -> BoolArray:
        """bool, a half is allocated but in no tree: no contradiction while a table is made."""
        unlinked: BoolArray = self.problem == _UNLINKED
        return unlinked

    @property
    def unreached(self) -> BoolArray:
        """bool, of those :attr:`on_the_way`: no half of the page is in a tree or deposited."""
        unreached: BoolArray = self.on_the_way & ((self.linked | self.deposited) == 0)
        return unreached

    @property
    def contradicts(self) -> BoolArray:
        """bool, the bits, the trees and the lists cannot all be right."""
        wrong: BoolArray = (self.problem != 0) & ~self.on_the_way
        return wrong

    @property
    def held_pfns(self) -> AddressArray:
        """uint64: page frames whose halves only wait to be freed."""
        pfns: AddressArray = self.pfn[(self.allocated == 0) & (self.pending != 0)]
        return pfns

    def states(self) -> dict[int, int]:
        """Count the pages by the upper byte of their ``_refcount``."""
        values, counts = np.unique(self.bits[self.readable], return_counts=True)
        return dict(zip(values.tolist(), counts.tolist()))


def has_halves(prog: Program) -> bool:
    """Whether this kernel keeps two page tables in a page, and that in ``_refcount``."""
    assert prog.platform is not None
    if prog.platform.arch != Architecture.S390X:
        return False
    return bool(prog.type("mm_context_t").has_member("pgtable_list"))


def half_name(half: int, bits: int) -> str:
    """
    Say what one half is.

    :param half: :data:`LOWER` or :data:`UPPER`.
    :param bits: The upper byte of ``_refcount``.
    """
    allocated, pending = bits & half, bits >> PENDING_SHIFT & half
    if allocated and pending:
        return "allocated and pending"
    return "allocated" if allocated else "pending" if pending else "free"


def halves_text(refcount: int) -> str:
    """Decode ``_refcount`` of a page of page tables, in words."""
    bits = refcount >> _SHIFT & 0xFF
    text = f"{refcount & 0xFFFFFF}; lower half {half_name(LOWER, bits)}"
    return f"{text}, upper half {half_name(UPPER, bits)}"


def read_halves(
    prog: Program,
    tables: Tables,
    scan: MemmapScan,
    *,
    deposited: AddressArray = _NO_ADDRESSES,
    pending: AddressArray = _NO_ADDRESSES,
    missing: tuple[str, ...] = (),
) -> Halves | None:
    """
    Compare the bits of every page with the trees and the lists.

    :param deposited: uint64, physical addresses of spare tables of huge pages.
    :param pending: uint64, those of tables in batches that wait to be freed. The page of an mm with
        PGSTEs keeps both its bits until then (page_table_free_rcu()).
    :param missing: What could not be seen of those, in sentences.
    :return: ``None`` if this kernel has no halves.
    """
    if not has_halves(prog):
        return None
    page = np.uint64(tables.paging.page_bytes)
    there = np.flatnonzero((tables.state <= RowState.UNREADABLE) & (tables.level == 0))
    addresses = tables.address[there]
    memmap = Memmap(prog)
    lists, listed_pfns, listed_space = _read_lists(prog, tables, memmap)
    bits_of_typed = _upper_byte(scan.descriptors["__page_refcount"])
    # Segment tables are typed too, but have no such bits.
    pfns = np.unique(
        np.concatenate(
            (addresses // page, deposited // page, listed_pfns, scan.pfns[bits_of_typed != 0])
        )
    )
    # What a tree reaches but the page type does not mark is from before the page allocator.
    typed = descriptor_indices(scan, pfns) >= 0
    pfns = pfns[typed | np.isin(pfns, listed_pfns)]
    typed = descriptor_indices(scan, pfns) >= 0
    descriptors, readable = read_descriptors(prog, scan, memmap, pfns)
    refcount = descriptors["__page_refcount"].astype(np.int32)
    own = mm_numbers(tables)
    linked = _halves_of(pfns, addresses, page)
    spare = _halves_of(pfns, deposited, page)
    known = np.isin(addresses // page, pfns)
    place = np.searchsorted(pfns, (addresses // page)[known])
    space, two_mms = lowest_by_page(len(pfns), place, own[tables.space[there[known]]])
    listed = np.full(len(pfns), -1, np.int64)
    listed[np.searchsorted(pfns, listed_pfns)] = listed_space
    owner = np.where(space >= 0, space, listed)
    pgste = _pgste(prog, tables)[owner]
    bits = _upper_byte(refcount)
    count = refcount.astype(np.uint32) & np.uint32((1 << _SHIFT) - 1)
    waits = (bits == BOTH) & np.isin(pfns * page, pending)
    problem = _problems(bits, count, linked, spare, space, listed, pgste, waits)
    problem[two_mms & (problem == 0)] = _TWO_MMS
    problem[~typed & (listed >= 0)] = _UNTYPED
    problem[~readable] = 0
    return Halves(
        tables=tables,
        lists=lists,
        pfn=pfns,
        bits=bits,
        count=count,
        linked=linked,
        deposited=spare,
        space=owner,
        listed=listed,
        pgste=pgste,
        readable=readable,
        problem=problem,
        missing=(*missing, *_missing(tables, lists, readable)),
    )


def tell_halves(story: Halves | None, pfn: int) -> Iterator[Told]:
    """Say what the reference count of a page of page tables has in its upper byte."""
    rows = () if story is None else np.flatnonzero(story.pfn == pfn).tolist()
    for row in rows:
        assert story is not None
        text = halves_text(int(story.bits[row]) << _SHIFT | int(story.count[row]))
        if story.pgste[row]:
            text += " (it has the PGSTEs)"
        if story.listed[row] >= 0:
            text += f"; on pgtable_list of {story.tables.spaces[int(story.listed[row])].name}"
        problem = HALF_PROBLEMS[int(story.problem[row])]
        yield Told(f"{text}; {problem}" if problem else text, "__page_refcount")


def _problems(
    bits: npt.NDArray[np.uint8],
    count: npt.NDArray[np.uint32],
    linked: npt.NDArray[np.uint8],
    deposited: npt.NDArray[np.uint8],
    space: npt.NDArray[np.int64],
    listed: npt.NDArray[np.int64],
    pgste: BoolArray,
    waits: BoolArray,
) -> npt.NDArray[np.uint8]:
    """The first thing that is wrong with each page."""
    allocated = bits & np.uint8(BOTH)
    pending = bits >> np.uint8(PENDING_SHIFT) & np.uint8(BOTH)
    kept = linked | deposited
    # The upper half of a page with PGSTEs is no table.
    kept = np.where(pgste & (kept == LOWER), np.uint8(BOTH), kept)
    one = (allocated == LOWER) | (allocated == UPPER)
    # A new page is put on its list only when it has been filled (page_table_alloc()).
    new = (bits == LOWER) & (kept == 0)
    result = np.zeros(len(bits), np.uint8)
    for wrong, problem in (
        (allocated & pending, _BOTH_STATES),
        (bits & np.uint8(0xFF & ~_KNOWN), _UNKNOWN_BITS),
        (count != 1, _COUNT),
        (kept & ~allocated, _NOT_ALLOCATED),
        (bits == 0, _NOTHING),
        (pgste & (listed >= 0), _PGSTE_LISTED),
        (pgste & one, _PGSTE_HALF),
        (~one & (listed >= 0), _LISTED),
        (one & (listed < 0) & ~new, _NOT_LISTED),
        ((listed >= 0) & (space >= 0) & (listed != space), _FOREIGN_LIST),
        (np.where(waits & (kept == 0), np.uint8(0), allocated & ~kept), _UNLINKED),
    ):
        result[(wrong != 0) & (result == 0)] = problem
    return result


def _upper_byte(refcount: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    native = refcount.astype(np.int32).view(np.uint32)
    upper: npt.NDArray[np.uint8] = (native >> np.uint32(_SHIFT)).astype(np.uint8)
    return upper


def _halves_of(
    pfns: AddressArray, addresses: AddressArray, page: np.uint64
) -> npt.NDArray[np.uint8]:
    """By page: which halves the addresses of tables lie in."""
    result = np.zeros(len(pfns), np.uint8)
    frames = addresses // page
    place = np.searchsorted(pfns, frames)
    known = np.flatnonzero(np.isin(frames, pfns))
    upper = addresses[known] % page >= np.uint64(HALF_BYTES)
    np.bitwise_or.at(result, place[known], np.where(upper, np.uint8(UPPER), np.uint8(LOWER)))
    return result


def _pgste(prog: Program, tables: Tables) -> BoolArray:
    """By space, and False for none: whether its mm has whole pages."""
    flags = []
    for space in tables.spaces:
        whole = False
        if space.mm is not None and prog.type("mm_context_t").has_member("alloc_pgste"):
            try:
                whole = bool(space.mm.object(prog).context.alloc_pgste.value_())
            except FaultError:
                whole = False
        flags.append(whole)
    return np.array([*flags, False], np.bool_)


def _read_lists(
    prog: Program, tables: Tables, memmap: Memmap
) -> tuple[tuple[PgtableList, ...], AddressArray, npt.NDArray[np.int64]]:
    """Follow every mm's list: the lists, the page frames on them, and whose list each is on."""
    head = offsetof(prog.type("struct mm_struct"), "context.pgtable_list")
    node = np.uint64(offsetof(ptdesc_type(prog), "pt_list"))
    own = mm_numbers(tables)
    lists = []
    pfns: list[AddressArray] = []
    owners: list[npt.NDArray[np.int64]] = []
    for number, space in enumerate(tables.spaces):
        if space.mm is None or own[number] != number:
            continue
        walk = walk_both_ways(prog, space.mm.address + head)
        found, known = memmap.pfns(np.array(walk.nodes, np.uint64) - node)
        broken = walk.breaks[0] if walk.breaks else None
        lists.append(PgtableList(number, len(walk.nodes), broken, walk.lost))
        pfns.append(found[known])
        owners.append(np.full(int(np.count_nonzero(known)), number, np.int64))
    if not lists:
        return (), np.empty(0, np.uint64), np.empty(0, np.int64)
    return tuple(lists), np.concatenate(pfns), np.concatenate(owners)


def _missing(tables: Tables, lists: tuple[PgtableList, ...], readable: BoolArray) -> Iterator[str]:
    for mm_list in lists:
        if mm_list.lost:
            name = tables.spaces[mm_list.space].name
            yield f"pgtable_list of {name} breaks, {mm_list.pages} pages seen: {mm_list.broken}"
    unread = int(np.count_nonzero(tables.state[tables.level > 0] == RowState.UNREADABLE))
    if unread:
        yield f"halves below {unread} tables that cannot be read"
    gone = int(np.count_nonzero(~readable))
    if gone:
        yield f"{gone} descriptors cannot be read"
