# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where address spaces are found, on a kernel that consists of a few structures."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from inspect import signature

import numpy as np
import pytest
from drgn import Object, Program, TypeMember
from mock_kernel import FIRST_PFN, MEMMAP, PAGE_BYTES, MockKernel
from synthetic_memory import SparseMemory

from ptinspect.kernel.paging.model import Root
from ptinspect.kernel.paging.x86_64 import X86Paging, make_paging
from ptinspect.tables import spaces as spaces_module
from ptinspect.tables.spaces import Found, SpaceKind, SpaceList, find_spaces

DIRECT = 0xFFFF_8880_0000_0000

MM = {"mm_count": 0, "pgd": 8, "mm_users": 16, "pgtables_bytes": 24, "mmlist": 32, "ldt": 48}
TASK = {"flags": 0, "tasks": 8, "tgid": 24, "mm": 32, "active_mm": 40, "comm": 48}
TASK.update(signal=64, thread_node=72)
KTHREAD = 0x00200000
PGD_LIST, INIT_TASK, INIT_MM, MM_CACHEP = (DIRECT + 0x1000 * n for n in range(1, 5))


@dataclass(frozen=True)
class MockPaging(X86Paging):
    """x86_64 whose direct map and kernel image are one."""

    def virtual_to_physical(self, prog: Program, address: int) -> int:
        return address - DIRECT

    def kernel_root(self, prog: Program) -> Root:
        return self.whole_root(prog, prog["init_mm"].pgd.value_() - DIRECT)


class Kernel:
    def __init__(self, isolated: bool = False) -> None:
        self.mock = MockKernel("7.3")
        self.prog = self.mock.prog
        self.memory = SparseMemory()
        self.prog.add_memory_segment(
            DIRECT, 1 << 30, lambda address, count, offset, physical: self.read(offset, count)
        )
        self._make_types()
        paging = make_paging(five_levels=False, isolated=isolated)
        fields = {name: getattr(paging, name) for name in signature(MockPaging).parameters}
        self.prog.cache["ptinspect.paging"] = MockPaging(**fields)
        self.tasks: list[int] = []
        self.pgds: list[int] = []
        self.mm(INIT_MM, 0x9000)
        self.task(INIT_TASK, 0, "swapper", 0)

    def read(self, offset: int, count: int) -> bytes:
        return self.memory.read(offset, count)

    def put(self, address: int, *values: int) -> None:
        data = b"".join(struct.pack("<Q", value) for value in values)
        self.memory.add(address - DIRECT, len(data))
        self.memory.write(address - DIRECT, data)

    def _make_types(self) -> None:
        prog, mock = self.prog, self.mock
        ulong = mock.ulong
        int_ = prog.int_type("int", 4, True)
        char = prog.int_type("char", 1, True)
        list_head = mock.types["list_head"]
        pointer = prog.pointer_type(prog.void_type())
        atomic = prog.struct_type(None, 8, [TypeMember(prog.int_type("long", 8, True), "counter")])
        context = prog.struct_type(None, 8, [TypeMember(pointer, "ldt")])
        members = {"mm_count": atomic, "pgd": pointer, "mm_users": atomic}
        members.update(pgtables_bytes=atomic, mmlist=list_head, context=context)
        offsets = dict(MM, context=MM["ldt"])
        mm = mock._struct(
            "mm_struct", 64, [TypeMember(t, n, 8 * offsets[n]) for n, t in members.items()]
        )
        mm_pointer = prog.pointer_type(mm)
        types = {
            "flags": mock.uint,
            "tasks": list_head,
            "tgid": int_,
            "mm": mm_pointer,
            "active_mm": mm_pointer,
            "comm": prog.array_type(char, 16),
            "signal": pointer,
            "thread_node": list_head,
        }
        task = mock._struct(
            "task_struct", 96, [TypeMember(t, n, 8 * TASK[n]) for n, t in types.items()]
        )
        mock._struct("signal_struct", 32, [TypeMember(list_head, "thread_head", 8 * 8)])
        self.set("init_mm", Object(prog, mm, address=INIT_MM))
        self.set("init_task", Object(prog, task, address=INIT_TASK))
        self.set("pgd_list", Object(prog, list_head, address=PGD_LIST))
        self.mm_pointer = mm_pointer
        self.ulong = ulong

    def set(self, name: str, value: Object) -> None:
        self.mock.constants[name] = value

    def mm(
        self, address: int, pgd: int, *, count: int = 1, ldt: int = 0, stale: bool = False
    ) -> int:
        mmlist = address + MM["mmlist"] + (0x800 if stale else 0)
        self.put(address, count, DIRECT + pgd, 1, 8192, mmlist, mmlist, ldt)
        return address

    def task(
        self, address: int, pid: int, comm: str, mm: int, *, active: int = 0, flags: int = 0
    ) -> int:
        self.put(address, flags, 0, 0, pid, mm, active or mm)
        name = comm.encode().ljust(16, b"\0")
        self.put(address + TASK["comm"], *struct.unpack("<QQ", name))
        self.put(address + TASK["signal"], 0, 0, 0)
        self.tasks.append(address)
        self._ring([task + TASK["tasks"] for task in self.tasks])
        return address

    def pgd(self, pfn: int, mm: int) -> None:
        page = MEMMAP + (pfn - FIRST_PFN) * PAGE_BYTES
        self.pgds.append(page + 8)
        self.mock.put(pfn, 32, mm, 8)
        self._ring([PGD_LIST, *self.pgds])

    def _ring(self, nodes: list[int]) -> None:
        for n, node in enumerate(nodes):
            next_, prev = nodes[(n + 1) % len(nodes)], nodes[n - 1]
            if node >= MEMMAP:
                pfn, offset = divmod(node - MEMMAP, PAGE_BYTES)
                self.mock.put(FIRST_PFN + pfn, offset, next_, 8)
                self.mock.put(FIRST_PFN + pfn, offset + 8, prev, 8)
            else:
                self.put(node, next_, prev)

    def find(self, **options: bool) -> SpaceList:
        options.setdefault("slab", False)
        return find_spaces(self.prog, **options)


