# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Every address space of a target, and how it was found.

Tasks lead to most mms, but not to those that are kept without a task (by KVM, by /proc, by a lazy
CPU), are still being built, or belong to the kernel. These are found on x86's pgd_list and among
the objects of the mm_struct slab cache. A source that is broken leaves a note and what it gave so
far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Object, Program, Type, TypeKind, offsetof, sizeof

from ptinspect.errors import PtinspectError
from ptinspect.kernel.descriptor import byte_order, ptdesc_type
from ptinspect.kernel.paging import MmFields, Paging, Root, paging_of
from ptinspect.kernel.paging.model import object_or_none
from ptinspect.lists import walk_both_ways, walk_list, walk_list_at
from ptinspect.memory import AddressArray, BoolArray, read_blocks
from ptinspect.tables.slabs import SlabPages, slab_objects

#: task_struct.flags (include/linux/sched.h)
_PF_KTHREAD = 0x00200000

#: What reading a target that is damaged, or of an unexpected shape, raises.
_BROKEN = (FaultError, LookupError, AttributeError, TypeError, ValueError, PtinspectError)


class SpaceKind(Enum):
    """What an address space is for."""

    USER = "user"
    #: ``init_mm``.
    KERNEL = "kernel"
    #: ``efi_mm``, in which the firmware runs.
    EFI = "efi"
    #: The second root of a space, on which user mode runs (x86 page-table isolation).
    ISOLATED = "kpti"
    #: Guest memory of KVM on s390.
    GMAP = "gmap"
    #: What an address-space-control element of s390 names, whoever keeps it.
    ASCE = "asce"


class Found(Enum):
    """What led to an address space."""

    TASK = "task"
    #: Only a lazy CPU or a kernel thread has it as ``active_mm``.
    ACTIVE_MM = "active_mm"
    PGD_LIST = "pgd_list"
    SLAB = "slab"
    #: A variable of the kernel points to it.
    SYMBOL = "symbol"
    #: An mm has it on its list of guest address spaces (``context.gmap_list``, up to 6.x).
    GMAP_LIST = "gmap_list"
    #: A virtual machine of KVM's list has it (``vm_list``, from 7.0).
    VM_LIST = "vm_list"
    #: Another guest address space has it among its children: a shadow, or a virtual CPU's own.
    CHILDREN = "children"


class TaskName(NamedTuple):
    """A process that runs in a space."""

    pid: int
    comm: str
    #: Address of its ``struct task_struct``.
    address: int


@dataclass(frozen=True)
class Mm:
    """The members of a ``struct mm_struct`` when the spaces were listed."""

    address: int
    users: int
    count: int
    #: Bytes of page tables that the kernel has counted (``pgtables_bytes``).
    pgtables_bytes: int

    def object(self, prog: Program) -> Object:
        """Get it as ``struct mm_struct *``."""
        return Object(prog, "struct mm_struct *", self.address)


@dataclass(frozen=True)
class Space:
    """An address space with a root table."""

    kind: SpaceKind
    root: Root
    found: tuple[Found, ...] = ()
    #: ``None`` for spaces that are not an mm's.
    mm: Mm | None = None
    tasks: tuple[TaskName, ...] = ()
    #: Name of the kernel variable that leads here, if any.
    symbol: str = ""
    #: Address of the ``struct gmap`` of a guest address space; *mm* is its host's then.
    gmap: int | None = None
    #: Whether it is a guest address space whose tables are KVM's own (:meth:`Paging.kvm_kinds`).
    kvm_owned: bool = False

    @property
    def kernel(self) -> bool:
        """Whether it maps kernel memory, which is never swapped."""
        if self.kind is SpaceKind.ISOLATED:
            # What user mode sees of the kernel; the mms' own halves share it.
            return self.symbol == "init_mm"
        return self.kind in (SpaceKind.KERNEL, SpaceKind.EFI)

    @property
    def name(self) -> str:
        """A short name for people."""
        if self.kind is SpaceKind.KERNEL:
            return "kernel"
        if self.tasks:
            name = f"{self.tasks[0].comm}/{self.tasks[0].pid}"
        elif self.symbol:
            name = self.symbol
        else:
            name = f"mm {self.mm.address:#x}" if self.mm is not None else "?"
        if self.gmap is not None:
            return f"{name} gmap:{self.gmap:#x}"
        return f"{name} (kpti)" if self.kind is SpaceKind.ISOLATED else name


