# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Tables that are no longer part of an address space, but not free yet.

A table that is taken out of a tree may still be read by a walker without locks. So it is gathered
in a batch (``struct mmu_table_batch``, named by a ``struct mmu_gather`` on the stack of whoever
unmaps), and the batch, or a single table by its ``pt_rcu_head``, waits for RCU (mm/mmu_gather.c,
pte_free_defer()). The kernel's own tables may wait on ``kernel_pgtable_work`` for I/O TLBs to be
flushed (mm/pgtable-generic.c, 7.x).

Whether such a table is still typed depends on the kernel: since 7.x it is, until it is freed; on
older ones most architectures drop the type before they gather a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
from drgn import Architecture, FaultError, Program, offsetof

from ptinspect.kernel.descriptor import byte_order, native_member_name, ptdesc_type
from ptinspect.kernel.direct_map import direct_map_offset
from ptinspect.lists import walk_list
from ptinspect.memory import AddressArray, BoolArray
from ptinspect.state.rcu import CallbackList, RcuCallbacks, Segment, rcu_callbacks
from ptinspect.state.shared_pages import read_descriptors
from ptinspect.state.stacks import KernelStack, kernel_stacks
from ptinspect.state.told import Told
from ptinspect.tables.memmap import Memmap
from ptinspect.tables.scan import MemmapScan, descriptor_indices
from ptinspect.tables.walk import Tables

#: Callbacks that free one table by its pt_rcu_head: pte_free_now (mm/pgtable-generic.c, powerpc's
#: and s390's own), __tlb_remove_table_one_rcu (mm/mmu_gather.c), and the one that frees a batch.
_SINGLE_FUNCTIONS = ("pte_free_now", "__tlb_remove_table_one_rcu")
_BATCH_FUNCTION = "tlb_remove_table_rcu"

#: Levels by the low bits of a batch's entries on powerpc: enum pgtable_index
#: (arch/powerpc/include/asm/book3s/64/pgtable.h). MAX_PGTABLE_INDEX_SIZE masks them.
_PPC_LEVELS = {0: 0, 1: 1, 2: 2}
_PPC_INDEX_MASK = 0xF

#: s390 before struct ptdesc: the low bits tell which half of the page is freed; 0 is a segment or
#: region table (page_table_free_rcu() in arch/s390/mm/pgalloc.c).
_S390_HALF_MASK = 0x3

#: kvfree_rcu() takes offsets of ``struct rcu_head`` below this (include/linux/rcupdate.h).
_LARGEST_OFFSET = 4096

#: Level of a table whose level is not told.
NO_LEVEL = -1


class Way(Enum):
    """What a table waits on."""

    #: An RCU callback, of its own or of a batch.
    RCU = "rcu"
    #: A batch that is still being filled, named by a ``struct mmu_gather`` on a kernel stack.
    GATHER = "gather"
    #: ``kernel_pgtable_work``.
    KERNEL_WORK = "kernel work"


@dataclass(frozen=True)
class PendingFree:
    """One callback, batch or list node that frees tables."""

    way: Way
    #: Of an RCU callback.
    segment: Segment | None
    #: Whose list or stack it is on; ``None`` for no CPU in particular.
    cpu: int | None
    #: The callback's function; empty without one.
    function: str
    #: Address of the ``struct rcu_head``, the batch, or the descriptor.
    address: int
    #: ``comm/pid`` of the task on whose stack it was found.
    task: str = ""
    #: Address of the ``struct mm_struct`` whose tables are gathered.
    mm: int | None = None


