# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The descriptors of a scan as columns that can be filtered, chosen and sorted, without a Python loop.

A member of a descriptor is a value only where the table's role gives it one: elsewhere its column
is empty. ``raw:MEMBER`` is the same bytes whatever they mean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from drgn import Architecture, Program

from ptinspect.census import UNKNOWN_LEVEL, Census, Holder
from ptinspect.errors import UsageError
from ptinspect.kernel.descriptor import canonical_member_name, flags_bit, ptdesc_has_member
from ptinspect.kernel.paging import EntryClass
from ptinspect.memory import BoolArray
from ptinspect.state.fields import (
    architecture,
    direct_map_addresses,
    ptdesc_flag_names,
    typed_levels,
)
from ptinspect.state.lists import Role
from ptinspect.state.memcg import Memcgs, read_memcgs
from ptinspect.tables.nodes import page_nodes
from ptinspect.tables.scan import MemmapScan, descriptor_indices

#: Columns that are computed, not members.
#: cgroup: path of the memory cgroup that it is charged to.
COMPUTED_COLUMNS = (
    *("pfn", "ptdesc", "phys", "address"),
    *("order", "node", "level", "flags", "cgroup"),
)

#: Columns that need a walk of all address spaces:
#: space: the first that reaches the table, reached: by how many entries and roots, va: the first
#: address that the table translates there, holder: what accounts for it,
#: used: entries in use, fill: those in percent, empty: 1 if there are none, remote: mapped pages
#: that lie on other nodes than the table, role: what the bytes of pt_list are, deposits: spare
#: tables that hang on a PMD table, deposits_needed: its huge pages that need one, lock: the state
#: of the table's own lock, fragments: powerpc's in use, fragments_expected: what their count should
#: be, halves: the upper byte of s390's reference count.
CENSUS_COLUMNS = (
    *("space", "reached", "va", "holder"),
    *("used", "fill", "empty", "remote"),
    *("role", "deposits", "deposits_needed"),
    *("lock", "fragments", "fragments_expected", "halves"),
)

#: Shown when no columns are chosen.
DEFAULT_COLUMNS = (
    *("pfn", "ptdesc", "level", "space", "va", "fill"),
    *("order", "node", "refcount", "flags"),
)
#: The same where there is no walk.
SCAN_COLUMNS = ("pfn", "ptdesc", "address", "level", "order", "node", "refcount", "flags")

#: Short names for members that people ask for often.
_SHORT_NAMES = {
    "refcount": "__page_refcount",
    "memcg": "pt_memcg_data",
    "mapping": "__page_mapping",
}

_ADDRESS_COLUMNS = frozenset({"pfn", "ptdesc", "phys", "address"})


class ColumnData(NamedTuple):
    """One column of all descriptors."""

    values: npt.NDArray[Any]
    #: bool; where False there is no value, and ``values`` means nothing.
    present: BoolArray
    #: Whether values are addresses, masks or raw words.
    is_hex: bool