@pytest.fixture
def kernel() -> Kernel:
    kernel = Kernel()
    kernel.put(PGD_LIST, PGD_LIST, PGD_LIST)
    return kernel


def test_kernel_comes_first(kernel: Kernel) -> None:
    found = kernel.find()
    assert found.notes == ()
    (space,) = found.spaces
    assert space.kind is SpaceKind.KERNEL
    assert space.root == Root(0x9000, 3, ((0, 512),))
    assert found.kernel is space
    assert space.name == "kernel"


def test_processes_of_one_mm_are_one_space(kernel: Kernel) -> None:
    mm = kernel.mm(DIRECT + 0x20000, 0x21000)
    kernel.task(DIRECT + 0x30000, 7, "parent", mm)
    kernel.task(DIRECT + 0x31000, 5, "child", mm)
    found = kernel.find()
    space = found.of_pid(7)
    assert space is not None
    assert space is found.of_pid(5)
    assert [(task.pid, task.comm) for task in space.tasks] == [(5, "child"), (7, "parent")]
    assert space.root == Root(0x21000, 3, ((0, 256),))
    assert space.found == (Found.TASK,)
    assert space.mm is not None
    assert (space.mm.users, space.mm.count, space.mm.pgtables_bytes) == (1, 1, 8192)
    assert found.of_pid(8) is None


def test_mm_that_only_a_lazy_thread_has(kernel: Kernel) -> None:
    mm = kernel.mm(DIRECT + 0x20000, 0x21000)
    kernel.task(DIRECT + 0x30000, 9, "kworker", 0, active=mm, flags=KTHREAD)
    (_, space) = kernel.find().spaces
    assert space.found == (Found.ACTIVE_MM,)
    assert space.tasks == ()


