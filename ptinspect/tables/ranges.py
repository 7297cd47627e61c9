# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""An address space as merged ranges, with page sizes and the permissions of the whole path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from drgn import Program

from ptinspect.kernel.paging.model import EntryClass, Paging, Permission
from ptinspect.memory import AddressArray, iter_blocks
from ptinspect.tables.entries import filled_entries, raw_entries
from ptinspect.tables.physical import PhysicalRanges
from ptinspect.tables.spaces import Space
from ptinspect.tables.walk import RowState, Tables, walk_spaces

#: What a range can be.
_SHOWN = (
    EntryClass.LEAF,
    EntryClass.PROT_NONE,
    EntryClass.SWAP,
    EntryClass.MIGRATION,
    EntryClass.MARKER,
    EntryClass.SPECIAL,
    EntryClass.BAD,
)


@dataclass(frozen=True)
class AddressRange:
    """Neighbouring entries of one level that are alike."""

    #: First address, and the address behind the last; ``1 << 64`` at the end of address space.
    start: int
    end: int
    #: Index into the levels of the paging.
    level: int
    kind: EntryClass
    #: Of the whole path; for what maps memory.
    permissions: Permission
    #: Size of the mappings; larger than an entry's where contiguous entries are joined.
    page_bytes: int
    #: Names of :attr:`Paging.attributes` that are set.
    attributes: tuple[str, ...]
    #: Where the first byte lies; the rest need not follow it. ``None`` for what maps no memory.
    physical: int | None


@dataclass(frozen=True)
class UnseenRange:
    """Part of an address space whose table could not be followed."""

    start: int
    end: int
    #: Level of the table.
    level: int
    state: RowState


@dataclass(frozen=True)
class SpaceMap:
    """The ranges of one address space, in order of address."""

    space: Space
    ranges: tuple[AddressRange, ...]
    unseen: tuple[UnseenRange, ...]


class Repeated(NamedTuple):
    """A range, and how often the like of it follows at equal distances."""

    first: AddressRange
    #: 1 if it stands alone.
    times: int
    #: From one to the next, bytes; 0 if it stands alone.
    distance: int


#: What is repeated less often is not worth folding.
_FEWEST = 4


def fold_ranges(ranges: Sequence[AddressRange]) -> Iterator[Repeated]:
    """
    Take together what maps the same memory again and again at equal distances.

    x86's ESPFIX area does: 65536 aliases of one page for each CPU, 64 KiB apart
    (arch/x86/kernel/espfix_64.c).
    """
    number = 0
    while number < len(ranges):
        first, times, distance = ranges[number], 1, 0
        while number + times < len(ranges):
            before, after = ranges[number + times - 1], ranges[number + times]
            step = after.start - before.start
            if (distance and step != distance) or not _is_alias(first, after):
                break
            times, distance = times + 1, step
        if times < _FEWEST:
            times, distance = 1, 0
        yield Repeated(first, times, distance)
        number += times


def _is_alias(one: AddressRange, other: AddressRange) -> bool:
    size = one.end - one.start
    return replace(one, start=other.start, end=other.start + size) == other


class _Part(NamedTuple):
    """Ranges found in one batch of tables; arrays of the same length."""

    start: AddressArray
    entries: npt.NDArray[np.int64]
    level: npt.NDArray[np.uint8]
    kind: npt.NDArray[np.uint8]
    permissions: npt.NDArray[np.uint8]
    page_bytes: npt.NDArray[np.uint64]
    attributes: npt.NDArray[np.uint64]
    physical: AddressArray


