# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Whether what a guest address space says of itself agrees with its tree, its host and its guest.

Everything here compares records that were read before with tables that were walked before; memory
is read only for the tables that a guest made for a guest of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Program
from drgn.helpers.linux.mm import pfn_to_page

from ptinspect.kernel.descriptor import page_is_pgtable
from ptinspect.kernel.direct_map import virtual_to_physical
from ptinspect.kernel.paging import EntryClass, Root
from ptinspect.kernel.paging.model import EntryArray
from ptinspect.memory import AddressArray, BoolArray, among, read_blocks
from ptinspect.state.gmap import (
    Disagreement,
    Gmap,
    Gmaps,
    ListedTable,
    Relation,
    read_gmaps,
)
from ptinspect.state.kvm import Vm
from ptinspect.state.pgste import read_ptval
from ptinspect.state.told import Told
from ptinspect.tables.contents import read_contents
from ptinspect.tables.entries import raw_entries
from ptinspect.tables.lookup import Outcome, Translation, walk_address
from ptinspect.tables.spaces import SpaceKind
from ptinspect.tables.walk import RowState, Tables

_SEGMENT_SHIFT = 20
_SEGMENT_BYTES = 1 << _SEGMENT_SHIFT
_SEGMENT_ENTRIES = 2048
_PAGE_ENTRIES = 256

#: In the guest address of a shadow's table: no table of the guest, but its real or large memory
#: (GMAP_SHADOW_FAKE_TABLE, arch/s390/mm/gmap.c).
FAKE_TABLE = 1

#: How many disagreements are told.
MOST_DISAGREEMENTS = 10_000

#: How many pages of a shadow are compared with the tables that the guest made.
MOST_SHADOWED_PAGES = 100_000

#: Page tables that are held at a time.
_TABLES_AT_A_TIME = 2048

_ASCE_REAL_SPACE = 0x20
_ORIGIN = (1 << 64) - 1 & ~0xFFF
_LARGE = 0x400
_INVALID = 0x20
_PAGE_INVALID = 0x400


@dataclass(frozen=True)
class GmapStory:
    """All guest address spaces, and where they disagree with anything."""

    gmaps: Gmaps
    disagreements: tuple[Disagreement, ...]
    missing: tuple[str, ...]
    #: Of each user-controlled virtual CPU, by address of its gmap: its segments (address >> 20),
    #: and the segment of its machine that each of them is.
    machine_segments: dict[int, dict[int, int]]
    #: Disagreements that were gone when a running target was looked at again.
    vanished: int = 0

    def persisting(self, again: GmapStory) -> GmapStory:
        """Keep the disagreements that a second look at a running target finds, too."""
        still = set(again.disagreements)
        kept = tuple(found for found in self.disagreements if found in still)
        return replace(self, disagreements=kept, vanished=len(self.disagreements) - len(kept))

    def host_address(self, gmap: Gmap, guest: int) -> int | None:
        """Translate a guest address to one of the process; a shadow has none of its own."""
        if not gmap.ucontrol_cpu:
            return gmap.host_address(guest)
        segment = self.machine_segments.get(gmap.address, {}).get(guest >> _SEGMENT_SHIFT)
        parents = [other for other in self.gmaps.gmaps if other.address == gmap.parent]
        if segment is None or not parents:
            return None
        return parents[0].host_address(segment << _SEGMENT_SHIFT | guest % _SEGMENT_BYTES)


def read_gmap_story(prog: Program, tables: Tables, gmaps: Gmaps | None = None) -> GmapStory:
    """
    Read all guest address spaces and compare them with what was walked.

    :param tables: With the guest address spaces among the spaces.
    :param gmaps: If they were read already.
    """
    gmaps = read_gmaps(prog, tables.spaces) if gmaps is None else gmaps
    comparison = _Comparison(prog, gmaps, tables)
    found = (*gmaps.disagreements, *_bounded(comparison.disagreements(), comparison.missing))
    missing = (*gmaps.missing, *comparison.missing)
    return GmapStory(gmaps, found, missing, comparison.machine_segments)