def test_process_whose_leader_is_dead(kernel: Kernel) -> None:
    mm = kernel.mm(DIRECT + 0x20000, 0x21000)
    leader = kernel.task(DIRECT + 0x30000, 9, "zombie", 0)
    signal = DIRECT + 0x50000
    kernel.put(leader + TASK["signal"], signal)
    thread = DIRECT + 0x51000
    kernel.put(thread + TASK["mm"], mm)
    head, nodes = signal + 8, [leader + TASK["thread_node"], thread + TASK["thread_node"]]
    kernel._ring([head, *nodes])
    space = kernel.find().of_pid(9)
    assert space is not None
    assert space.mm is not None
    assert space.mm.address == mm


def test_mms_of_pgd_list(kernel: Kernel) -> None:
    mm = kernel.mm(DIRECT + 0x20000, 0x21000)
    kernel.task(DIRECT + 0x30000, 7, "both", mm)
    other = kernel.mm(DIRECT + 0x22000, 0x23000)
    kernel.pgd(FIRST_PFN + 3, mm)
    kernel.pgd(FIRST_PFN + 5, other)
    found = kernel.find()
    assert found.notes == ()
    both, lone = found.of_mm(mm), found.of_mm(other)
    assert both is not None
    assert lone is not None
    assert both.found == (Found.TASK, Found.PGD_LIST)
    assert lone.found == (Found.PGD_LIST,)
    assert lone.name == f"mm {other:#x}"


def test_broken_lists_leave_notes_and_what_came_before(kernel: Kernel) -> None:
    first = kernel.mm(DIRECT + 0x20000, 0x21000)
    second = kernel.mm(DIRECT + 0x22000, 0x23000)
    third = kernel.mm(DIRECT + 0x26000, 0x27000)
    kernel.pgd(FIRST_PFN + 3, first)
    kernel.pgd(FIRST_PFN + 5, second)
    kernel.pgd(FIRST_PFN + 7, third)
    # On from the first, and back from the last: the one between is lost.
    kernel.mock.put(FIRST_PFN + 3, 8, 0xDEAD000000000100, 8)
    kernel.mock.put(FIRST_PFN + 7, 16, 0xDEAD000000000122, 8)
    mm = kernel.mm(DIRECT + 0x24000, 0x25000)
    kernel.task(DIRECT + 0x30000, 7, "seen", mm)
    kernel.put(DIRECT + 0x30000 + TASK["tasks"], 0)
    found = kernel.find()
    assert {note.source for note in found.notes} == {"tasks", "pgd_list"}
    assert found.of_mm(first) is not None
    assert found.of_mm(second) is None
    assert found.of_mm(third) is not None
    assert found.of_pid(7) is not None


def test_unreadable_mm_and_freed_mm(kernel: Kernel) -> None:
    kernel.task(DIRECT + 0x30000, 7, "lost", DIRECT + 0x900000)
    gone = kernel.mm(DIRECT + 0x20000, 0x21000, count=0)
    kernel.task(DIRECT + 0x31000, 8, "gone", gone)
    found = kernel.find()
    assert len(found.spaces) == 1
    assert "0xffff888000900000 cannot be read" in found.notes[0].message


def test_missing_kernel_structures_are_noted_one_by_one(kernel: Kernel) -> None:
    del kernel.mock.constants["init_mm"]
    del kernel.mock.constants["init_task"]
    found = kernel.find()
    assert [note.source for note in found.notes] == ["init_mm", "tasks"]
    assert found.kernel is None