def map_space(
    prog: Program,
    paging: Paging,
    space: Space,
    *,
    kinds: Sequence[EntryClass] = _SHOWN,
    memory: PhysicalRanges | None = None,
) -> SpaceMap:
    """
    Get an address space as ranges.

    Neighbouring entries are joined if level, class, permissions of the whole path, page size and
    attributes are the same; where they lie in physical memory does not matter.

    :param prog: The kernel.
    :param paging: What :func:`paging_of` says of it.
    :param space: One of :func:`find_spaces`.
    :param kinds: Which entries to show.
    :param memory: Where the target has memory; entries that point elsewhere are marked.
    :return: The ranges in order of their addresses, and what could not be seen.
    """
    tables = walk_spaces(prog, paging, [space], leaf_counts=False, memory=memory)
    barriers = _shared_bounds(tables)
    parts: list[_Part] = []
    states = tables.state.copy()
    for level in range(len(paging.levels)):
        parts.extend(_level_parts(prog, tables, level, kinds, barriers, states))
    joined = _join(paging, parts, barriers)
    if joined is not None and len(barriers):
        joined = _merge(_repeat_shared(tables, joined, barriers), paging, barriers[:0])
    unseen = tuple(_unseen(tables, states))
    return SpaceMap(space, tuple(_records(paging, joined)), unseen)


def _level_parts(
    prog: Program,
    tables: Tables,
    level: int,
    kinds: Sequence[EntryClass],
    barriers: AddressArray,
    states: npt.NDArray[np.uint8],
) -> Iterator[_Part]:
    """
    Read the tables of a level again, this time for their entries.

    :param states: Becomes UNREADABLE for tables that cannot be read (now).
    """
    paging = tables.paging
    space = tables.spaces[0]
    # A table that is reached twice in a space is shown at each place.
    followed = np.where(tables.first >= 0, tables.first, np.arange(len(tables)))
    readable = np.isin(tables.state, (RowState.READ, RowState.NOT_READ))
    rows = np.flatnonzero((tables.level == level) & readable[followed])
    if level:
        rows = rows[tables.counts[rows][:, list(kinds)].any(axis=1)]
    addresses, inverse = np.unique(tables.address[rows], return_inverse=True)
    by_address = np.argsort(inverse, kind="stable")
    ordered = inverse[by_address]
    for batch in iter_blocks(prog, addresses, paging.levels[level].table_bytes):
        begin = np.searchsorted(ordered, batch.first)
        end = np.searchsorted(ordered, batch.first + len(batch.data))
        here = rows[by_address[begin:end]]
        which = ordered[begin:end] - batch.first
        if batch.readable is not None:
            known = batch.readable[which]
            states[here[~known]] = RowState.UNREADABLE
            here, which = here[known], which[known]
        entries = filled_entries(paging, raw_entries(batch.data)[which], level)
        kind = entries.kind
        if space.kernel:
            kind = paging.kernel_kinds(kind, entries.value, level)
        if space.kvm_owned:
            kind = paging.kvm_kinds(kind)
        wanted = np.isin(kind, kinds)
        if level == space.root.level:
            wanted &= _own(entries.slot, space)
        row, slot = here[entries.row[wanted]], entries.slot[wanted]
        value, kind = entries.value[wanted], kind[wanted]
        va = tables.va[row] + (slot.astype(np.uint64) << np.uint64(paging.levels[level].shift))
        mapping = np.isin(kind, (EntryClass.LEAF, EntryClass.PROT_NONE))
        permissions = paging.permissions(value, level, leaf=True) & tables.permissions[row]
        mask = np.uint64(sum(attribute.mask for attribute in paging.attributes))
        span = np.uint64(paging.levels[level].entry_span)
        yield _merge(
            _Part(
                paging.canonical(va),
                np.ones(len(va), np.int64),
                np.full(len(va), level, np.uint8),
                kind,
                np.where(mapping, permissions, np.uint8(0)),
                np.where(mapping, paging.leaf_bytes(value, level), span),
                np.where(mapping, value & mask, np.uint64(0)),
                np.where(mapping, paging.leaf_targets(value, level, slot), np.uint64(0)),
            ),
            paging,
            barriers,
        )


def _own(slots: npt.NDArray[np.int64], space: Space) -> npt.NDArray[np.bool_]:
    own = np.zeros(len(slots), np.bool_)
    for begin, end in space.root.entries:
        own |= (slots >= begin) & (slots < end)
    return own


