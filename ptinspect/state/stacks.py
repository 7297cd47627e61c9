# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The words on kernel stacks: where the kernel keeps what it works on at the moment.

A word may be left over from a call that has returned. So it is a hint, and whoever takes it for a
pointer checks what it points to. What a CPU has in its registers is in the notes of ELF dumps only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from drgn import Architecture, FaultError, Object, Program, ProgramFlags, sizeof
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.percpu import per_cpu
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.sched import cpu_curr

from ptinspect.kernel.descriptor import byte_order
from ptinspect.memory import AddressArray
from ptinspect.target.elf import ElfError, read_elf

#: task_struct.__state (include/linux/sched.h): TASK_INTERRUPTIBLE, __TASK_STOPPED, __TASK_TRACED,
#: and TASK_NOLOAD, which idle kernel threads add to TASK_UNINTERRUPTIBLE. Who sleeps so is not in
#: the middle of freeing tables.
_AT_REST = 0x1 | 0x4 | 0x8 | 0x400

#: Type of the note of a CPU's registers (include/uapi/linux/elf.h).
_NT_PRSTATUS = 1

#: THREAD_SIZE of the 64-bit architectures (without KASAN), if the kernel does not tell.
_USUAL_STACK_BYTES = 16384

#: Where switch_to() leaves the stack pointer, by architecture: members of task_struct.
_SAVED_SP = {
    Architecture.X86_64: "thread.sp",
    Architecture.AARCH64: "thread.cpu_context.sp",
    Architecture.S390X: "thread.ksp",
    Architecture.PPC64: "thread.ksp",
    Architecture.RISCV64: "thread.sp",
}


@dataclass(frozen=True)
class KernelStack:
    """The words of one stack from the stack pointer (where it is known) on, or of registers."""

    #: ``comm/pid`` of the task, or what else the stack belongs to.
    owner: str
    #: The CPU that runs on it; ``None`` for a task that waits.
    cpu: int | None
    #: Address of the first word.
    address: int
    #: uint64, by address upwards.
    words: AddressArray
    #: Whether it is that of a CPU's idle task, of interrupts, or no stack: no task works on it.
    of_no_task: bool = False
    #: Whether its task sleeps so that it is not in the middle of taking a table out of a tree.
    at_rest: bool = False


@dataclass(frozen=True)
class KernelStacks:
    """The stacks that were read."""

    stacks: tuple[KernelStack, ...]
    #: What could not be read, in sentences.
    missing: tuple[str, ...]


def stack_bytes(prog: Program) -> int:
    """
    Get THREAD_SIZE.

    From ``union thread_union``, else from the linker's bounds of the first task's stack
    (INIT_TASK_DATA in include/asm-generic/vmlinux.lds.h; renamed in 6.9).
    """
    try:
        return int(sizeof(prog.type("union thread_union")))
    except LookupError:
        pass
    for start, end in (
        ("__start_init_stack", "__end_init_stack"),
        ("__start_init_task", "__end_init_task"),
    ):
        try:
            return int(prog.symbol(end).address - prog.symbol(start).address)
        except LookupError:
            pass
    return _USUAL_STACK_BYTES


def kernel_stacks(prog: Program, *, at_rest: bool = False) -> KernelStacks:
    """
    Read the kernel stacks of what runs, is about to run, or waits uninterruptibly.

    :param at_rest: Whether to read those of sleeping tasks too.
    """
    found: list[KernelStack] = []
    missing: list[str] = []
    size = stack_bytes(prog)
    running: dict[int, int] = {}
    for cpu in for_each_online_cpu(prog):
        try:
            task = cpu_curr(prog, cpu)
            running[task.value_()] = cpu
            idle = not task.pid
            for what, base, of_no_task in (
                (_task_name(task), task.stack.value_(), idle),
                *(("an interrupt stack", base, True) for base in _irq_stacks(prog, cpu, size)),
            ):
                words = _read_words(prog, base, size)
                if words is None:
                    missing.append(f"the stack that CPU {cpu} runs on cannot be read ({what})")
                else:
                    found.append(KernelStack(what, cpu, base & ~7, words, of_no_task))
        except (FaultError, LookupError) as error:
            missing.append(f"what CPU {cpu} runs cannot be read: {error}")
    found.extend(_saved_registers(prog, len(running)))
    try:
        for task in for_each_task(prog):
            if task.value_() in running:
                continue
            stack = _waiting_stack(prog, task, size, at_rest)
            if isinstance(stack, KernelStack):
                found.append(stack)
            elif stack is not None:
                missing.append(stack)
    except FaultError as error:
        missing.append(f"the list of tasks cannot be followed: {error}")
    return KernelStacks(tuple(found), tuple(missing))


