# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the invariants share: one census, and what they read beside it, each thing once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Object, Program, TypeKind, cast

from ptinspect.census import Census
from ptinspect.checks.leaves import LeafPass
from ptinspect.checks.model import Finding, Tally, Value
from ptinspect.checks.pages import PageReader, Pages
from ptinspect.kernel.descriptor import native_member_name, ptdesc_type
from ptinspect.kernel.paging import Paging
from ptinspect.memory import AddressArray, BoolArray, iter_blocks
from ptinspect.tables.entries import Entries, filled_entries, raw_entries
from ptinspect.tables.spaces import Space, SpaceKind
from ptinspect.tables.vmas import Areas, try_areas
from ptinspect.tables.walk import RowState, Tables

Rows = npt.NDArray[np.intp]

#: First address of the kernel half of x86_64.
_X86_KERNEL_HALF = 1 << 63


class Context:
    """
    One target, as the invariants see it.

    :param census: Everything of this run is judged by it.
    :param racing: Whether the target ran while the census was taken.
    """

    def __init__(self, prog: Program, census: Census, *, racing: bool = False) -> None:
        self.prog = prog
        self.census = census
        self.racing = racing
        self._areas: dict[int, tuple[Areas | None, str]] = {}
        self._busy: dict[int, str] = {}
        #: By address of a ``struct file``.
        self._hugetlb: dict[int, int] = {}

    @property
    def tables(self) -> Tables:
        """The tables that the walk reached."""
        return self.census.tables

    @property
    def paging(self) -> Paging:
        """The paging of the target."""
        return self.census.tables.paging

    @property
    def arch(self) -> str:
        """Name of the architecture: x86_64, s390x, arm64, ppc64, riscv64."""
        return self.paging.architecture

    # Spaces and rows.

    @cached_property
    def user_space(self) -> BoolArray:
        """bool, by space: the spaces of mms, not the kernel's, EFI's or an isolated half."""
        return np.array([s.kind is SpaceKind.USER for s in self.tables.spaces], np.bool_)

    @cached_property
    def process_space(self) -> BoolArray:
        """bool, by space: those of `user_space` whose mappings are described by areas."""
        return np.array([self._is_process(n) for n in range(len(self.tables.spaces))], np.bool_)

    def _is_process(self, number: int) -> bool:
        space = self.tables.spaces[number]
        if space.kind is not SpaceKind.USER or space.mm is None or space.mm.users <= 0:
            return False
        # text_poke_mm and powerpc's mms for patching map kernel text at an address without an
        # area (poking_init(), arch/powerpc/lib/code-patching.c).
        if space.symbol:
            return False
        areas = self.areas(number)
        return bool(space.tasks) or areas is None or len(areas.starts) > 0

    @cached_property
    def kernel_space(self) -> BoolArray:
        """bool, by space: the kernel's own."""
        return np.array([s.kind is SpaceKind.KERNEL for s in self.tables.spaces], np.bool_)

    @cached_property
    def kvm_space(self) -> BoolArray:
        """bool, by space: guest address spaces whose tables are KVM's own (s390, from 7.0)."""
        return np.array([s.kvm_owned for s in self.tables.spaces], np.bool_)

    @cached_property
    def there(self) -> BoolArray:
        """bool, by row: a table is there (not outside memory, not its own ancestor)."""
        state = self.tables.state
        there: BoolArray = (state != RowState.OUTSIDE) & (state != RowState.CYCLE)
        return there

    @cached_property
    def pages(self) -> Pages:
        """The struct pages of the tables, by row."""
        frames = self.tables.address // np.uint64(self.paging.page_bytes)
        return self.page_reader.read(frames, self.census.descriptor)

    @cached_property
    def slab_allowed(self) -> BoolArray:
        """bool, by row: the table may be an object of a slab cache."""
        tables = self.tables
        if self.arch == "ppc64":
            # PUDs and the hash MMU's PGDs come from PGT_CACHE (arch/powerpc/mm/init-common.c).
            allowed: BoolArray = tables.level >= 2
        elif self.arch == "arm64":
            # pgd_cache, if the PGD is smaller than a page (arch/arm64/mm/pgd.c).
            allowed = tables.level == len(self.paging.levels) - 1
        else:
            allowed = np.zeros(len(tables), np.bool_)
        return allowed

    @cached_property
    def without_count(self) -> BoolArray:
        """bool, by row: nobody holds the page of the table."""
        pages = self.pages
        # The pages of a slab but the first have no count of their own.
        counted_elsewhere = pages.slab | (pages.tail & self.slab_allowed)
        free: BoolArray = ~counted_elsewhere & (pages.refcounts < 1)
        return free

    @cached_property
    def page_reader(self) -> PageReader:
        """Reads struct pages."""
        return PageReader(self.prog, self.census.scan)

    def space_of(self, row: int) -> Space:
        """Get the space of a row."""
        return self.tables.spaces[int(self.tables.space[row])]

    def level_name(self, row: int) -> str:
        """Get the kernel's name of the level of a row."""
        return self.paging.levels[int(self.tables.level[row])].name

    def user_half(self, va: AddressArray) -> BoolArray:
        """Tell which addresses are not in the kernel half of x86_64, where its LDT can be."""
        if self.arch != "x86_64":
            return np.ones(len(va), np.bool_)
        half: BoolArray = va < np.uint64(_X86_KERNEL_HALF)
        return half

    def spans(self) -> npt.NDArray[np.uint64]:
        """uint64, by row: bytes of address space that each table translates."""
        span = [1 << level.shift for level in self.paging.levels]
        entries = [level.entries for level in self.paging.levels]
        # A root of the highest level can cover all 64 bits; it is never asked for its end.
        each = [min(a * b, (1 << 64) - 1) for a, b in zip(span, entries)]
        return np.array(each, np.uint64)[self.tables.level]

    # Entries.

    @cached_property
    def upper(self) -> tuple[Entries, ...]:
        """
        The filled entries of all tables above the lowest level, by level (the first is empty).

        ``row`` is the row of the census. Entries of roots that are another space's are left out.
        """
        return tuple(self._upper(level) for level in range(len(self.paging.levels)))

    def _upper(self, level: int) -> Entries:
        parts = [] if level == 0 else list(self._upper_parts(level))
        if not parts:
            empty = np.empty(0, np.int64)
            return Entries(empty, empty, np.empty(0, np.uint64), np.empty(0, np.uint8))
        return Entries(*(np.concatenate(columns) for columns in zip(*parts)))

    def _upper_parts(self, level: int) -> Iterator[Entries]:
        for rows, raw in self.read_tables(level):
            entries = filled_entries(self.paging, raw, level)
            keep = self._own(rows, entries)
            row = rows[entries.row]
            yield Entries(row[keep], entries.slot[keep], entries.value[keep], entries.kind[keep])

    def _own(self, rows: Rows, entries: Entries) -> BoolArray:
        """Tell which entries belong to the space of their row."""
        keep = np.ones(len(entries.row), np.bool_)
        for place in np.flatnonzero(self.tables.parent[rows] < 0).tolist():
            inside = np.zeros(len(entries.row), np.bool_)
            for begin, end in self.space_of(int(rows[place])).root.entries:
                inside |= (entries.slot >= begin) & (entries.slot < end)
            keep &= inside | (entries.row != place)
        return keep

    def read_tables(self, level: int) -> Iterator[tuple[Rows, npt.NDArray[np.uint64]]]:
        """Read the tables of a level, each once: rows and raw entries."""
        rows = np.flatnonzero(
            (self.tables.level == level) & (self.tables.state <= RowState.NOT_READ)
        )
        rows = rows[np.argsort(self.tables.address[rows], kind="stable")]
        size = self.paging.levels[level].table_bytes
        for batch in iter_blocks(self.prog, self.tables.address[rows], size):
            here = rows[batch.first : batch.first + len(batch.data)]
            raw = raw_entries(batch.data)
            if batch.readable is not None:
                here, raw = here[batch.readable], raw[batch.readable]
            yield here, raw

    @cached_property
    def leaves(self) -> LeafPass:
        """All entries that map memory, looked at once for all invariants that ask for them."""
        return LeafPass(self)

    @cached_property
    def whole(self) -> bool:
        """
        Whether nothing that was looked for so far is missing from the target.

        If so, an address that cannot be read is no address; else it may be in a hole.
        """
        unreadable = (self.tables.state == RowState.UNREADABLE).any()
        census = self.census
        return not (unreadable or census.scan.unreadable_pages or census.spaces.notes)

    def in_a_hole(self, address: int) -> bool:
        """Whether a kernel address that cannot be read is one of memory that is missing."""
        page = np.uint64(self.paging.page_bytes)
        try:
            physical = self.paging.virtual_to_physical(self.prog, address)
        except (FaultError, ValueError, OverflowError):
            return not self.whole
        frames = np.array([physical & (1 << 64) - 1], np.uint64) // page
        if not self.page_reader.read(frames).outside[0]:
            return True
        # The memory map itself, or memory that is mapped elsewhere.
        return not self.whole

    def miss_unread(self, tally: Tally) -> None:
        """Note how many tables could not be read, if any."""
        count = int(np.count_nonzero(self.tables.state == RowState.UNREADABLE))
        if count:
            tally.miss(f"{count} tables could not be read")

    # Areas.

    def areas(self, space: int) -> Areas | None:
        """Get the memory areas of a space; ``None`` if they cannot be read."""
        return self._read_areas(space)[0]

    def areas_problem(self, space: int) -> str:
        """Say why the areas of a space cannot be read; empty if they can."""
        return self._read_areas(space)[1]

    def _read_areas(self, space: int) -> tuple[Areas | None, str]:
        if space not in self._areas:
            mm = self.mm(space)
            self._areas[space] = (
                try_areas(self.prog, mm) if mm is not None else (None, "the space has no mm")
            )
        return self._areas[space]

    def hugetlb_bytes(self, areas: Areas, index: int) -> int:
        """Get the page size of a hugetlb area; 0 if it cannot be read."""
        file = int(areas.files[index])
        if file not in self._hugetlb:
            try:
                node = Object(self.prog, "struct file *", file).f_inode
                info = cast("struct hugetlbfs_sb_info *", node.i_sb.s_fs_info)
                order = int(info.hstate.order.value_())
                self._hugetlb[file] = self.paging.page_bytes << order if order < 32 else 0
            except (FaultError, LookupError):
                self._hugetlb[file] = 0
        return self._hugetlb[file]

    def mm(self, space: int) -> Object | None:
        """Get the ``struct mm_struct *`` of a space."""
        mm = self.tables.spaces[space].mm
        return None if mm is None else mm.object(self.prog)

    def busy(self, space: int) -> str:
        """
        Say what is going on in an mm that explains a passing disagreement; empty if nothing is.

        Its last user is gone, or somebody holds a lock under which tables and counts change.
        """
        if space not in self._busy:
            try:
                self._busy[space] = self._find_busy(space)
            except (FaultError, LookupError, AttributeError):
                self._busy[space] = ""
        return self._busy[space]

    def _find_busy(self, space: int) -> str:
        mm = self.mm(space)
        if mm is None:
            return ""
        if mm.mm_users.counter.value_() <= 0:
            return "the mm is being torn down"
        if mm.mmap_lock.count.counter.value_():
            return "mmap_lock is held"
        locks = self.census.stories.locks
        if (locks.held & (locks.space == space)).any():
            return "page_table_lock or the lock of a table is held"
        if self._locked_areas(space):
            return "a memory area is locked"
        return ""

    @cached_property
    def locks_embedded(self) -> bool:
        """Whether the lock of a table is in its descriptor (ALLOC_SPLIT_PTLOCKS is 0)."""
        if self.census.scan.descriptors.dtype["ptl"].kind != "u":
            return False
        member = ptdesc_type(self.prog).member(native_member_name(self.prog, "ptl"))
        return bool(member.type.unaliased_kind() != TypeKind.POINTER)

    def _locked_areas(self, space: int) -> bool:
        """Whether a page fault or the like holds one area alone (since 6.4)."""
        areas = self.areas(space)
        type_ = self.prog.type("struct vm_area_struct")
        if areas is None:
            return False
        for address in areas.objects.tolist():
            area = Object(self.prog, type_, address=address)
            if type_.has_member("vm_refcnt"):
                locked = bool(area.vm_refcnt.refs.counter.value_() > 1)
            elif type_.has_member("vm_lock") and area.vm_lock:
                locked = bool(area.vm_lock.lock.count.counter.value_())
            else:
                return False
            if locked:
                return True
        return False

    # Findings.

    def entry_value(self, address: int) -> Value:
        """Read an entry at a physical address."""
        try:
            raw = self.prog.read(address, 8, True)
        except FaultError:
            return "unreadable"
        return int(self.paging.values(np.frombuffer(raw, np.uint64))[0])

    def entry_finding(self, row: int, message: str, **evidence: Value) -> Finding:
        """Report the entry that points to the table of a row, or the root."""
        tables = self.tables
        parent = int(tables.parent[row])
        table = int(tables.address[row])
        if parent < 0:
            return self.table_finding(row, message, **evidence)
        address = int(tables.entry_address[row])
        return Finding(
            "entry",
            address,
            f"{self.level_name(parent)} entry for {int(tables.va[row]):#x}: {message}",
            (("entry", self.entry_value(address)), ("table", table), *evidence.items()),
            self.space_of(row).name,
            f"show phys:{address:#x}",
        )

    def slot_finding(
        self, row: int, slot: int, value: int, message: str, **evidence: Value
    ) -> Finding:
        """Report one entry of the table of a row."""
        tables = self.tables
        address = int(tables.address[row]) + 8 * slot
        level = self.paging.levels[int(tables.level[row])]
        va = np.array([int(tables.va[row]) + (slot << level.shift) & (1 << 64) - 1], np.uint64)
        return Finding(
            "entry",
            address,
            f"{level.name} entry for {int(self.paging.canonical(va)[0]):#x}: {message}",
            (("entry", value), *evidence.items()),
            self.space_of(row).name,
            f"show phys:{address:#x}",
        )

    def table_finding(self, row: int, message: str, **evidence: Value) -> Finding:
        """Report the table of a row."""
        address = int(self.tables.address[row])
        return Finding(
            "table",
            address,
            f"{self.level_name(row)} table at va {int(self.tables.va[row]):#x}: {message}",
            tuple(evidence.items()),
            self.space_of(row).name,
            f"show phys:{address:#x}",
        )

    def descriptor_finding(self, index: int, message: str, **evidence: Value) -> Finding:
        """Report a descriptor by its index in the scan."""
        scan = self.census.scan
        pfn = int(scan.pfns[index])
        rows = self.census.rows_of(index)
        level = self.level_name(int(rows[0])) if len(rows) else "unreached"
        return Finding(
            "ptdesc",
            int(scan.addresses[index]),
            f"descriptor of a table ({level}): {message}",
            (("pfn", pfn), *evidence.items()),
            self.space_of(int(rows[0])).name if len(rows) else "",
            f"show pfn:{pfn:#x}",
        )

    def mm_finding(self, space: int, message: str, **evidence: Value) -> Finding:
        """Report an mm."""
        one = self.tables.spaces[space]
        assert one.mm is not None
        return Finding(
            "mm",
            one.mm.address,
            message,
            tuple(evidence.items()),
            one.name,
            f"show phys:{one.root.address:#x}",
        )

    def columns(self, name: str) -> npt.NDArray[np.uint64]:
        """Get one member of all descriptors as uint64."""
        column: npt.NDArray[np.uint64] = self.census.scan.descriptors[name].astype(np.uint64)
        return column

    def has_column(self, name: str) -> bool:
        """Whether this kernel's descriptor has a member."""
        return name in (self.census.scan.descriptors.dtype.names or ())

    def descriptors_of(self, spaces: BoolArray, *, level: int | None = None) -> Rows:
        """Get the descriptors of tables that any of some spaces reaches, each once."""
        rows = spaces[self.tables.space] & (self.census.descriptor >= 0)
        if level is not None:
            rows &= self.tables.level == level
        return np.unique(self.census.descriptor[rows]).astype(np.intp)


def page_frames(addresses: AddressArray, page_bytes: int) -> npt.NDArray[np.uint64]:
    """Get the page frames of physical addresses."""
    frames: npt.NDArray[np.uint64] = addresses // np.uint64(page_bytes)
    return frames