def _merge(part: _Part, paging: Paging, barriers: AddressArray) -> _Part:
    """Sort by address and join neighbours that are alike, but not across a barrier."""
    if not len(part.start):
        return part
    order = np.argsort(part.start, kind="stable")
    ordered: dict[str, Any] = {name: getattr(part, name)[order] for name in _Part._fields}
    part = _Part(**ordered)
    shifts = np.array([level.shift for level in paging.levels], np.uint64)
    span = part.entries.astype(np.uint64) << shifts[part.level]
    alike = part.start[1:] == part.start[:-1] + span[:-1]
    if len(barriers):
        alike &= ~np.isin(part.start[1:], barriers)
    for name in ("level", "kind", "permissions", "page_bytes", "attributes"):
        column = getattr(part, name)
        alike &= column[1:] == column[:-1]
    first = np.flatnonzero(np.append(True, ~alike))
    joined: dict[str, Any] = {name: getattr(part, name)[first] for name in _Part._fields}
    joined["entries"] = np.add.reduceat(part.entries, first)
    return _Part(**joined)


def _join(paging: Paging, parts: Sequence[_Part], barriers: AddressArray) -> _Part | None:
    if not parts:
        return None
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in _Part._fields
    }
    return _merge(_Part(**columns), paging, barriers)


def _shared_bounds(tables: Tables) -> AddressArray:
    """Get where tables begin and end, in address space, that are reached more than once."""
    rows = np.unique(tables.first[(tables.first >= 0) & (tables.level > 0)])
    spans = [shape.entries << shape.shift for shape in tables.paging.levels]
    # The end of the last table of the address space wraps to 0, where nothing can be joined.
    ends = [
        (int(tables.va[row]) + spans[int(tables.level[row])]) & ((1 << 64) - 1)
        for row in rows.tolist()
    ]
    return np.unique(np.concatenate((tables.va[rows], np.array(ends, np.uint64))))


def _repeat_shared(tables: Tables, part: _Part, barriers: AddressArray) -> _Part:
    """
    Show what is below a table at every place where the space has that table.

    The walk follows it at the first place only. From the lowest level up, so that what is repeated
    has its own repetitions.
    """
    paging = tables.paging
    shared = np.flatnonzero((tables.first >= 0) & (tables.level > 0))
    for row in shared[np.argsort(tables.level[shared], kind="stable")].tolist():
        shape = paging.levels[int(tables.level[row])]
        begin = tables.va[tables.first[row]]
        last = begin + np.uint64((shape.entries << shape.shift) - 1)
        first = np.searchsorted(part.start, begin)
        end = np.searchsorted(part.start, last, side="right")
        # Entries of this table itself are there already; those of lower tables are not.
        below = part.level[first:end] < tables.level[row]
        copy: dict[str, Any] = {
            name: getattr(part, name)[first:end][below] for name in _Part._fields
        }
        copy["start"] = copy["start"] - begin + tables.va[row]
        copy["permissions"] = copy["permissions"] & tables.permissions[row]
        joined = _join(paging, (part, _Part(**copy)), barriers)
        assert joined is not None
        part = joined
    return part


def _records(paging: Paging, part: _Part | None) -> Iterator[AddressRange]:
    if part is None:
        return
    for n in range(len(part.start)):
        level, kind = int(part.level[n]), EntryClass(int(part.kind[n]))
        start = int(part.start[n])
        attributes = int(part.attributes[n])
        yield AddressRange(
            start=start,
            end=start + (int(part.entries[n]) << paging.levels[level].shift),
            level=level,
            kind=kind,
            permissions=Permission(int(part.permissions[n])),
            page_bytes=int(part.page_bytes[n]),
            attributes=tuple(a.name for a in paging.attributes if attributes & a.mask),
            physical=int(part.physical[n])
            if kind in (EntryClass.LEAF, EntryClass.PROT_NONE)
            else None,
        )


def _unseen(tables: Tables, states: npt.NDArray[np.uint8]) -> Iterator[UnseenRange]:
    followed = np.where(tables.first >= 0, tables.first, np.arange(len(tables)))
    state = states[followed]
    lost = np.isin(state, (RowState.UNREADABLE, RowState.OUTSIDE, RowState.CYCLE))
    rows = np.flatnonzero(lost)
    for row in rows[np.argsort(tables.va[rows], kind="stable")].tolist():
        level = int(tables.level[row])
        shape = tables.paging.levels[level]
        start = int(tables.va[row])
        yield UnseenRange(
            start, start + (shape.entries << shape.shift), level, RowState(int(state[row]))
        )
