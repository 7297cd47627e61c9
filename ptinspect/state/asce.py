# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
s390: address-space-control elements (ASCEs): which root table each mm and each CPU names.

An mm keeps its ASCE beside pgd and the size of its address space (mm->context.asce, asce_limit);
crst_table_upgrade() puts a new root on top of the old and changes all three. A CPU has the
kernel's ASCE and that of the mm it runs, or lazily borrows, in its lowcore.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from drgn import Architecture, FaultError, Object, Program, TypeKind
from drgn.helpers.linux.sched import cpu_curr

from ptinspect.kernel.direct_map import virtual_to_physical
from ptinspect.kernel.paging import paging_of
from ptinspect.kernel.paging.model import object_or_none
from ptinspect.kernel.paging.s390x import S390Paging
from ptinspect.state.fields import architecture
from ptinspect.tables.spaces import Space, SpaceKind

_ORIGIN = (1 << 64) - 1 & ~0xFFF
_TYPE_SHIFT, _TYPE_MASK, _LENGTH = 2, 3, 3

#: asce_limit to the level of the root (init_new_context(), arch/s390/include/asm/mmu_context.h).
_LEVEL_OF_LIMIT = {
    1 << 31: 1,
    1 << 42: 2,
    1 << 53: 3,
    (1 << 64) - 4096: 4,
}


@dataclass(frozen=True)
class Asce:
    """One ASCE and where it is kept."""

    #: ``mm``, ``kernel`` (a CPU's own space) or ``user`` (what user mode on that CPU has).
    kind: str
    #: The address space, or the CPU.
    name: str
    value: int
    #: The kernel's name of the root table's level; ``None`` if it designates no table.
    level: str | None
    #: Size of the address space by ``asce_limit``; ``None`` for CPUs.
    limit: int | None
    #: Physical address of mm->pgd; ``None`` for CPUs.
    pgd: int | None
    #: What it disagrees with, in words.
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Asces:
    """The ASCEs of a target."""

    asces: tuple[Asce, ...]
    #: Why there are none, or ``None`` if there are.
    absent: str | None
    missing: tuple[str, ...] = ()


def read_asces(prog: Program, spaces: Sequence[Space]) -> Asces:
    """
    Read every ASCE and compare it with what it has to agree with.

    :param spaces: Those of the mms are taken.
    """
    if architecture(prog) != Architecture.S390X:
        return Asces((), "only s390 has address-space-control elements")
    missing: list[str] = []
    found = list(_of_mms(prog, spaces, missing))
    found.extend(_of_cpus(prog, missing))
    return Asces(tuple(found), None, tuple(missing))


def _level(prog: Program, asce: int) -> str | None:
    paging = paging_of(prog)
    assert isinstance(paging, S390Paging)
    try:
        return paging.levels[paging.root_of_asce(asce).level].name
    except ValueError:
        return None


def _of_mms(prog: Program, spaces: Sequence[Space], missing: list[str]) -> Iterator[Asce]:
    for space in spaces:
        if space.kind not in (SpaceKind.USER, SpaceKind.KERNEL) or space.mm is None:
            continue
        try:
            mm = space.mm.object(prog)
            value = int(mm.context.asce.value_())
            limit = int(mm.context.asce_limit.value_())
            pgd = int(mm.pgd.value_())
        except FaultError as error:
            missing.append(f"the ASCE of {space.name} cannot be read: {error}")
            continue
        kernel = space.kind is SpaceKind.KERNEL
        # init_mm.pgd lies in the kernel's image, not in the direct map.
        root = paging_of(prog).virtual_to_physical(prog, pgd) if kernel else None
        root = virtual_to_physical(prog, pgd) if root is None else root
        # The kernel's address space has no limit that changes.
        problems = tuple(_of_mm(value, None if kernel else limit, root))
        yield Asce("mm", space.name, value, _level(prog, value), limit or None, root, problems)


def _of_mm(value: int, limit: int | None, pgd: int) -> Iterator[str]:
    if value & _ORIGIN != pgd:
        yield f"it names the table at {value & _ORIGIN:#x}, but pgd is at {pgd:#x}"
    if value & _LENGTH != _LENGTH:
        yield f"its table length is {value & _LENGTH} instead of {_LENGTH}"
    if limit is None:
        return
    level = 1 + (value >> _TYPE_SHIFT & _TYPE_MASK)
    expected = _LEVEL_OF_LIMIT.get(limit)
    if expected is None:
        yield f"asce_limit {limit:#x} is the size of no address space"
    elif level != expected:
        yield f"its root has level {level}, but asce_limit {limit:#x} needs {expected}"


def _of_cpus(prog: Program, missing: list[str]) -> Iterator[Asce]:
    pointers = object_or_none(prog, "lowcore_ptr")
    if pointers is None:
        missing.append("this kernel has no lowcore_ptr: the CPUs' ASCEs are not known")
        return
    invalid = _word(prog["s390_invalid_asce"])
    kernel = int(prog["init_mm"].context.asce.value_())
    for cpu in range(pointers.type_.length or 0):
        lowcore = pointers[cpu].read_()
        if not lowcore:
            continue
        try:
            mine, user = _word(lowcore.kernel_asce), _word(lowcore.user_asce)
            expected = _user_asce(cpu_curr(prog, cpu), invalid)
        except FaultError as error:
            missing.append(f"the lowcore of CPU {cpu} cannot be read: {error}")
            continue
        name = f"cpu {cpu}"
        text = f"init_mm has {kernel:#x}"
        problems = (text,) if mine != kernel else ()
        yield Asce("kernel", name, mine, _level(prog, mine), None, None, problems)
        text = f"the mm that it runs or borrows has {expected:#x}"
        problems = (text,) if user != expected else ()
        level = None if user == invalid else _level(prog, user)
        yield Asce("user", name, user, level, None, None, problems)


def _user_asce(task: Object, invalid: int) -> int:
    """Get the ASCE that user mode has while a task runs (switch_mm_irqs_off())."""
    mm = task.active_mm.read_()
    if not mm or mm == task.prog_["init_mm"].address_of_():
        return invalid
    return int(mm.context.asce.value_())


def _word(asce: Object) -> int:
    """Get an ASCE that is a plain word or, since 6.7, a ``struct ctlreg``."""
    whole = asce.type_.unaliased_kind() == TypeKind.STRUCT
    return int((asce.val if whole else asce).value_())
