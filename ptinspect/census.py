# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The census: typed pages joined with the tables that the spaces reach.

Every descriptor appears once, with what reaches it. What remains on either side is the point of it:
tables that are reached but not typed tell which levels this kernel types, and typed pages that
nothing reaches need another explanation, or are leaked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Program

from ptinspect.errors import PtinspectError
from ptinspect.kernel.descriptor import ptdesc_dtype
from ptinspect.kernel.paging import EntryClass, Paging, paging_of
from ptinspect.memory import BoolArray, read_blocks
from ptinspect.state.gmap import try_gmaps
from ptinspect.state.pending import Way
from ptinspect.state.stories import Holding, Stories
from ptinspect.tables.lookup import TableOwner, table_owners
from ptinspect.tables.memmap import Memmap
from ptinspect.tables.physical import physical_ranges
from ptinspect.tables.scan import MemmapScan, compound_orders, descriptor_indices, scan_memmap
from ptinspect.tables.scan import Progress as ScanProgress
from ptinspect.tables.spaces import Space, SpaceKind, SpaceList, find_spaces, mm_slab_pages
from ptinspect.tables.walk import Progress, RowState, Tables, Visitor, walk_spaces

#: Level of a descriptor that no space reaches.
UNKNOWN_LEVEL = 255


class Holder(IntEnum):
    """What accounts for a typed page."""

    #: Nothing that was looked at: an orphan, unless something is left to look at.
    UNEXPLAINED = 0
    #: The tree of at least one space.
    TREE = 1
    #: A huge page's spare table.
    DEPOSIT = 2
    #: A callback or a batch of a callback that waits for RCU.
    RCU = 3
    #: A list of tables to be freed.
    FREE_LIST = 4
    #: A cache of table fragments (powerpc), or a half that waits to be freed (s390, 6.1).
    FRAGMENT_CACHE = 5
    #: A guest address space.
    GMAP = 6
    #: A batch of tables to be freed that a kernel stack still gathers.
    GATHER = 7


#: Stories that account for tables that no tree reaches, in the order in which they are asked.
_HOLDERS: tuple[tuple[Holder, Callable[[Stories], Holding]], ...] = (
    (Holder.DEPOSIT, lambda stories: stories.deposits),
    (Holder.RCU, lambda stories: stories.pending.held(Way.RCU)),
    (Holder.GATHER, lambda stories: stories.pending.held(Way.GATHER)),
    (Holder.FREE_LIST, lambda stories: stories.pending.held(Way.KERNEL_WORK)),
    (Holder.GMAP, lambda stories: stories.guests),
    (Holder.FRAGMENT_CACHE, lambda stories: stories.parted_pages),
)


class HolderCount(NamedTuple):
    """The descriptors that one kind of holder accounts for."""

    holder: Holder
    descriptors: int
    #: Pages of memory that they describe.
    pages: int


class LevelCount(NamedTuple):
    """The tables of one level that user, kernel or guest spaces reach."""

    level: int
    kernel: bool
    typed: int
    untyped: int
    #: Whether they are a guest's.
    guest: bool = False