def _bounded(disagreements: Iterator[Disagreement], missing: list[str]) -> Iterator[Disagreement]:
    """Stop where a tree is so wrong that nobody would read it all."""
    for number, found in enumerate(disagreements):
        if number == MOST_DISAGREEMENTS:
            missing.append(f"only the first {MOST_DISAGREEMENTS} disagreements are told")
            return
        yield found


def tell_gmaps(guests: Gmaps, tables: Tables, pfn: int) -> Iterator[Told]:
    """Say of what guest a descriptor is, and what guest address it bears."""
    gmaps = guests.gmaps
    for gmap in gmaps:
        for name, listed in (("crst_list", gmap.crst_list), ("pt_list", gmap.pt_list)):
            for place, table in enumerate(listed):
                if table.pfn == pfn:
                    text = f"node {place + 1} of {len(listed)} of {name} of {gmap.name}"
                    yield Told(text, "pt_list")
                    yield from _tell_address(gmap, table)
    for cached in guests.caches:
        if cached.pfn == pfn:
            yield Told(f"kept ready by KVM for {cached.owner}, in the cache at {cached.cache:#x}")
    reached = tables.address // np.uint64(tables.paging.page_bytes) == np.uint64(pfn)
    spaces = {tables.spaces[number] for number in tables.space[reached].tolist()}
    if not spaces or any(space.gmap is None for space in spaces):
        return
    # Nobody but guests: neither lock nor deposits were ever set up.
    yield Told("a guest's own table: never initialised", "pmd_huge_pte", stale=True)
    yield Told("a guest's own table: never initialised", "ptl", stale=True)
    owned = {gmap.address for gmap in gmaps if gmap.kvm_owned}
    if all(space.gmap in owned for space in spaces):
        yield Told("tables of KVM's own bear no guest address", "pt_index", stale=True)


def _tell_address(gmap: Gmap, table: ListedTable) -> Iterator[Told]:
    if table.index is None:
        return
    text = f"guest address {table.index & ~FAKE_TABLE:#x}"
    if gmap.shadow and table.index & FAKE_TABLE:
        text += " of memory that it shadows without a table"
    elif gmap.shadow:
        text += " of the table that it shadows"
    yield Told(text, table.member)