class Listing:
    """
    The descriptors of one scan, column by column, each computed when it is asked for.

    :param census: Adds levels and the columns of :data:`CENSUS_COLUMNS`.
    :param mapped_nodes: uint16, shape (rows of the census, nodes): what each table maps; for the
        column ``remote``.
    """

    def __init__(
        self,
        prog: Program,
        scan: MemmapScan,
        census: Census | None = None,
        mapped_nodes: npt.NDArray[np.uint16] | None = None,
    ) -> None:
        self._prog = prog
        self._scan = scan
        self._census = census
        self._mapped_nodes = mapped_nodes
        self._cache: dict[str, ColumnData] = {}

    def __len__(self) -> int:
        return len(self._scan.pfns)

    @property
    def column_names(self) -> list[str]:
        """Every column that this kernel's descriptors have."""
        members = list(self._scan.descriptors.dtype.names or ())
        walked = CENSUS_COLUMNS if self._census is not None else ()
        raw = (f"raw:{name}" for name in members)
        return [*COMPUTED_COLUMNS, *walked, *_SHORT_NAMES, *members, *raw]

    def column(self, name: str) -> ColumnData:
        """
        Get one column.

        :raises UsageError: if there is no such column on this kernel
        """
        if name not in self._cache:
            self._cache[name] = self._compute(name)
        return self._cache[name]

    def _compute(self, name: str) -> ColumnData:
        scan = self._scan
        everywhere = np.ones(len(self), np.bool_)
        if name in COMPUTED_COLUMNS:
            if name == "cgroup":
                return self._cgroups()
            values = self._computed(name)
            if name == "level":
                return ColumnData(values, values != "", False)
            if name == "order":
                return ColumnData(values, scan.order_known, False)
            return ColumnData(values, everywhere, name in _ADDRESS_COLUMNS)
        if name in CENSUS_COLUMNS:
            if self._census is None:
                raise UsageError(f"column {name!r} needs a walk of the address spaces")
            return self._walked(self._census, name)
        is_raw = name.startswith("raw:")
        field = self._field_name(name[4:] if is_raw else name)
        values = scan.descriptors[field]
        present = everywhere if is_raw else self._meaningful(field)
        return ColumnData(values, present, values.dtype.kind == "u")

    def _computed(self, name: str) -> npt.NDArray[Any]:
        scan = self._scan
        if name == "pfn":
            return scan.pfns
        if name == "ptdesc":
            return scan.addresses
        if name == "phys":
            shifted: npt.NDArray[Any] = scan.pfns << np.uint64(self._prog["PAGE_SHIFT"].value_())
            return shifted
        if name == "address":
            return direct_map_addresses(self._prog, scan.pfns)
        if name == "order":
            return scan.orders
        if name == "node":
            return page_nodes(self._prog, scan.descriptors["pt_flags"])
        if name == "level":
            return self._levels()
        return self._flag_names()

    def _cgroups(self) -> ColumnData:
        memcgs = self.memcgs
        paths = np.array([*memcgs.paths, ""])
        return ColumnData(paths[np.maximum(memcgs.index, -1)], memcgs.index >= 0, False)

    @cached_property
    def memcgs(self) -> Memcgs:
        """
        The memory cgroups that the descriptors are charged to.

        :raises UsageError: if this kernel has none
        """
        return read_memcgs(self._prog, self._scan)

    @property
    def missing(self) -> tuple[str, ...]:
        """What the columns asked for so far could not tell, in sentences."""
        return self.memcgs.missing if "cgroup" in self._cache else ()

    def _levels(self) -> npt.NDArray[Any]:
        census = self._census
        if census is None:
            return typed_levels(self._prog, self._scan)
        names = np.full(UNKNOWN_LEVEL + 1, "", "U8")
        for number, level in enumerate(census.paging.levels):
            names[number] = level.name
        reached = names[census.level]
        reached[census.level_conflict] = "?"
        # What no space reaches may still tell its level by itself.
        alone = typed_levels(self._prog, self._scan)
        alone[census.holder == Holder.DEPOSIT] = census.paging.levels[0].name
        return np.where(census.level == UNKNOWN_LEVEL, alone, reached)

    def _walked(self, census: Census, name: str) -> ColumnData:
        everywhere = np.ones(len(self), np.bool_)
        reached = census.reached_counts()
        first = census.first_spaces()
        if name == "space":
            names = np.array([*(space.name for space in census.tables.spaces), ""])
            return ColumnData(names[first], first >= 0, False)
        if name == "reached":
            return ColumnData(reached, everywhere, False)
        if name == "holder":
            holders = np.array([holder.name.lower() for holder in Holder])
            return ColumnData(holders[census.holder], everywhere, False)
        if name == "va":
            return ColumnData(census.tables.va[census.first_rows()], first >= 0, True)
        if name == "role":
            roles = np.array([role.name.lower() for role in Role])
            return ColumnData(roles[census.stories.lists.roles], everywhere, False)
        if name in ("deposits", "deposits_needed"):
            return self._deposits(census, name)
        if name == "lock":
            return self._locks(census)
        if name in ("fragments", "fragments_expected", "halves"):
            return self._parted(census, name)
        counts = census.entry_counts()
        total = counts.sum(axis=1, dtype=np.int64)
        used = total - counts[:, EntryClass.NONE]
        if name == "used":
            return ColumnData(used, total > 0, False)
        if name == "empty":
            return ColumnData((used == 0).astype(np.int64), total > 0, False)
        if name == "fill":
            return ColumnData(used * 100 // np.maximum(total, 1), total > 0, False)
        return ColumnData(self._remote(census), total > 0, False)

    def _deposits(self, census: Census, name: str) -> ColumnData:
        """Deposited tables on, or needed by, the PMD tables of each descriptor."""
        values = np.zeros(len(self), np.int64)
        story = census.stories.deposits
        for ring in story.rings:
            index = np.searchsorted(self._scan.addresses, np.uint64(ring.ptdesc or 0))
            if index < len(self) and self._scan.addresses[index] == ring.ptdesc:
                values[index] = len(ring.tables) if name == "deposits" else ring.needed
        has_ring = (self.column("level").values == "PMD") & ~self._bare()
        return ColumnData(values, has_ring & story.supported & (not story.in_mm), False)

    def _locks(self, census: Census) -> ColumnData:
        """The state of each table's lock; tables whose level is not known are left out."""
        locks = census.stories.locks
        rows = np.flatnonzero((locks.descriptor >= 0) & (locks.level != UNKNOWN_LEVEL))
        return self._spread(locks.descriptor[rows], locks.states()[rows], is_hex=False)

    def _parted(self, census: Census, name: str) -> ColumnData:
        """Fragments in use, what their count should be, or the bits of halves."""
        fragments, halves = census.stories.fragments, census.stories.halves
        nowhere = np.empty(0, np.int64)
        if name == "halves":
            if halves is None:
                return self._spread(nowhere, nowhere, is_hex=True)
            index = descriptor_indices(self._scan, halves.pfn).astype(np.int64)
            rows = np.flatnonzero((index >= 0) & halves.readable)
            return self._spread(index[rows], halves.bits[rows], is_hex=True)
        if fragments is None:
            return self._spread(nowhere, nowhere, is_hex=False)
        rows = np.flatnonzero(fragments.descriptor >= 0)
        values = fragments.used if name == "fragments" else fragments.expected
        return self._spread(fragments.descriptor[rows], values[rows], is_hex=False)

    def _spread(
        self, index: npt.NDArray[np.int64], values: npt.NDArray[Any], *, is_hex: bool
    ) -> ColumnData:
        """A column that only some descriptors have a value in."""
        column = np.zeros(len(self), values.dtype)
        present = np.zeros(len(self), np.bool_)
        column[index], present[index] = values, True
        return ColumnData(column, present, is_hex)

    def _remote(self, census: Census) -> npt.NDArray[Any]:
        """Pages that the tables of each descriptor map on other nodes than their own."""
        result = np.zeros(len(self), np.int64)
        mapped = self._mapped_nodes
        if mapped is None or mapped.shape[1] < 2:
            return result
        rows = np.flatnonzero((census.descriptor >= 0) & mapped.any(axis=1))
        owner = census.descriptor[rows]
        own_node = self.column("node").values[owner]
        remote = mapped[rows].sum(axis=1, dtype=np.int64) - mapped[rows, own_node]
        np.add.at(result, owner, remote)
        return result

    def _flag_names(self) -> npt.NDArray[Any]:
        words, rows = np.unique(scan_flags(self._prog, self._scan), return_inverse=True)
        names = [ptdesc_flag_names(self._prog, word) for word in words.tolist()]
        return np.array(names or [""])[rows.reshape(-1)] if len(rows) else np.empty(0, "U1")

    def _field_name(self, name: str) -> str:
        base, dot, part = _SHORT_NAMES.get(name, name).partition(".")
        try:
            field = canonical_member_name(base) + dot + part
        except LookupError:
            raise UsageError(self._no_such_column(name)) from None
        if field not in (self._scan.descriptors.dtype.names or ()):
            if ptdesc_has_member(self._prog, base) and not dot:
                raise UsageError(
                    f"column {name!r} has two words: use {field}.next and {field}.prev "
                    "(pt_rcu_head: .next and .func)"
                )
            raise UsageError(self._no_such_column(name))
        return field

    def _no_such_column(self, name: str) -> str:
        return f"this kernel's descriptors have no column {name!r}; there are: " + ", ".join(
            self.column_names
        )

    def _meaningful(self, field: str) -> BoolArray:
        """Where a member is surely a value, by architecture and level; see state/fields.py."""
        levels = self.column("level").values
        arch = architecture(self._prog)
        base = field.partition(".")[0]
        if base in ("pt_mm", "pt_list"):
            wanted = levels == "PGD" if arch == Architecture.X86_64 else levels != levels
        elif base in ("pmd_huge_pte", "pt_share_count"):
            wanted = (levels == "PMD") & ~self._bare()
        elif base == "ptl":
            wanted = ((levels == "PTE") | (levels == "PMD")) & ~self._bare()
        elif base == "pt_frag_refcount":
            wanted = np.full(len(self), arch == Architecture.PPC64)
        elif base in ("pt_index", "_pt_s390_gaddr"):
            own = ptdesc_has_member(self._prog, "_pt_s390_gaddr")
            bears = base == "_pt_s390_gaddr" or not own
            wanted = self._of_guests() if bears else np.zeros(len(self), np.bool_)
        elif base in ("pt_rcu_head", "_pt_pad_1"):
            wanted = np.zeros(len(self), np.bool_)
        else:
            wanted = np.ones(len(self), np.bool_)
        result: BoolArray = np.asarray(wanted, np.bool_)
        return result

    def _of_guests(self) -> BoolArray:
        """Tables of guest address spaces alone, of the kind whose tables bear a guest address."""
        census = self._census
        if census is None:
            return np.zeros(len(self), np.bool_)
        gmaps = census.stories.guests.gmaps
        bearing = {gmap.address for gmap in gmaps if not gmap.kvm_owned}
        # A table that a process reaches, too, has the process's space as its first.
        spaces = [*(space.gmap in bearing for space in census.tables.spaces), False]
        of_guests: BoolArray = np.array(spaces, np.bool_)[census.first_spaces()]
        return of_guests

    def _bare(self) -> BoolArray:
        """Kernel tables whose lock and deposits this kernel does not initialise."""
        bit = flags_bit(self._prog, "PT_kernel")
        if bit is None:
            return np.zeros(len(self), np.bool_)
        bare: BoolArray = (self._scan.descriptors["pt_flags"] & np.uint64(bit)) != 0
        census = self._census
        if census is not None:
            kernel = np.array([*(space.kernel for space in census.tables.spaces), False])
            bare |= kernel[census.first_spaces()]
        return bare

    def select(
        self,
        conditions: Sequence[str] = (),
        sort: str | None = None,
        limit: int | None = None,
        within: npt.NDArray[np.intp] | None = None,
    ) -> npt.NDArray[np.intp]:
        """
        Get the rows that meet all conditions, as indices.

        :param conditions: ``COLUMN OP VALUE`` with ``=``, ``!=``, ``<``, ``<=``, ``>``, ``>=``, or
            ``&`` (any of the bits). A row without a value in the column does not meet it.
        :param sort: A column; ``-COLUMN`` sorts the largest first. Else rows go by page frame.
        :param within: Only these rows.
        :raises UsageError: for a malformed condition or an unknown column
        """
        wanted = np.full(len(self), within is None, np.bool_)
        if within is not None:
            wanted[within] = True
        for condition in conditions:
            wanted &= self._meets(condition)
        rows = np.flatnonzero(wanted)
        if sort is not None:
            keys = self.column(sort.lstrip("-")).values[rows]
            if sort.startswith("-"):
                # Equal rows stay in order of their page frame.
                rows = rows[::-1][np.argsort(keys[::-1], kind="stable")][::-1]
            else:
                rows = rows[np.argsort(keys, kind="stable")]
        return rows if limit is None else rows[:limit]

    def _meets(self, condition: str) -> BoolArray:
        match = _CONDITION.fullmatch(condition.strip())
        if match is None:
            raise UsageError(
                f"condition {condition!r} is not COLUMN OP VALUE, like refcount!=1; "
                f"OP is one of {' '.join(_OPERATORS)}"
            )
        name, operator, text = match.groups()
        column = self.column(name)
        values = column.values
        if values.dtype.kind == "U":
            if operator == "&":
                bit = flags_bit(self._prog, text)
                if name != "flags" or bit is None:
                    raise UsageError(f"this kernel has no page flag {text!r}")
                # By its bit: 7.x has two names for some.
                set_here: BoolArray = (scan_flags(self._prog, self._scan) & np.uint64(bit)) != 0
                return set_here
            return column.present & _compare_text(values, operator, text, condition)
        try:
            value = int(text, 0)
        except ValueError:
            raise UsageError(f"{text!r} in {condition!r} is not a number") from None
        try:
            operand = values.dtype.type(value)
        except OverflowError:
            raise UsageError(f"{text} in {condition!r} does not fit column {name}") from None
        met: BoolArray = column.present & _OPERATORS[operator](values, operand)
        return met


_CONDITION = re.compile(r"([\w.:]+)\s*(!=|<=|>=|==|=|<|>|&)\s*(\S.*)")

_OPERATORS: dict[str, Any] = {
    "=": np.equal,
    "==": np.equal,
    "!=": np.not_equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
    "&": lambda values, mask: (values & mask) != 0,
}


def _compare_text(values: npt.NDArray[Any], operator: str, text: str, condition: str) -> BoolArray:
    if operator in ("=", "=="):
        equal: BoolArray = values == text
        return equal
    if operator == "!=":
        different: BoolArray = values != text
        return different
    raise UsageError(f"{operator!r} in {condition!r} compares numbers, not text")


def scan_flags(prog: Program, scan: MemmapScan) -> npt.NDArray[np.uint64]:
    """The flag bits of every descriptor, without zone, node and section: uint64, shape (n,)."""
    mask = np.uint64((1 << prog["__NR_PAGEFLAGS"].value_()) - 1)
    flags: npt.NDArray[np.uint64] = scan.descriptors["pt_flags"] & mask
    return flags