@dataclass(frozen=True)
class Note:
    """Something about a source that keeps the list of spaces from being whole."""

    source: str
    message: str


@dataclass(frozen=True)
class SpaceList:
    """All address spaces: the kernel's first, then EFI's, then the others by address of the mm."""

    spaces: tuple[Space, ...]
    #: Empty if every source could be followed to its end.
    notes: tuple[Note, ...]

    def of_pid(self, pid: int) -> Space | None:
        """Get the space of a process."""
        for space in self.spaces:
            if space.kind is SpaceKind.USER and any(task.pid == pid for task in space.tasks):
                return space
        return None

    def of_mm(self, address: int) -> Space | None:
        """Get the space of an mm (not its isolated half, nor a guest's)."""
        for space in self.spaces:
            if (
                space.mm is not None
                and space.mm.address == address
                and space.kind not in (SpaceKind.ISOLATED, SpaceKind.GMAP)
            ):
                return space
        return None

    def of_gmap(self, address: int) -> Space | None:
        """Get the space of a guest."""
        return next((space for space in self.spaces if space.gmap == address), None)

    @property
    def kernel(self) -> Space | None:
        """The kernel's space, unless its root could not be found."""
        return next((s for s in self.spaces if s.kind is SpaceKind.KERNEL), None)


def mm_slab_pages(prog: Program) -> SlabPages | None:
    """
    Get what gathers the pages of the mm_struct cache, for somebody who reads the memory map.

    :param prog: The kernel.
    :return: ``None`` if the cache cannot be found; :func:`find_spaces` then says why.
    """
    cache = object_or_none(prog, "mm_cachep")
    try:
        return None if cache is None else SlabPages(prog, cache)
    except _BROKEN:
        return None


def find_spaces(
    prog: Program,
    *,
    slab: bool = True,
    isolated: bool = True,
    mm_slabs: SlabPages | None = None,
) -> SpaceList:
    """
    List every address space.

    :param prog: The kernel.
    :param slab: Whether to look for mms in the slab cache too, which reads the whole memory map.
    :param isolated: Whether to list the second roots of page-table isolation.
    :param mm_slabs: The pages of that cache, if the memory map was read already.
    :return: The spaces, and what kept a source from being followed to its end.
    :raises TargetError: if the target's paging is not supported
    """
    return _Finder(prog, paging_of(prog), mm_slabs).find(slab, isolated)