def _saved_registers(prog: Program, cpus: int) -> Iterator[KernelStack]:
    """
    Get the words of the notes that hold each CPU's registers (NT_PRSTATUS), in an ELF dump.

    :param cpus: Online ones. With as many notes, they are in the order of the CPUs.
    """
    path = prog.core_dump_path
    if path is None or prog.flags & ProgramFlags.IS_LIVE:
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            elf = read_elf(descriptor)
            notes = [n.desc for n in elf.notes() if (n.name, n.type) == (b"CORE", _NT_PRSTATUS)]
        finally:
            os.close(descriptor)
    except (OSError, ElfError):
        return  # a dump of another format
    order = "<" if elf.little_endian else ">"
    for number, note in enumerate(notes):
        words = np.frombuffer(note, f"{order}u8", len(note) // 8).astype(np.uint64)
        cpu = number if len(notes) == cpus else None
        yield KernelStack("the registers", cpu, 0, words, True)


def _waiting_stack(
    prog: Program, task: Object, size: int, at_rest: bool
) -> KernelStack | str | None:
    """The stack of a task that is on no CPU; a sentence if it cannot be read."""
    try:
        rests = bool(task.member_("__state").value_() & _AT_REST)
        if rests and not at_rest:
            return None
        base = task.stack.value_()
        if not base:
            return None  # an exited task gave it back
        sp: Object = task
        assert prog.platform is not None
        for name in _SAVED_SP.get(prog.platform.arch, "stack").split("."):
            sp = sp.member_(name)
        start = sp.value_()
        if not base <= start < base + size:
            start = base
        words = _read_words(prog, start, base + size - start)
        if words is None:
            if task.exit_state or task.stack.value_() != base:
                return None  # it exited while it was read
            return f"the kernel stack of {_task_name(task)} cannot be read"
        return KernelStack(_task_name(task), None, start & ~7, words, at_rest=rests)
    except (FaultError, LookupError) as error:
        return f"the kernel stack of the task at {task.value_():#x} cannot be read: {error}"


def _task_name(task: Object) -> str:
    comm = task.comm.string_().decode("utf-8", "backslashreplace")
    return f"{comm}/{task.pid.value_()}"


def _irq_stacks(prog: Program, cpu: int, size: int) -> Iterator[int]:
    """
    Get the lowest addresses of the stacks on which a CPU runs interrupts and softirqs.

    x86: arch/x86/kernel/irq_64.c (a pointer to the last word), arm64 and riscv: irq_stack_ptr,
    powerpc: arch/powerpc/kernel/irq.c, s390: the lowcore (STACK_INIT_OFFSET from the end). Where
    there is none, softirqs run on the task's.
    """
    for read in (_x86_irq_stack, _plain_irq_stack, _ppc_irq_stacks, _s390_irq_stack):
        try:
            yield from (base for base in read(prog, cpu, size) if base)
        except LookupError:
            continue


def _x86_irq_stack(prog: Program, cpu: int, size: int) -> list[int]:
    try:
        top = per_cpu(prog["hardirq_stack_ptr"], cpu).value_()
    except LookupError:
        # Part of struct pcpu_hot from 6.2 to 6.14.
        top = per_cpu(prog["pcpu_hot"], cpu).hardirq_stack_ptr.value_()
    return [(top + 8) - size] if top else []


def _plain_irq_stack(prog: Program, cpu: int, size: int) -> list[int]:
    return [per_cpu(prog["irq_stack_ptr"], cpu).value_()]


def _ppc_irq_stacks(prog: Program, cpu: int, size: int) -> list[int]:
    return [prog[name][cpu].value_() for name in ("softirq_ctx", "hardirq_ctx")]


def _s390_irq_stack(prog: Program, cpu: int, size: int) -> list[int]:
    # The first frame's room is a few hundred bytes at most: stacks are aligned to their size.
    return [prog["lowcore_ptr"][cpu].async_stack.value_() // size * size]


def _read_words(prog: Program, address: int, size: int) -> AddressArray | None:
    """Read a stack; ``None`` if it cannot be read as a whole."""
    address &= ~7
    try:
        data = prog.read(address, size & ~7)
    except FaultError:
        return None
    return np.frombuffer(data, f"{byte_order(prog)}u8").astype(np.uint64)