@dataclass(frozen=True)
class HeldTables:
    """What some ways account for, as the census asks for it."""

    #: uint64
    held_pfns: AddressArray
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Pending:
    """Every table that waits to be freed; arrays of the same length, in order of :attr:`frees`."""

    frees: tuple[PendingFree, ...]
    #: uint64, page frame of each table.
    pfns: npt.NDArray[np.uint64]
    #: uint64, physical address of each table.
    addresses: AddressArray
    #: int32, by table: index into :attr:`frees`.
    free: npt.NDArray[np.int32]
    #: int8, by table: level where the batch tells it, or :data:`NO_LEVEL`.
    level: npt.NDArray[np.int8]
    #: bool, by table: whether its page is typed.
    typed: BoolArray
    #: ``None`` if RCU's callbacks could not be read at all; *missing* says why.
    rcu: RcuCallbacks | None
    #: Whether this kernel gathers tables in batches of their own; else they go with other pages.
    batched: bool
    #: What could not be seen, in sentences.
    missing: tuple[str, ...]

    def table_counts(self) -> npt.NDArray[np.int64]:
        """Count the tables of each of :attr:`frees`."""
        return np.bincount(self.free, minlength=len(self.frees)).astype(np.int64)

    def held(self, way: Way) -> HeldTables:
        """
        Get what one way accounts for.

        What could not be seen is said with :attr:`Way.RCU`, so that it is said once.
        """
        ours = np.array([each.way is way for each in self.frees] or [False], np.bool_)
        missing = self.missing if way is Way.RCU else ()
        return HeldTables(self.pfns[ours[self.free]], missing)


def tables_are_batched(prog: Program) -> bool:
    """
    Tell whether tables that are unmapped go into batches of tables, which wait for RCU.

    x86 before 7.x decides while booting: only on some hypervisors, which
    ``pv_ops.mmu.tlb_remove_table`` shows (arch/x86/kernel/paravirt.c, kvm.c).

    :raises FaultError: if that cannot be read
    """
    try:
        prog.type("struct mmu_table_batch")
    except LookupError:
        return False
    try:
        function = prog["pv_ops"].mmu.tlb_remove_table.value_()
    except (LookupError, AttributeError):
        return True
    try:
        return bool(prog.symbol(function).name == "tlb_remove_table")
    except LookupError:
        return False


def tell_pending(pending: Pending, pfn: int) -> Iterator[Told]:
    """Say what the tables of a page wait for."""
    for number in np.unique(pending.free[pending.pfns == np.uint64(pfn)]).tolist():
        free = pending.frees[number]
        where = "" if free.cpu is None else f" on CPU {free.cpu}"
        if free.way is Way.GATHER:
            yield Told(f"in the batch at {free.address:#x} that {free.task} gathers{where}")
        elif free.way is Way.KERNEL_WORK:
            yield Told("waits on kernel_pgtable_work to be freed", "pt_list")
        else:
            stage = "" if free.segment is None else f" ({free.segment.value})"
            if free.function == _BATCH_FUNCTION:
                yield Told(f"in the batch at {free.address:#x} that waits for RCU{where}{stage}")
            else:
                told = f"waits for RCU{where}{stage}, then {free.function}()"
                yield Told(told, "pt_rcu_head")


def read_pending(prog: Program, tables: Tables, scan: MemmapScan) -> Pending:
    """
    Find the tables that wait to be freed.

    :param tables: Every space walked: tells which mms there are, and which tables are in use.
    """
    reader = _Reader(prog, tables, scan)
    stacks = kernel_stacks(prog)
    reader.missing.extend(stacks.missing)
    rcu = None
    try:
        rcu = rcu_callbacks(prog, stacks.stacks)
    except (FaultError, LookupError) as error:
        reader.missing.append(f"RCU's callbacks cannot be read: {error}")
    if rcu is not None:
        reader.missing.extend(rcu.missing)
        for callbacks in rcu.lists:
            reader.add_callbacks(callbacks)
    for stack in stacks.stacks:
        reader.add_gathers(stack)
    if rcu is not None:
        reader.add_invoked(rcu, stacks.stacks)
    reader.add_kernel_work()
    return reader.result(rcu)