class _Finder:
    def __init__(self, prog: Program, paging: Paging, mm_slabs: SlabPages | None) -> None:
        self._prog = prog
        self._paging = paging
        self._mm_slabs = mm_slabs
        self._notes: list[Note] = []
        #: By address of the mm.
        self._found: dict[int, list[Found]] = {}
        self._tasks: dict[int, list[TaskName]] = {}
        self._symbols: dict[int, str] = {}

    def find(self, slab: bool, isolated: bool) -> SpaceList:
        spaces: list[Space] = []
        self._attempt("init_mm", lambda: spaces.extend(self._kernel_space(isolated)))
        self._attempt("efi_mm", lambda: spaces.extend(self._efi_space()))
        kernel_mms = {space.mm.address for space in spaces if space.mm is not None}
        self._attempt("tasks", self._from_tasks)
        self._attempt("pgd_list", self._from_pgd_list)
        self._attempt("mm variables", self._from_symbols)
        # From the slab last: its objects are guesses that need the strictest check.
        if slab:
            self._attempt("mm_struct slab cache", self._from_slab)
        for mm in kernel_mms:
            self._found.pop(mm, None)
        self._attempt("mm_struct", lambda: spaces.extend(self._user_spaces(isolated)))
        return SpaceList(tuple(spaces), tuple(self._notes))

    def _attempt(self, source: str, step: Callable[[], None]) -> None:
        try:
            step()
        except _BROKEN as error:
            self._notes.append(Note(source, f"{type(error).__name__}: {error}"))

    def _add(self, mm: int, found: Found) -> None:
        ways = self._found.setdefault(mm, [])
        if found not in ways:
            ways.append(found)

    # The kernel's own.

    def _kernel_space(self, isolated: bool) -> Iterable[Space]:
        root = self._paging.kernel_root(self._prog)
        address = self._prog["init_mm"].address_of_().value_()
        members = _MmMembers(self._prog).read(np.array([address], np.uint64))
        mm = members.mm(0) if members.readable[0] else None
        yield Space(SpaceKind.KERNEL, root, (Found.SYMBOL,), mm, symbol="init_mm")
        fields = MmFields(address, root.address, 0, False)
        second = self._paging.isolated_root(self._prog, fields) if isolated else None
        if second is not None:
            yield Space(SpaceKind.ISOLATED, second, (Found.SYMBOL,), mm, symbol="init_mm")

    def _efi_space(self) -> Iterable[Space]:
        efi = object_or_none(self._prog, "efi_mm")
        if efi is None or not efi.pgd:
            return
        pgd = self._paging.virtual_to_physical(self._prog, efi.pgd.value_())
        root = self._paging.whole_root(self._prog, pgd)
        address = efi.address_of_().value_()
        members = _MmMembers(self._prog).read(np.array([address], np.uint64))
        mm = members.mm(0) if members.readable[0] else None
        yield Space(SpaceKind.EFI, root, (Found.SYMBOL,), mm, symbol="efi_mm")

    # Where mms come from.

    def _from_tasks(self) -> None:
        """
        Follow init_task's list of processes.

        The leader of a process can be dead (its mm is gone) while other threads run.
        """
        prog = self._prog
        task_type = prog.type("struct task_struct")
        list_offset = offsetof(task_type, "tasks")
        processes = walk_list(prog["init_task"].tasks.address_of_())
        if processes.broken is not None:
            self._notes.append(Note("tasks", str(processes.broken)))
        tasks = np.array([node - list_offset for node in processes.nodes], np.uint64)
        members = _Members(
            prog, task_type, ("mm", "active_mm", "flags", "tgid", "comm", "signal")
        ).read(tasks)
        for row in np.flatnonzero(members.readable).tolist():
            leader = int(tasks[row])
            comm = members.text("comm", row)
            name = TaskName(int(members["tgid"][row]), comm, leader)
            mm = int(members["mm"][row])
            if not mm and not int(members["flags"][row]) & _PF_KTHREAD:
                mm = self._mm_of_threads(int(members["signal"][row]))
            if mm:
                self._add(mm, Found.TASK)
                self._tasks.setdefault(mm, []).append(name)
            elif int(members["active_mm"][row]):
                self._add(int(members["active_mm"][row]), Found.ACTIVE_MM)
        unreadable = int(np.count_nonzero(~members.readable))
        if unreadable:
            self._notes.append(Note("tasks", f"{unreadable} of {len(tasks)} cannot be read"))

    def _mm_of_threads(self, signal: int) -> int:
        """Get the mm of a process whose leader has none any more; 0 if no thread has."""
        prog = self._prog
        node_offset = offsetof(prog.type("struct task_struct"), "thread_node")
        head = signal + offsetof(prog.type("struct signal_struct"), "thread_head")
        for node in walk_list_at(prog, head, back_links=False).nodes:
            try:
                mm = Object(prog, "struct task_struct *", node - node_offset).mm.value_()
            except FaultError:
                continue
            if mm:
                return int(mm)
        return 0

    def _from_pgd_list(self) -> None:
        """
        Follow x86's list of all PGDs; each descriptor names its mm (arch/x86/mm/pgtable.c).
        """
        prog = self._prog
        head = object_or_none(prog, "pgd_list")
        if head is None or self._paging.architecture != "x86_64":
            return
        descriptor = ptdesc_type(prog)
        node_offset = offsetof(descriptor, "pt_list")
        pgds = walk_both_ways(prog, head.address_of_().value_())
        if pgds.lost:
            self._notes.append(Note("pgd_list", str(pgds.breaks[0])))
        addresses = np.array([node - node_offset for node in pgds.nodes], np.uint64)
        members = _Members(prog, descriptor, ("pt_mm",)).read(addresses)
        for row in np.flatnonzero(members.readable).tolist():
            mm = int(members["pt_mm"][row])
            if mm:
                self._add(mm, Found.PGD_LIST)

    def _from_symbols(self) -> None:
        """Look where the kernel keeps mms for itself: text_poke() and tboot."""
        for name in ("text_poke_mm", "poking_mm", "tboot_mm"):
            variable = object_or_none(self._prog, name)
            if variable is None:
                continue
            if variable.type_.unaliased_kind() == TypeKind.POINTER:
                mm = variable.value_()
            else:
                # tboot_mm is on swapper_pg_dir, the kernel's own root (arch/x86/kernel/tboot.c).
                own = variable.pgd and variable.pgd != self._prog["init_mm"].pgd
                mm = variable.address_of_().value_() if own else 0
            if mm:
                self._add(mm, Found.SYMBOL)
                self._symbols[mm] = name

    def _from_slab(self) -> None:
        """
        Look at all objects of the mm_struct cache.

        A freed mm keeps its contents, but its mm_count is 0 (__mmdrop()). Memory that never was an
        mm does not have an mmlist that is its own neighbour or on a list (mm_init()).
        """
        cache = object_or_none(self._prog, "mm_cachep")
        if cache is None:
            self._notes.append(Note("mm_struct slab cache", "this kernel has no mm_cachep"))
            return
        if self._mm_slabs is not None:
            objects = self._mm_slabs.objects()
        else:
            objects = slab_objects(self._prog, cache.read_())
        mms = _MmMembers(self._prog).read(objects)
        alive = mms.readable & (mms["mm_count"] > 0) & (mms["pgd"] != 0)
        mmlist = objects + np.uint64(mms.offset("mmlist"))
        next_ = mms["mmlist"]
        alone = next_ == mmlist
        for row in np.flatnonzero(alive).tolist():
            if alone[row] or self._links_back(int(next_[row]), int(mmlist[row])):
                self._add(int(objects[row]), Found.SLAB)

    def _links_back(self, neighbour: int, node: int) -> bool:
        try:
            return bool(self._prog.read_u64(neighbour + 8) == node)
        except FaultError:
            return False

    # From an mm to its space.

    def _user_spaces(self, isolated: bool) -> Iterable[Space]:
        addresses = np.array(sorted(self._found), np.uint64)
        mms = _MmMembers(self._prog).read(addresses)
        physical = self._direct_map_to_physical(mms["pgd"])
        unfinished = np.zeros(len(addresses), np.bool_)
        if self._paging.architecture == "s390x":
            owned = np.isin(addresses, np.array(list(self._tasks), np.uint64))
            unfinished = unfinished_roots(mms["asce"].astype(np.uint64), physical, owned)
        for row, address in enumerate(addresses.tolist()):
            found = tuple(self._found[address])
            if not mms.readable[row]:
                self._notes.append(Note("mm_struct", f"{address:#x} cannot be read"))
                continue
            if int(mms["mm_count"][row]) <= 0 or not int(mms["pgd"][row]):
                # Its last user is gone; the tables are, too.
                continue
            if unfinished[row]:
                continue
            fields = MmFields(
                address, int(physical[row]), int(mms["asce"][row]), bool(mms["ldt"][row])
            )
            try:
                root = self._paging.user_root(self._prog, fields)
            except ValueError as error:
                self._notes.append(Note("mm_struct", f"{address:#x}: {error}"))
                continue
            mm = mms.mm(row)
            tasks = tuple(sorted(self._tasks.get(address, ())))
            symbol = self._symbols.get(address, "")
            yield Space(SpaceKind.USER, root, found, mm, tasks, symbol)
            second = self._paging.isolated_root(self._prog, fields) if isolated else None
            if second is not None:
                yield Space(SpaceKind.ISOLATED, second, found, mm, tasks, symbol)

    def _direct_map_to_physical(self, addresses: AddressArray) -> AddressArray:
        """Translate addresses of the direct map, where all PGDs of mms are but init_mm's."""
        if not len(addresses):
            return addresses
        known = addresses[np.flatnonzero(addresses)]
        if not len(known):
            return addresses
        offset = int(known[0]) - self._paging.virtual_to_physical(self._prog, int(known[0]))
        physical: AddressArray = addresses - np.uint64(offset & ((1 << 64) - 1))
        return physical