@dataclass(frozen=True)
class Census:
    """
    Typed pages and reached tables of one target.

    Columns by descriptor have the length and order of :attr:`scan`; columns by row those of
    :attr:`tables`.
    """

    spaces: SpaceList
    tables: Tables
    scan: MemmapScan
    #: What the descriptors say, each story read when it is first asked for.
    stories: Stories
    #: int32, by row: index of the descriptor of the page that the table is in; -1 if not typed.
    descriptor: npt.NDArray[np.int32]
    #: uint8, by descriptor: level of its tables, or :data:`UNKNOWN_LEVEL`.
    level: npt.NDArray[np.uint8]
    #: bool, by descriptor: whether it was reached at more than one level.
    level_conflict: BoolArray
    #: uint8, by descriptor: :class:`Holder`.
    holder: npt.NDArray[np.uint8]
    #: int32: rows in order of their descriptor, those without one left out.
    _rows: npt.NDArray[np.int32] = field(repr=False)
    #: int32, by descriptor and one more: where its rows begin in _rows.
    _starts: npt.NDArray[np.int32] = field(repr=False)
    #: What the holders other than the trees could not see, in sentences.
    holders_missing: tuple[str, ...] = ()

    @property
    def paging(self) -> Paging:
        """The paging of the target."""
        return self.tables.paging

    @property
    def complete(self) -> bool:
        """Whether everything could be seen: the memory map, all spaces, tables and holders."""
        walked = self.tables.complete and not self.spaces.notes
        return self.scan.complete and walked and not self.holders_missing

    def index_of_pfn(self, pfn: int) -> int | None:
        """Get the descriptor that covers a page, if it is typed."""
        index = descriptor_indices(self.scan, np.array([pfn], np.uint64))[0]
        return None if index < 0 else int(index)

    def rows_of(self, index: int) -> npt.NDArray[np.int32]:
        """Get the rows of the tables in the page of a descriptor."""
        return self._rows[self._starts[index] : self._starts[index + 1]]

    def owners_of(self, index: int) -> Iterator[TableOwner]:
        """Get every way in which the tables of a descriptor are reached."""
        addresses = np.unique(self.tables.address[self.rows_of(index)])
        for address in addresses.tolist():
            yield from table_owners(self.tables, address)

    def spaces_of(self, index: int) -> list[Space]:
        """Get the spaces that reach a descriptor, each once."""
        numbers = {owner.space for owner in self.owners_of(index)}
        return [self.tables.spaces[number] for number in sorted(numbers)]

    def reached_counts(self) -> npt.NDArray[np.int64]:
        """Get how often each descriptor is reached (its entries' number, roots included)."""
        return np.diff(self._starts).astype(np.int64)

    def first_rows(self) -> npt.NDArray[np.int64]:
        """Get, by descriptor, the first row that reaches it, or -1."""
        known = self._starts[1:] > self._starts[:-1]
        first = np.full(len(known), -1, np.int64)
        first[known] = self._rows[self._starts[:-1][known]]
        return first

    def first_spaces(self) -> npt.NDArray[np.int64]:
        """Get, by descriptor, the index of the first space that reaches it, or -1."""
        rows = self.first_rows()
        return np.where(rows < 0, -1, self.tables.space[rows].astype(np.int64))

    def entry_counts(self) -> npt.NDArray[np.uint32]:
        """
        Count the entries in the page of each descriptor by class, every table once.

        :return: uint32, shape (n, classes); zeros where nothing was reached or read.
        """
        rows = np.flatnonzero(distinct_tables(self.tables) & (self.descriptor >= 0))
        counts = np.zeros((len(self.level), len(EntryClass)), np.uint32)
        np.add.at(counts, self.descriptor[rows], self.tables.counts[rows])
        return counts

    def holder_counts(self) -> list[HolderCount]:
        """Count the descriptors by what holds them; holders of none are left out."""
        pages = np.left_shift(np.int64(1), self.scan.orders.astype(np.int64))
        counts = []
        for holder in Holder:
            held = self.holder == holder
            if held.any():
                number = int(np.count_nonzero(held))
                counts.append(HolderCount(holder, number, int(pages[held].sum())))
        return counts

    def unexplained(self) -> npt.NDArray[np.intp]:
        """Get the descriptors that nothing accounts for."""
        return np.flatnonzero(self.holder == Holder.UNEXPLAINED)

    def explain(self, pfns: npt.NDArray[np.uint64], holder: Holder) -> npt.NDArray[np.intp]:
        """
        Record what holds pages that no tree reaches.

        :param pfns: uint64; pages that are not typed are passed over.
        :return: The descriptors that this explains for the first time.
        """
        index = descriptor_indices(self.scan, pfns).astype(np.intp)
        index = np.unique(index[index >= 0])
        new: npt.NDArray[np.intp] = index[self.holder[index] == Holder.UNEXPLAINED]
        self.holder[new] = holder
        return new

    def reached_by(self, space: Space) -> npt.NDArray[np.intp]:
        """
        Get the descriptors of the tables that one space reaches.

        What lies below a table that it shares belongs to the first space that reaches it.
        """
        rows = self.tables.rows_of_space(self.tables.spaces.index(space))
        index = np.unique(self.descriptor[rows])
        return index[index >= 0].astype(np.intp)

    def untyped_rows(self) -> npt.NDArray[np.intp]:
        """Get the rows of tables that are reached, but lie in pages that are not typed."""
        return np.flatnonzero(distinct_tables(self.tables) & (self.descriptor < 0))

    def levels(self) -> list[LevelCount]:
        """
        Count reached tables by level: which levels this kernel types.

        A table that several spaces share counts for the first that reaches it.
        """
        spaces = self.tables.spaces
        kernel = np.array([space.kernel for space in spaces], np.bool_)[self.tables.space]
        guest = np.array([space.kind is SpaceKind.GMAP for space in spaces], np.bool_)
        guest = guest[self.tables.space]
        distinct = distinct_tables(self.tables)
        result = []
        for level in range(len(self.paging.levels)):
            for is_kernel, is_guest in ((False, False), (True, False), (False, True)):
                here = distinct & (self.tables.level == level)
                here &= (kernel == is_kernel) & (guest == is_guest)
                typed = int(np.count_nonzero(here & (self.descriptor >= 0)))
                total = int(np.count_nonzero(here))
                if total:
                    untyped = total - typed
                    result.append(LevelCount(level, is_kernel, typed, untyped, is_guest))
        return result

    def nbytes(self) -> int:
        """Bytes that the columns take, with those of the walk and the scan."""
        columns = (*vars(self).values(), *vars(self.scan).values())
        own = sum(column.nbytes for column in columns if isinstance(column, np.ndarray))
        return self.tables.nbytes() + own


def distinct_tables(tables: Tables) -> BoolArray:
    """Tell which rows stand for a table that is there, each table once."""
    there: BoolArray = tables.state <= RowState.UNREADABLE
    return there