class _Reader:
    def __init__(self, prog: Program, tables: Tables, scan: MemmapScan) -> None:
        self.prog = prog
        self.tables = tables
        self.scan = scan
        self.memmap = Memmap(prog)
        self.page_bytes = int(prog["PAGE_SIZE"].value_())
        self.direct_map = np.uint64(direct_map_offset(prog))
        assert prog.platform is not None
        self.arch = prog.platform.arch
        self.frees: list[PendingFree] = []
        self.pfns: list[npt.NDArray[np.uint64]] = []
        self.addresses: list[AddressArray] = []
        self.levels: list[npt.NDArray[np.int8]] = []
        self.counts: list[int] = []
        self.missing: list[str] = []
        self._batches: set[int] = set()
        self._names: dict[int, str] = {}
        self._batch_type()

    def _batch_type(self) -> None:
        """Learn where a batch keeps what; kernels that do not batch tables lack the type."""
        self.batch_tables = None
        try:
            batch = self.prog.type("struct mmu_table_batch")
            gather = self.prog.type("struct mmu_gather")
            self.batch_nr = offsetof(batch, "nr")
            self.batch_rcu = offsetof(batch, "rcu")
            self.rcu_function = offsetof(self.prog.type("struct callback_head"), "func")
            self.gather_mm = offsetof(gather, "mm")
            self.gather_batch = offsetof(gather, "batch")
            self.batch_tables = offsetof(batch, "tables")
        except LookupError:
            pass

    # Decoding -----------------------------------------------------------------------------------

    def _decode(
        self, values: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.uint64], AddressArray, npt.NDArray[np.int8], BoolArray]:
        """
        Tell which tables the entries of a batch name.

        An entry is the address of a descriptor or of the table itself, by architecture and version
        (__tlb_remove_table()); the two cannot be taken for each other, since the memory map does
        not describe itself. The table's address may carry what it is in its low bits.

        :return: page frames, physical addresses, levels, and whether there is such a page.
        """
        shift = np.uint64(self.page_bytes.bit_length() - 1)
        pfns, known = self.memmap.pfns(values)
        addresses = pfns << shift
        levels = np.full(len(values), NO_LEVEL, np.int8)
        mask = 0
        if self.arch == Architecture.PPC64:
            mask = _PPC_INDEX_MASK
        elif self.arch == Architecture.S390X:
            mask = _S390_HALF_MASK
        low = values & np.uint64(mask)
        physical = values - low - self.direct_map
        _, in_memory = self.memmap.pages_of(physical)
        smallest = min(level.table_bytes for level in self.tables.paging.levels)
        by_address = ~known & in_memory & (physical & np.uint64(smallest - 1) == 0)
        pfns = np.where(by_address, physical >> shift, pfns)
        addresses = np.where(by_address, physical, addresses)
        if self.arch == Architecture.PPC64:
            for index, level in _PPC_LEVELS.items():
                levels[by_address & (low == index)] = level
        elif self.arch == Architecture.S390X:
            levels[by_address & (low != 0)] = 0
        return pfns, addresses, levels, known | by_address

    def _covered(self, pfns: npt.NDArray[np.uint64]) -> BoolArray:
        """Whether the pages are typed."""
        typed: BoolArray = descriptor_indices(self.scan, pfns) >= 0
        return typed

    def _read_batch(self, address: int) -> tuple[int, npt.NDArray[np.uint64]] | None:
        """
        Read a batch: its number of tables, and the entries; none if the number is too large.

        :raises FaultError: if it cannot be read
        """
        if self.batch_tables is None:
            return None
        data = self.prog.read(address, self.page_bytes)
        order = byte_order(self.prog)
        number = int(np.frombuffer(data, f"{order}u4", 1, self.batch_nr)[0])
        most = (self.page_bytes - self.batch_tables) // 8
        if number > most:
            return number, np.empty(0, np.uint64)
        entries = np.frombuffer(data, f"{order}u8", number, self.batch_tables)
        return number, entries.astype(np.uint64)

    def _add(
        self,
        free: PendingFree,
        pfns: npt.NDArray[np.uint64],
        addresses: AddressArray,
        levels: npt.NDArray[np.int8],
    ) -> None:
        self.frees.append(free)
        self.pfns.append(pfns)
        self.addresses.append(addresses)
        self.levels.append(levels)
        self.counts.append(len(pfns))

    def _add_batch(self, free: PendingFree, address: int, what: str) -> None:
        """Take a batch that is surely one; what is wrong with it is missing."""
        if address in self._batches:
            return
        self._batches.add(address)
        try:
            read = self._read_batch(address)
        except FaultError:
            self.missing.append(f"{what} {address:#x} cannot be read")
            return
        if read is None:
            self.missing.append(f"{what} {address:#x}: this kernel has no type for it")
            return
        number, entries = read
        if number != len(entries):
            self.missing.append(
                f"{what} {address:#x} says that it has {number} tables, more than fit in a page"
            )
        pfns, addresses, levels, known = self._decode(entries)
        wrong = np.flatnonzero(~known)
        if len(wrong):
            self.missing.append(
                f"{what} {address:#x}: {len(wrong)} of its {number} tables name no page of memory "
                f"(the first is {int(entries[wrong[0]]):#x})"
            )
        self._add(free, pfns[known], addresses[known], levels[known])

    # RCU ----------------------------------------------------------------------------------------

    def _function(self, address: int) -> str:
        """
        Name a callback's function; empty if no symbol begins there.

        Compilers append to the names of local functions (".llvm.1234", ".isra.0").
        """
        if address not in self._names:
            try:
                symbol = self.prog.symbol(address)
                name = symbol.name.partition(".")[0] if symbol.address == address else ""
                inside = "" if name else f" (inside {symbol.name})"
            except LookupError:
                name, inside = "", ""
                try:
                    # Code of a module without symbols is code all the same.
                    self.prog.read(address, 1)
                    inside = "code"
                except FaultError:
                    pass
            # Tiny RCU of older kernels: an offset within an object to be freed, not a function
            # (kernel/rcu/tiny.c, rcu_reclaim_tiny()).
            is_offset = 0 < address < _LARGEST_OFFSET
            if not name and inside != "code" and not is_offset:
                self.missing.append(
                    f"an RCU callback's function is {address:#x}, where no function begins{inside}"
                )
            self._names[address] = name
        return self._names[address]

    def add_callbacks(self, callbacks: CallbackList) -> None:
        """Take those callbacks of a list that free tables."""
        for function in np.unique(callbacks.functions).tolist():
            name = self._function(function)
            if name not in (*_SINGLE_FUNCTIONS, _BATCH_FUNCTION):
                continue
            for head in callbacks.heads[callbacks.functions == np.uint64(function)].tolist():
                free = PendingFree(Way.RCU, callbacks.segment, callbacks.cpu, name, head)
                if name == _BATCH_FUNCTION:
                    self._add_batch(free, head - self.batch_rcu, "the batch at")
                else:
                    self._add_single(free, head)

    def _add_single(self, free: PendingFree, head: int) -> None:
        member = native_member_name(self.prog, "pt_rcu_head")
        address = head - offsetof(ptdesc_type(self.prog), member)
        pfns, known = self.memmap.pfns(np.array([address], np.uint64))
        if not known[0]:
            self.missing.append(
                f"{free.function}() is to free {address:#x}, which is no descriptor"
            )
            return
        shift = np.uint64(self.page_bytes.bit_length() - 1)
        # Only page tables are freed in this way (mm/khugepaged.c, mm/mmu_gather.c: any level).
        level = 0 if free.function == "pte_free_now" else NO_LEVEL
        self._add(free, pfns, pfns << shift, np.array([level], np.int8))

    # Stacks -------------------------------------------------------------------------------------

    def add_gathers(self, stack: KernelStack) -> None:
        """
        Find ``struct mmu_gather`` on a stack: a known mm's address beside a batch that makes sense.

        An abandoned one names no batch any more: flushing clears the pointer (tlb_table_flush()).
        """
        if self.batch_tables is None:
            return
        mms = {space.mm.address for space in self.tables.spaces if space.mm is not None}
        known = np.array(sorted(mms), np.uint64)
        distance = (self.gather_batch - self.gather_mm) // 8
        words = stack.words
        if len(words) <= distance or not len(known):
            return
        owners, batches = words[:-distance], words[distance:]
        likely = np.isin(owners, known) & (batches != 0)
        likely &= batches & np.uint64(self.page_bytes - 1) == 0
        for place in np.flatnonzero(likely).tolist():
            batch, mm = int(batches[place]), int(owners[place])
            if batch not in self._batches and self._plausible(batch):
                free = PendingFree(Way.GATHER, None, stack.cpu, "", batch, stack.owner, mm)
                self._add_batch(free, batch, "the batch at")

    def add_invoked(self, rcu: RcuCallbacks, stacks: tuple[KernelStack, ...]) -> None:
        """
        Find batches that are being freed: their callback is on no list any more.

        rcu_do_batch() clears the function before it calls it, so nothing marks the batch but the
        pointer to it. Taken as one is what has at least one table that is still typed and that no
        tree has.
        """
        for stack in stacks:
            if self.batch_tables is None or (stack.cpu is None or stack.cpu not in rcu.unlisted):
                continue
            words = np.unique(stack.words)
            words = words[words & np.uint64(self.page_bytes - 1) == 0]
            _, in_memory = self.memmap.pages_of(words - self.direct_map)
            for batch in words[in_memory].tolist():
                if batch in self._batches or not self._plausible(batch, in_use=True):
                    continue
                free = PendingFree(
                    Way.RCU, Segment.INVOKED, stack.cpu, _BATCH_FUNCTION, batch, stack.owner
                )
                self._add_batch(free, batch, "the batch at")
        for cpu, count in rcu.unlisted.items():
            found = any(x.segment is Segment.INVOKED and x.cpu in (cpu, None) for x in rcu.lists)
            if not found:
                self.missing.append(
                    f"CPU {cpu}: up to {count} RCU callbacks are being invoked, and the list of "
                    "them was not found on a stack"
                )

    def _plausible(self, batch: int, in_use: bool = False) -> bool:
        """Whether a page looks like a batch, all of whose entries name pages."""
        if not self._allocated(batch):
            return False
        try:
            read = self._read_batch(batch)
            if in_use and self.prog.read_word(batch + self.batch_rcu + self.rcu_function):
                return False
        except FaultError:
            return False
        if read is None or not len(read[1]):
            return False
        pfns, addresses, _, known = self._decode(read[1])
        if not known.all():
            return False
        if not in_use:
            return True
        return bool((self._covered(pfns) & ~np.isin(addresses, self.tables.address)).any())

    def _allocated(self, batch: int) -> bool:
        """
        Whether a page has the one reference that __get_free_page() gives.

        A stack may still name a batch that was freed, and the free page still list its tables.
        """
        physical = np.array([batch], np.uint64) - self.direct_map
        pfns = physical >> np.uint64(self.page_bytes.bit_length() - 1)
        pages, readable = read_descriptors(self.prog, self.scan, self.memmap, pfns)
        # What is missing from a dump is no reason to doubt.
        return not readable[0] or int(pages["__page_refcount"][0]) == 1

    # The kernel's own tables --------------------------------------------------------------------

    def add_kernel_work(self) -> None:
        """Take what waits on kernel_pgtable_work.list."""
        try:
            work = self.prog["kernel_pgtable_work"]
        except LookupError:
            return
        walk = walk_list(work.list.address_of_())
        if walk.broken is not None:
            self.missing.append(f"kernel_pgtable_work.list is broken: {walk.broken}")
        offset = offsetof(ptdesc_type(self.prog), native_member_name(self.prog, "pt_list"))
        nodes = np.array(walk.nodes, np.uint64) - np.uint64(offset)
        pfns, known = self.memmap.pfns(nodes)
        if not known.all():
            self.missing.append(
                f"kernel_pgtable_work.list: {int(np.count_nonzero(~known))} nodes are no descriptor"
            )
        shift = np.uint64(self.page_bytes.bit_length() - 1)
        for node, pfn in zip(nodes[known].tolist(), pfns[known].tolist()):
            one = np.array([pfn], np.uint64)
            free = PendingFree(Way.KERNEL_WORK, None, None, "", node)
            self._add(free, one, one << shift, np.array([NO_LEVEL], np.int8))

    def result(self, rcu: RcuCallbacks | None) -> Pending:
        empty = np.empty(0, np.uint64)
        try:
            batched = tables_are_batched(self.prog)
        except FaultError as error:
            batched = True
            self.missing.append(f"how tables are freed cannot be read: {error}")
        pfns = np.concatenate(self.pfns) if self.pfns else empty
        return Pending(
            frees=tuple(self.frees),
            pfns=pfns,
            addresses=np.concatenate(self.addresses) if self.addresses else empty,
            free=np.repeat(np.arange(len(self.frees), dtype=np.int32), self.counts),
            level=np.concatenate(self.levels) if self.levels else np.empty(0, np.int8),
            typed=self._covered(pfns),
            rcu=rcu,
            batched=batched,
            missing=tuple(self.missing),
        )