class _Comparison:
    def __init__(self, prog: Program, gmaps: Gmaps, tables: Tables) -> None:
        self.prog = prog
        self.gmaps = gmaps
        self.tables = tables
        self.missing: list[str] = []
        self.machine_segments: dict[int, dict[int, int]] = {}
        self.page = tables.paging.page_bytes
        self._numbers = {
            space.gmap: number
            for number, space in enumerate(tables.spaces)
            if space.gmap is not None
        }
        self._by_address = {gmap.address: gmap for gmap in gmaps.gmaps}

    def disagreements(self) -> Iterator[Disagreement]:
        """Compare everything."""
        for gmap in self.gmaps.gmaps:
            if gmap.space is None or gmap.address not in self._numbers:
                continue
            rows = self._rows(gmap)
            yield from self._descriptors(gmap, rows)
            if gmap.kvm_owned:
                yield from self._single(gmap, rows)
                if gmap.shadow:
                    yield from self._shadowed_pages(gmap, rows)
                elif gmap.ucontrol_cpu:
                    yield from self._ucontrol(gmap, rows)
                else:
                    yield from self._host_pages(gmap, rows)
                continue
            yield from self._asce(gmap)
            yield from self._lists(gmap, rows)
            if gmap.shadow:
                yield from self._shadowed(gmap, rows)
                yield from self._shadowed_pages(gmap, rows)
            else:
                yield from self._indices(gmap, rows)
                yield from self._segments(gmap, rows)
                yield from self._slots(gmap)
        yield from self._caches()

    def _rows(self, gmap: Gmap) -> npt.NDArray[np.intp]:
        rows = self.tables.rows_of_space(self._numbers[gmap.address])
        bad = np.isin(self.tables.state[rows], (RowState.OUTSIDE, RowState.CYCLE))
        result: npt.NDArray[np.intp] = rows[~bad]
        for row in rows[bad].tolist():
            state = RowState(int(self.tables.state[row])).name.lower()
            self.missing.append(
                f"{gmap.name}: the table at {int(self.tables.address[row]):#x} is {state}"
            )
        return result

    # The gmap by itself.

    def _asce(self, gmap: Gmap) -> Iterator[Disagreement]:
        assert gmap.space is not None
        assert gmap.table is not None
        root = gmap.space.root
        table = virtual_to_physical(self.prog, gmap.table)
        if table != root.address:
            text = f"the ASCE names the table at {root.address:#x}, but table is at {table:#x}"
            yield Disagreement(Relation.ASCE, gmap.address, root.address, text)
        bits = self.tables.paging.levels[root.level].shift + 11
        last = (1 << min(bits, 64)) - 1
        if gmap.limit != last:
            text = f"the ASCE's tables reach {last:#x}, but asce_end is {gmap.limit or 0:#x}"
            yield Disagreement(Relation.ASCE, gmap.address, last, text)

    def _descriptors(self, gmap: Gmap, rows: npt.NDArray[np.intp]) -> Iterator[Disagreement]:
        """A gmap's own tables are not typed, and nobody else has a reference."""
        own = self.tables.level[rows] > 0
        if gmap.kvm_owned or gmap.shadow:
            own |= True
        for address in np.unique(self.tables.address[rows[own]]).tolist():
            page = pfn_to_page(self.prog, address // self.page)
            try:
                typed = page_is_pgtable(page)
                references = int(page._refcount.counter.value_())
            except FaultError:
                self.missing.append(f"the struct page of the table at {address:#x}")
                continue
            if typed:
                text = "its own table is typed as a page table"
                yield Disagreement(Relation.DESCRIPTOR, gmap.address, address, text)
            if references != 1:
                text = f"its own table has {references} references instead of 1"
                yield Disagreement(Relation.DESCRIPTOR, gmap.address, address, text)

    # Lists and guest addresses.

    def _lists(self, gmap: Gmap, rows: npt.NDArray[np.intp]) -> Iterator[Disagreement]:
        levels = self.tables.level[rows]
        crst = self.tables.address[rows[levels > 0]]
        yield from self._same_set(gmap, Relation.CRST_LIST, "crst_list", crst, gmap.crst_list)
        # Only a shadow has page tables of its own.
        own = self.tables.address[rows[levels == 0]] if gmap.shadow else crst[:0]
        yield from self._same_set(gmap, Relation.PT_LIST, "pt_list", own, gmap.pt_list)

    def _same_set(
        self,
        gmap: Gmap,
        relation: Relation,
        name: str,
        tree: AddressArray,
        listed: tuple[ListedTable, ...],
    ) -> Iterator[Disagreement]:
        in_tree = set(tree.tolist())
        on_list = {table.pfn * self.page for table in listed}
        for address in sorted(in_tree - on_list):
            text = f"the tree has the table at {address:#x}, but {name} has not"
            yield Disagreement(relation, gmap.address, address, text)
        for address in sorted(on_list - in_tree):
            text = f"{name} has the table at {address:#x}, but the tree has not"
            yield Disagreement(relation, gmap.address, address, text)

    def _indices(self, gmap: Gmap, rows: npt.NDArray[np.intp]) -> Iterator[Disagreement]:
        """The descriptor of each table bears the first guest address that it translates."""
        said = {table.pfn * self.page: table.index for table in gmap.crst_list}
        for row in rows[self.tables.level[rows] > 0].tolist():
            address, place = int(self.tables.address[row]), int(self.tables.va[row])
            index = said.get(address)
            if index is not None and index != place:
                text = (
                    f"the descriptor of the table at {address:#x} has the guest address "
                    f"{index:#x}, but the tree has it at {place:#x}"
                )
                yield Disagreement(Relation.INDEX, gmap.address, address, text)

    # Segments: where host and guest meet.

    def _segments(self, gmap: Gmap, rows: npt.NDArray[np.intp]) -> Iterator[Disagreement]:
        tables = self.tables
        segment_rows = rows[tables.level[rows] == 1]
        guest_of = {int(tables.address[row]): int(tables.va[row]) for row in segment_rows.tolist()}
        used = self._used_segments(segment_rows)
        pointed: dict[int, int] = {}
        for index, pointer in gmap.host_to_guest.entries.items():
            host = index << _SEGMENT_SHIFT
            entry = virtual_to_physical(self.prog, pointer)
            table = entry & ~(_SEGMENT_ENTRIES * 8 - 1)
            if table not in guest_of or entry % 8:
                text = f"host_to_guest of {host:#x} points to {pointer:#x}, no segment entry of it"
                yield Disagreement(Relation.HOST_TO_GUEST, gmap.address, host, text)
                continue
            guest = guest_of[table] + ((entry - table) // 8 << _SEGMENT_SHIFT)
            pointed[entry] = host
            back = gmap.guest_to_host.entries.get(guest >> _SEGMENT_SHIFT)
            if back != host:
                text = f"host {host:#x} is guest {guest:#x}, but guest_to_host says " + (
                    "nothing of it" if back is None else f"{back:#x}"
                )
                yield Disagreement(Relation.HOST_TO_GUEST, gmap.address, host, text)
            if entry not in used:
                text = f"host_to_guest of {host:#x} points to the empty entry of guest {guest:#x}"
                yield Disagreement(Relation.HOST_TO_GUEST, gmap.address, host, text)
        for entry, (guest, target) in used.items():
            if entry not in pointed:
                text = f"the entry of guest segment {guest:#x} is used, but not in host_to_guest"
                yield Disagreement(Relation.HOST_TO_GUEST, gmap.address, guest, text)
            yield from self._host_table(gmap, guest, target)

    def _used_segments(
        self, segment_rows: npt.NDArray[np.intp]
    ) -> dict[int, tuple[int, int | None]]:
        """
        Get the segment entries that are not empty.

        :return: By physical address of the entry, the guest address, and the table that it points
            to (``None`` if it maps a large page).
        """
        tables, paging = self.tables, self.tables.paging
        addresses = tables.address[segment_rows]
        blocks = read_blocks(self.prog, addresses, paging.levels[1].table_bytes)
        used: dict[int, tuple[int, int | None]] = {}
        for place, row in enumerate(segment_rows.tolist()):
            if not blocks.readable[place]:
                self.missing.append(f"the segment table at {int(addresses[place]):#x}")
                continue
            raw = raw_entries(blocks.data[place : place + 1])
            slots = np.flatnonzero(raw[0] != paging.raw_constant(paging.levels[1].empty))
            values = paging.values(raw[0][slots])
            kinds = paging.classify(values, 1)
            targets = paging.table_targets(values, 1)
            for slot, kind, target in zip(slots.tolist(), kinds.tolist(), targets.tolist()):
                guest = int(tables.va[row]) + (slot << _SEGMENT_SHIFT)
                points = target if kind == EntryClass.TABLE else None
                used[int(addresses[place]) + 8 * slot] = (guest, points)
        return used

    @cached_property
    def _host_tables(self) -> dict[int, dict[int, int]]:
        """By mm: host segment to the physical address of its page table."""
        tables = self.tables
        result: dict[int, dict[int, int]] = {}
        wanted = {gmap.mm for gmap in self.gmaps.gmaps}
        for number, space in enumerate(tables.spaces):
            if space.kind is SpaceKind.USER and space.mm and space.mm.address in wanted:
                rows = tables.rows_of_space(number)
                rows = rows[tables.level[rows] == 0]
                segments = (tables.va[rows] >> np.uint64(_SEGMENT_SHIFT)).tolist()
                result[space.mm.address] = dict(zip(segments, tables.address[rows].tolist()))
        return result

    @cached_property
    def _host_roots(self) -> dict[int, Root]:
        """By mm: its root table."""
        return {
            space.mm.address: space.root
            for space in self.tables.spaces
            if space.kind is SpaceKind.USER and space.mm is not None
        }

    def _host_table(self, gmap: Gmap, guest: int, target: int | None) -> Iterator[Disagreement]:
        """A segment of the guest has the very page table that the process has there."""
        host = gmap.guest_to_host.entries.get(guest >> _SEGMENT_SHIFT)
        if host is None:
            text = f"the entry of guest segment {guest:#x} is used, but not in guest_to_host"
            yield Disagreement(Relation.GUEST_TO_HOST, gmap.address, guest, text)
            return
        mine = self._host_tables.get(gmap.mm)
        if target is None or mine is None:
            # A large page of the host has no table; a host that is gone has none either.
            return
        theirs = mine.get(host >> _SEGMENT_SHIFT)
        if theirs != target:
            text = f"guest segment {guest:#x} has the page table at {target:#x}, but the host " + (
                f"has none at {host:#x}" if theirs is None else f"has {theirs:#x} at {host:#x}"
            )
            yield Disagreement(Relation.HOST_TABLE, gmap.address, guest, text)

    def _slots(self, gmap: Gmap) -> Iterator[Disagreement]:
        """guest_to_host is what the machine's memory slots say, segment by segment."""
        if gmap.vm is None or not gmap.vm.slots or gmap.vm.missing:
            # User-controlled machines have no slots: the process maps as it likes.
            return
        expected = {
            (slot.guest + offset) >> _SEGMENT_SHIFT: slot.host + offset
            for slot in gmap.vm.slots
            for offset in range(0, slot.size, _SEGMENT_BYTES)
        }
        said = gmap.guest_to_host.entries
        for segment in sorted({*expected, *said}):
            if expected.get(segment) != said.get(segment):
                guest = segment << _SEGMENT_SHIFT
                text = (
                    f"guest segment {guest:#x}: the memory slots have {_hex(expected.get(segment))}"
                    f" there, guest_to_host has {_hex(said.get(segment))}"
                )
                yield Disagreement(Relation.SLOT, gmap.address, guest, text)

    # Shadows: tables that the guest made.

    def _shadowed(self, gmap: Gmap, rows: npt.NDArray[np.intp]) -> Iterator[Disagreement]:
        if gmap.guest_to_host.entries or gmap.host_to_guest.entries:
            text = "a shadow has no mappings of its own, but one of its trees is not empty"
            yield Disagreement(Relation.GUEST_TO_HOST, gmap.address, gmap.address, text)
        parent = self._by_address.get(gmap.parent)
        said = {table.pfn * self.page: table.index for table in (*gmap.crst_list, *gmap.pt_list)}
        for row in rows.tolist():
            address = int(self.tables.address[row])
            index = said.get(address)
            if index is None or parent is None or parent.space is None:
                continue
            if int(self.tables.parent[row]) < 0:
                expected: int | None = 0
            else:
                level, place = int(self.tables.level[row]), int(self.tables.va[row])
                expected = self._guest_table(gmap, parent, level, place)
            if expected is not None and index != expected:
                text = (
                    f"the table at {address:#x} shadows {index:#x}, but the guest's tables lead "
                    f"to {expected:#x}"
                )
                yield Disagreement(Relation.SHADOWED, gmap.address, address, text)

    def _guest_table(self, gmap: Gmap, parent: Gmap, level: int, place: int) -> int | None:
        """
        Follow the guest's own tables to the one that a shadow's table of a level shadows.

        :return: Its guest address, with :data:`FAKE_TABLE` if there is memory but no table;
            ``None`` if the guest's tables cannot be followed.
        """
        if gmap.guest_asce & _ASCE_REAL_SPACE:
            return place | FAKE_TABLE
        paging = self.tables.paging
        table = gmap.guest_asce & _ORIGIN
        for here in range(1 + (gmap.guest_asce >> 2 & 3), level, -1):
            shift = paging.levels[here].shift
            entry = self._read_guest(parent, table + 8 * (place >> shift & _SEGMENT_ENTRIES - 1))
            if entry is None or entry & _INVALID:
                return None
            if here <= 2 and entry & _LARGE and gmap.edat_level >= here:
                base = entry & ~((1 << shift) - 1)
                return base + (place & (1 << shift) - 1) | FAKE_TABLE
            table = entry & (_ORIGIN | 0x800 if here == 1 else _ORIGIN)
        return table

    def _pages(
        self, gmap: Gmap, rows: npt.NDArray[np.intp]
    ) -> Iterator[tuple[AddressArray, AddressArray]]:
        """Get guest and physical addresses of the pages of a gmap's own tables, in batches."""
        tables, paging = self.tables, self.tables.paging
        # What is reached twice is told of elsewhere; its pages are looked at once.
        own = (tables.level[rows] == 0) & (tables.state[rows] <= RowState.UNREADABLE)
        lowest = rows[own]
        for first in range(0, len(lowest), _TABLES_AT_A_TIME):
            some = lowest[first : first + _TABLES_AT_A_TIME]
            values, readable = self._entries(tables.address[some])
            for address in tables.address[some][~readable].tolist():
                self.missing.append(f"{gmap.name}: the page table at {address:#x} cannot be read")
            kinds = paging.classify(values, 0)
            if gmap.kvm_owned:
                kinds = paging.kvm_kinds(kinds)
            row, slot = np.nonzero((kinds == EntryClass.LEAF) & readable[:, None])
            physical = paging.leaf_targets(values[row, slot], 0, slot)
            guest = tables.va[some][row] + slot.astype(np.uint64) * np.uint64(self.page)
            yield guest, physical

    def _entries(self, addresses: AddressArray) -> tuple[EntryArray, BoolArray]:
        """Read page tables: uint64 entries of shape (n, 256), and whether each could be read."""
        paging = self.tables.paging
        blocks = read_blocks(self.prog, addresses, paging.levels[0].table_bytes)
        return paging.values(raw_entries(blocks.data)), blocks.readable

    def _shadowed_pages(self, gmap: Gmap, rows: npt.NDArray[np.intp]) -> Iterator[Disagreement]:
        """A page of a shadow is the page that the guest's own tables name."""
        parent = self._by_address.get(gmap.parent)
        if parent is None or parent.space is None:
            return
        pages = (zip(guest.tolist(), own.tolist()) for guest, own in self._pages(gmap, rows))
        for number, (place, mine) in enumerate(chain.from_iterable(pages)):
            if number == MOST_SHADOWED_PAGES:
                self.missing.append(f"{gmap.name}: only {number} of its pages were compared")
                return
            guest = self._guest_page(gmap, parent, place)
            found = None if guest is None else self._walk(parent, guest).physical
            if found is not None and found != mine:
                text = (
                    f"its page at {place:#x} is physical {mine:#x}, but the guest's tables name "
                    f"{guest:#x}, physical {found:#x}"
                )
                yield Disagreement(Relation.SHADOWED, gmap.address, place, text)

    def _guest_page(self, gmap: Gmap, parent: Gmap, place: int) -> int | None:
        """Follow the guest's own tables to a page; ``None`` if they cannot be followed."""
        span = self.tables.paging.levels[0].entries * self.page
        table = self._guest_table(gmap, parent, 0, place & -span)
        if table is None or table & FAKE_TABLE:
            return None if table is None else (table & ~FAKE_TABLE) + place % span
        entry = self._read_guest(parent, table + 8 * (place % span // self.page))
        return None if entry is None or entry & _PAGE_INVALID else entry & _ORIGIN

    def _host_pages(self, gmap: Gmap, rows: npt.NDArray[np.intp]) -> Iterator[Disagreement]:
        """A page of KVM's own tables is the page that the process has there."""
        if gmap.vm is None or gmap.mm not in self._host_tables:
            return
        for guest, physical in self._pages(gmap, rows):
            host, known = _host_addresses(gmap.vm, guest)
            for place in np.flatnonzero(~known).tolist():
                address, page = int(guest[place]), int(physical[place])
                text = f"guest {address:#x} has the page {page:#x}, but lies in no memory slot"
                yield Disagreement(Relation.SLOT, gmap.address, address, text)
            theirs, mapped = self._pages_of_host(gmap.mm, host)
            wrong = known & ~(mapped & (theirs == physical))
            for place in np.flatnonzero(wrong).tolist():
                address, page = int(guest[place]), int(physical[place])
                there = f"{int(theirs[place]):#x}" if mapped[place] else "none"
                text = (
                    f"guest {address:#x} is physical {page:#x}, but the process has {there} at "
                    f"{int(host[place]):#x}"
                )
                yield Disagreement(Relation.HOST_PAGE, gmap.address, address, text)

    def _pages_of_host(self, mm: int, addresses: AddressArray) -> tuple[AddressArray, BoolArray]:
        """
        Get the pages that a process has at addresses, by its page tables.

        :return: uint64 physical addresses, and bool whether there is one.
        """
        paging, tables = self.tables.paging, self._host_tables[mm]
        segments, inverse = np.unique(addresses >> np.uint64(_SEGMENT_SHIFT), return_inverse=True)
        found = np.array([tables.get(number, 0) for number in segments.tolist()], np.uint64)
        values, readable = self._entries(found)
        slot = (addresses // np.uint64(self.page)).astype(np.int64) % _PAGE_ENTRIES
        entry = values[inverse.reshape(-1), slot]
        kinds = paging.classify(entry, 0)
        mapped = np.isin(kinds, (EntryClass.LEAF, EntryClass.PROT_NONE))
        pages = paging.leaf_targets(entry, 0, slot)
        has_table = (found != 0)[inverse.reshape(-1)]
        mapped &= has_table & readable[inverse.reshape(-1)]
        # Without a page table nothing is there, or a larger page.
        for place in np.flatnonzero(~has_table).tolist():
            root, address = self._host_roots[mm], int(addresses[place])
            physical = walk_address(self.prog, paging, root, address).physical
            if physical is not None:
                pages[place], mapped[place] = physical, True
        return pages, mapped

    def _ucontrol(self, gmap: Gmap, rows: npt.NDArray[np.intp]) -> Iterator[Disagreement]:
        """
        A user-controlled virtual CPU's segments are its machine's: by table or by name.

        Where the machine has a page table, the CPU's segment has the same, and the PGSTEs of that
        table tell the machine's segment (PTVAL_VMADDR); else the entry itself is invalid and names
        it (crste_is_ucas(), arch/s390/kvm/gmap/).
        """
        tables, paging = self.tables, self.tables.paging
        segments = self.machine_segments.setdefault(gmap.address, {})
        for row in rows[tables.level[rows] == 1].tolist():
            held = read_contents(self.prog, paging, int(tables.address[row]), 1)
            if held is None:
                continue
            for slot in np.flatnonzero(held.kinds == EntryClass.MARKER).tolist():
                place = (int(tables.va[row]) >> _SEGMENT_SHIFT) + slot
                segments[place] = int(held.values[slot]) >> _SEGMENT_SHIFT
        parent = self._numbers.get(gmap.parent)
        of_machine: dict[int, int] = {}
        if parent is not None:
            theirs = tables.rows_of_space(parent)
            theirs = theirs[tables.level[theirs] == 0]
            of_machine = dict(zip(tables.va[theirs].tolist(), tables.address[theirs].tolist()))
        for row in rows[tables.level[rows] == 0].tolist():
            table, place = int(tables.address[row]), int(tables.va[row])
            segment = read_ptval(self.prog, table)
            if segment is None:
                self.missing.append(f"{gmap.name}: the PGSTEs of the table at {table:#x}")
                continue
            segments[place >> _SEGMENT_SHIFT] = segment
            machine = segment << _SEGMENT_SHIFT
            if of_machine.get(machine) != table:
                text = (
                    f"segment {place:#x} has the table at {table:#x} for {machine:#x} of its "
                    f"machine, which has {_hex(of_machine.get(machine))}"
                )
                yield Disagreement(Relation.UCONTROL, gmap.address, place, text)

    def _single(self, gmap: Gmap, rows: npt.NDArray[np.intp]) -> Iterator[Disagreement]:
        """
        KVM's tables are of one gmap each; a user-controlled virtual CPU has its machine's.

        (gmap_ucas_map_one(); GMAP_FLAG_OWNS_PAGETABLES)
        """
        tables = self.tables
        for row in rows[tables.first[rows] >= 0].tolist():
            first = tables.spaces[int(tables.space[int(tables.first[row])])].gmap
            lent = not int(tables.level[row]) and "owns_pagetables" not in gmap.flags
            if first != gmap.parent or not lent:
                address = int(tables.address[row])
                whose = "no gmap" if first is None else f"gmap:{first:#x}"
                text = f"its table at {address:#x} is reached from {whose}, too"
                yield Disagreement(Relation.SINGLE, gmap.address, address, text)

    def _caches(self) -> Iterator[Disagreement]:
        """A table that is kept ready is in no tree and in one cache."""
        seen: set[int] = set()
        kept = np.array([cached.pfn for cached in self.gmaps.caches], np.uint64)
        reached = among(kept, self.tables.address // np.uint64(self.page))
        for cached in self.gmaps.caches:
            problem = None
            if cached.pfn in seen:
                problem = "is in a cache twice"
            elif cached.pfn in reached:
                problem = "is in use"
            seen.add(cached.pfn)
            if problem is not None:
                text = (
                    f"the table in page {cached.pfn:#x}, kept ready for {cached.owner}, {problem}"
                )
                yield Disagreement(Relation.CACHE, cached.gmap, cached.pfn * self.page, text)

    def _walk(self, gmap: Gmap, address: int) -> Translation:
        assert gmap.space is not None
        root, owned = gmap.space.root, gmap.kvm_owned
        return walk_address(self.prog, self.tables.paging, root, address, kvm_owned=owned)

    def _read_guest(self, parent: Gmap, address: int) -> int | None:
        found = self._walk(parent, address)
        try:
            if found.outcome is not Outcome.UNREADABLE:
                # A page that the host has taken back is one that nothing can be said of.
                physical = found.physical
                return None if physical is None else int(self.prog.read_u64(physical, True))
        except FaultError:
            pass
        self.missing.append(f"{parent.name}: the guest's memory at {address:#x} cannot be read")
        return None


def _host_addresses(vm: Vm, guest: AddressArray) -> tuple[AddressArray, BoolArray]:
    """Translate guest addresses by the memory slots; bool, whether a slot has each."""
    host = np.zeros(len(guest), np.uint64)
    known = np.zeros(len(guest), np.bool_)
    for slot in vm.slots:
        inside = (guest >= np.uint64(slot.guest)) & (guest - np.uint64(slot.guest) < slot.size)
        host[inside] = guest[inside] - np.uint64(slot.guest) + np.uint64(slot.host)
        known |= inside
    return host, known


def _hex(value: int | None) -> str:
    return "nothing" if value is None else f"{value:#x}"