def join(prog: Program, spaces: SpaceList, tables: Tables, scan: MemmapScan) -> Census:
    """Join the pages that are typed with the tables that are reached."""
    page_bytes = np.uint64(tables.paging.page_bytes)
    descriptor = descriptor_indices(scan, tables.address // page_bytes)
    # Rows that did not lead to a table (a cycle, outside memory) do not hold anything.
    descriptor[(tables.state == RowState.CYCLE) | (tables.state == RowState.OUTSIDE)] = -1
    known = np.flatnonzero(descriptor >= 0)
    # By descriptor, then by row; one sort of joined numbers is quicker than a stable argsort().
    both = descriptor[known].astype(np.int64) << 32 | known
    both.sort()
    rows = (both & 0xFFFFFFFF).astype(np.int32)
    count = len(scan.pfns)
    per_descriptor = np.bincount(descriptor[known], minlength=count)
    starts = np.zeros(count + 1, np.int32)
    np.cumsum(per_descriptor, out=starts[1:])
    level = np.full(count, UNKNOWN_LEVEL, np.uint8)
    conflict = np.zeros(count, np.bool_)
    reached = per_descriptor > 0
    if len(rows):
        begins = starts[:-1][reached]
        levels = tables.level[rows]
        level[reached] = np.minimum.reduceat(levels, begins)
        conflict[reached] = np.maximum.reduceat(levels, begins) != level[reached]
    holder = np.where(reached, np.uint8(Holder.TREE), np.uint8(Holder.UNEXPLAINED))
    stories = Stories(prog, tables, scan)
    return Census(spaces, tables, scan, stories, descriptor, level, conflict, holder, rows, starts)


def take_census(
    prog: Program,
    *,
    leaf_counts: bool = True,
    scan_progress: ScanProgress | None = None,
    walk_progress: Progress | None = None,
    visitor: Visitor | None = None,
) -> Census:
    """
    Scan the memory map, walk every space, and join the two.

    :param prog: The kernel.
    :param leaf_counts: Whether to read the tables of the lowest level and count their entries.
    :param scan_progress: Called now and then with how much of the memory map is scanned.
    :param walk_progress: Called now and then with how many tables are walked.
    :param visitor: Is shown the filled entries of each table that is read at the lowest level.
    :return: All tables and all typed pages, and what holds them.
    :raises PtinspectError: if the target's paging or memory model is not supported
    """
    # The memory map is large: it is read once, for the typed pages and for the mms.
    mm_slabs = mm_slab_pages(prog)
    scan = scan_memmap(prog, scan_progress, None if mm_slabs is None else mm_slabs.look)
    spaces = _with_guests(prog, find_spaces(prog, mm_slabs=mm_slabs))
    tables = walk_spaces(
        prog,
        paging_of(prog),
        spaces.spaces,
        leaf_counts=leaf_counts,
        memory=physical_ranges(prog),
        progress=walk_progress,
        visitor=visitor,
    )
    census = join(prog, spaces, tables, scan)
    return replace(census, holders_missing=tuple(dict.fromkeys(_ask_holders(census))))


def untyped_census(prog: Program, census: Census) -> Census:
    """
    Join the pages of reached tables that are not typed, instead of those that are.

    :return: The same spaces and tables; as descriptors those of all other pages that hold tables.
    """
    page_bytes = np.uint64(census.paging.page_bytes)
    pfns = np.unique(census.tables.address[census.untyped_rows()] // page_bytes)
    addresses, known = Memmap(prog).addresses(pfns)
    dtype = ptdesc_dtype(prog)
    blocks = read_blocks(prog, addresses[known], dtype.itemsize, physical=False)
    addresses = addresses[known][blocks.readable]
    descriptors = np.ascontiguousarray(blocks.data[blocks.readable]).view(dtype).reshape(-1)
    orders, order_known = compound_orders(prog, addresses, descriptors)
    lost = len(pfns) - len(addresses)
    scan = MemmapScan(
        pfns[known][blocks.readable],
        addresses,
        descriptors,
        orders,
        order_known,
        len(addresses),
        lost,
    )
    return join(prog, census.spaces, census.tables, scan)


def _with_guests(prog: Program, spaces: SpaceList) -> SpaceList:
    """
    Add the address spaces of guests, after those of their hosts, whose page tables they share.

    What could not be read of them is told by their story, when the holders are asked.
    """
    return replace(spaces, spaces=(*spaces.spaces, *try_gmaps(prog, spaces.spaces).spaces))


def _ask_holders(census: Census) -> Iterator[str]:
    """Record what the stories account for; yield what they could not see."""
    for holder, read in _HOLDERS:
        try:
            story = read(census.stories)
        except (FaultError, LookupError, PtinspectError) as error:
            yield f"holder {holder.name.lower()} could not be read: {error}"
            continue
        census.explain(story.held_pfns, holder)
        yield from story.missing