def unfinished_roots(asce: AddressArray, pgd: AddressArray, owned: BoolArray) -> BoolArray:
    """
    Tell which mms of s390 are being made, and have a root that holds anything.

    mm_init() (kernel/fork.c) gives a new mm its pgd, in which is what was there before, and then
    has init_new_context() fill it and set the ASCE. Until then that is the parent's, or 0.

    :param asce: uint64, ``context.asce`` of each mm.
    :param pgd: uint64, physical address of the root of each.
    :param owned: bool, whether a task has it.
    """
    origin = asce & ~np.uint64(0xFFF)
    unfinished: BoolArray = ~owned & (origin != pgd) & ((asce == 0) | np.isin(origin, pgd[owned]))
    return unfinished


class _Members:
    """Some members of many structures of one type, read together."""

    def __init__(self, prog: Program, type_: Type, names: Sequence[str]) -> None:
        self._prog = prog
        order = byte_order(prog)
        self._layout: dict[str, tuple[int, np.dtype[Any]]] = {}
        for name in names:
            self._add(type_, name, name, order)

    def _add(self, type_: Type, name: str, member: str, order: str) -> None:
        offset = offsetof(type_, member)
        for part in member.split("."):
            type_ = type_.member(part).type
        size = sizeof(type_)
        kind = type_.unaliased_kind()
        if kind == TypeKind.ARRAY:
            dtype: np.dtype[Any] = np.dtype(f"S{size}")
        elif kind == TypeKind.INT and type_.unaliased().is_signed:
            dtype = np.dtype(f"{order}i{size}")
        else:
            dtype = np.dtype(f"{order}u{min(size, 8)}")
        self._layout[name] = (offset, dtype)

    def read(self, addresses: AddressArray) -> _Members:
        """Read the members of structures at the given addresses."""
        first = min(offset for offset, _ in self._layout.values())
        end = max(offset + dtype.itemsize for offset, dtype in self._layout.values())
        blocks = read_blocks(self._prog, addresses + np.uint64(first), end - first, physical=False)
        self._data, self.readable = blocks
        self._first = first
        return self

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Get one member of all; zeros where the structure lacks it."""
        if name not in self._layout:
            return np.zeros(len(self._data), np.uint64)
        offset, dtype = self._layout[name]
        begin = offset - self._first
        column = np.ascontiguousarray(self._data[:, begin : begin + dtype.itemsize])
        return column.view(dtype).reshape(-1).astype(dtype.newbyteorder("="))

    def text(self, name: str, row: int) -> str:
        """Get a member that is a string."""
        value: bytes = self[name][row]
        return value.split(b"\0")[0].decode(errors="replace")

    def offset(self, name: str) -> int:
        """Get the offset of a member."""
        return self._layout[name][0]


class _MmMembers(_Members):
    """The members of ``struct mm_struct`` that matter here, under short names."""

    #: Name here to member; those in the second half exist on some architectures only.
    _ALWAYS: ClassVar = {
        "pgd": "pgd",
        "mm_users": "mm_users.counter",
        "mm_count": "mm_count.counter",
        "pgtables_bytes": "pgtables_bytes.counter",
        "mmlist": "mmlist.next",
    }
    _SOMETIMES: ClassVar = {"asce": "context.asce", "ldt": "context.ldt"}

    def __init__(self, prog: Program) -> None:
        super().__init__(prog, prog.type("struct mm_struct"), ())
        type_ = prog.type("struct mm_struct")
        order = byte_order(prog)
        for name, member in self._ALWAYS.items():
            self._add(type_, name, member, order)
        for name, member in self._SOMETIMES.items():
            try:
                self._add(type_, name, member, order)
            except LookupError:
                continue

    def mm(self, row: int) -> Mm:
        """Get one of them."""
        return Mm(
            self._address(row),
            int(self["mm_users"][row]),
            int(self["mm_count"][row]),
            int(self["pgtables_bytes"][row]),
        )

    def read(self, addresses: AddressArray) -> _MmMembers:
        self._addresses = addresses
        super().read(addresses)
        return self

    def _address(self, row: int) -> int:
        return int(self._addresses[row])