def test_mms_of_the_slab_cache(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.set("mm_cachep", Object(kernel.prog, kernel.mm_pointer, 0x1234))
    good = kernel.mm(DIRECT + 0x20000, 0x21000)
    freed = kernel.mm(DIRECT + 0x22000, 0x23000, count=0)
    never = kernel.mm(DIRECT + 0x24000, 0x25000, stale=True)
    no_pgd = kernel.mm(DIRECT + 0x26000, -DIRECT)
    lost = DIRECT + 0x900000
    # On the list of mms with swapped pages, which begins at init_mm.
    listed = kernel.mm(DIRECT + 0x28000, 0x29000)
    kernel._ring([INIT_MM + MM["mmlist"], listed + MM["mmlist"]])
    addresses = np.array([lost, good, freed, never, no_pgd, listed], np.uint64)
    monkeypatch.setattr(spaces_module, "slab_objects", lambda prog, cache: addresses)
    found = kernel.find(slab=True)
    users = [space for space in found.spaces if space.kind is SpaceKind.USER]
    assert [space.mm and space.mm.address for space in users] == [good, listed]
    assert all(space.found == (Found.SLAB,) for space in users)


def test_mm_of_a_kernel_variable(kernel: Kernel) -> None:
    mm = kernel.mm(DIRECT + 0x20000, 0x21000)
    kernel.set("text_poke_mm", Object(kernel.prog, kernel.mm_pointer, mm))
    (_, space) = kernel.find().spaces
    assert space.found == (Found.SYMBOL,)
    assert space.name == "text_poke_mm"


def test_efi_mm(kernel: Kernel) -> None:
    address = kernel.mm(DIRECT + 0x20000, 0x21000)
    type_ = kernel.mock.types["mm_struct"]
    kernel.set("efi_mm", Object(kernel.prog, type_, address=address))
    kernel.pgd(FIRST_PFN + 3, address)
    (_, space) = kernel.find().spaces
    assert space.kind is SpaceKind.EFI
    assert space.kernel
    assert space.root == Root(0x21000, 3, ((0, 512),))
    # Without EFI the variable is there, and its pgd is NULL.
    kernel.put(address + MM["pgd"], 0)
    assert len(Kernel.find(kernel).spaces) == 1


def test_second_roots_of_isolation() -> None:
    kernel = Kernel(isolated=True)
    kernel.put(PGD_LIST, PGD_LIST, PGD_LIST)
    mm = kernel.mm(DIRECT + 0x20000, 0x22000, ldt=1)
    kernel.task(DIRECT + 0x30000, 7, "ldt", mm)
    found = kernel.find()
    kinds = [(s.kind, s.root.address) for s in found.spaces]
    assert kinds == [
        (SpaceKind.KERNEL, 0x9000),
        (SpaceKind.ISOLATED, 0x9000 | 0x1000),
        (SpaceKind.USER, 0x22000),
        (SpaceKind.ISOLATED, 0x23000),
    ]
    space = found.of_mm(mm)
    assert space is not None
    assert space.root.entries == ((0, 256), (272, 273))
    assert found.spaces[3].name == "ldt/7 (kpti)"
    assert len(kernel.find(isolated=False).spaces) == 2


def test_s390_roots_come_from_the_asce() -> None:
    from ptinspect.kernel.paging import MmFields, s390x

    paging = s390x.make_paging(present_bits=True)
    prog = Kernel().prog
    fields = MmFields(0, 0, 0x7_4000 | 0x7, False)
    assert paging.user_root(prog, fields) == Root(0x7_4000, 2, ((0, 2048),))


def test_roots_of_s390_that_hold_anything_yet() -> None:
    """A copy has its parent's ASCE, a new mm none, until its root is filled."""
    pgd = np.array([0x10000, 0x14000, 0x18000, 0x1C000, 0x20000, 0x24000], np.uint64)
    asce = np.array([0x10007, 0x10007, 0x7, 0x1C007, 0x28007, 0x14007], np.uint64)
    asce[2] = 0
    owned = np.array([True, False, False, False, False, True])
    # The parent; its copy; one that is made from nothing; one without a task; a wrong ASCE; a
    # process with another's ASCE: those are for s390-asce-root.
    found = spaces_module.unfinished_roots(asce, pgd, owned)
    assert found.tolist() == [False, True, True, False, False, False]
