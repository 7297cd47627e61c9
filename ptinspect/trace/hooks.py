# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which hooks a kernel gets: for each thing to be seen the newest name, or a sentence why not."""

from __future__ import annotations

from dataclasses import dataclass

from ptinspect.errors import TargetError
from ptinspect.trace import offers as names
from ptinspect.trace.offers import KernelOffers

#: Levels as the script numbers them; 0 is a level that is not known.
LEVELS = ("?", "PTE", "PMD", "PUD", "P4D", "PGD")

#: Ways of being freed as the script numbers them; 0 is not used.
WAYS = ("?", "immediate", "gather", "gather+RCU", "deferred", "kernel-async")


@dataclass(frozen=True)
class Hook:
    """A function and the parameters that the script reads, by name and position."""

    function: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class LevelHook:
    """A function that makes or unlinks tables of one level (its number in :data:`LEVELS`)."""

    hook: Hook
    level: int
    #: Position of the ``struct mm_struct *``; ``None`` if the tables are the kernel's.
    mm: int | None


@dataclass(frozen=True)
class Hooks:
    """The hooks of one kernel."""

    #: (page or folio, which counter, change): each counted constructor and destructor.
    stat: Hook
    counter: int  #: the value of NR_PAGETABLE
    allocators: tuple[LevelHook, ...]
    unlinkers: tuple[LevelHook, ...]
    gather: Hook | None
    batch_release: Hook | None
    defer: Hook | None
    kernel_defer: Hook | None
    exit: Hook | None
    #: Whether the allocator's tracepoint for freed pages is there.
    release: bool
    #: Whether :attr:`gather` and :attr:`defer` may be given a table's address instead of its page.
    addresses: bool
    #: Whether functions are hooked by trampolines (fentry, fexit) or by kprobes.
    trampolines: bool
    #: What cannot be seen on this kernel, and why.
    missing: tuple[str, ...]


def choose_hooks(offers: KernelOffers, *, kprobes: bool = False) -> Hooks:
    """
    Choose the hooks of a kernel.

    :param kprobes: use kprobes even where there are trampolines
    :raises TargetError: if the kernel lacks what nothing can replace, naming it
    """
    missing: list[str] = []

    def hook(function: str, parameters: int) -> Hook | None:
        found = offers.traceable.get(function)
        if found is None or len(found) < parameters:
            return None
        return Hook(function, found)

    def why(function: str) -> str:
        return f"{function} cannot be traced" if function in offers.hidden else f"no {function}"

    stat = next((h for h in (hook(n, 3) for n in names.STAT_HOOKS) if h is not None), None)
    if stat is None:
        raise TargetError(
            "this kernel has no hook that sees page tables being counted: it offers none of "
            + ", ".join(names.STAT_HOOKS)
        )
    if "NR_PAGETABLE" not in offers.enumerators:
        raise TargetError("this kernel's BTF has no NR_PAGETABLE: page tables cannot be told apart")

    allocators: list[LevelHook] = []
    for level, candidates in (("PTE", names.PTE_ALLOCATORS), *names.OTHER_ALLOCATORS.items()):
        found = next((h for h in (hook(n, 1) for n in candidates) if h is not None), None)
        if found is None:
            reasons = ", ".join(why(n) for n in candidates)
            missing.append(f"{level} tables are counted as of unknown level when made: {reasons}")
        else:
            allocators.append(LevelHook(found, LEVELS.index(level), 0))
    kernel = hook(names.KERNEL_PTE_ALLOCATOR, 0)
    if kernel is None:
        missing.append(
            "the kernel's PTE tables may be of unknown level when made: "
            + why(names.KERNEL_PTE_ALLOCATOR)
        )
    else:
        allocators.append(LevelHook(kernel, LEVELS.index("PTE"), None))

    upgrade = hook(names.UPGRADE, 1)
    if upgrade is not None:
        allocators.append(LevelHook(upgrade, LEVELS.index("PGD"), 0))

    unlinkers = []
    for level, function in names.UNLINKERS.items():
        found = hook(function, 1)
        if found is not None:
            unlinkers.append(LevelHook(found, LEVELS.index(level), None))
    if len(unlinkers) < len(names.UNLINKERS):
        absent = [n for n in names.UNLINKERS.values() if hook(n, 1) is None]
        missing.append(
            "the level of a freed table is known only if it was made during the trace: "
            + ", ".join(map(why, absent))
        )
    root = hook(names.ROOT_FREE, 2)
    if root is not None:
        unlinkers.append(LevelHook(root, LEVELS.index("PGD"), None))

    gather, batch = hook(names.GATHER, 2), hook(names.BATCH_RELEASE, 1)
    if gather is None:
        missing.append(f"tables freed through RCU are not told apart: {why(names.GATHER)}")
    if batch is None or "nr" not in offers.structs.get("mmu_table_batch", ()):
        batch = None
        missing.append(f"RCU batches are not counted a second time: {why(names.BATCH_RELEASE)}")
    defer = hook(names.DEFER, 2)
    if defer is None:
        # 6.1 lacks it, and frees nothing that way.
        missing.append(f"deferred frees of huge-page code are not told apart: {why(names.DEFER)}")
    kernel_defer = hook(names.KERNEL_DEFER, 1)
    if kernel_defer is None:
        # 7.2 has it (CONFIG_ASYNC_KERNEL_PGTABLE_FREE), 6.12 frees nothing that way.
        missing.append(
            f"asynchronous frees of kernel tables are not told apart: {why(names.KERNEL_DEFER)}"
        )
    ending = hook(names.EXIT, 1)
    if ending is None:
        missing.append(f"tables that outlive their mm are not found: {why(names.EXIT)}")
    release = names.RELEASE_TRACEPOINT in offers.tracepoints
    if not release:
        missing.append(
            f"ways of freeing and waits are not seen: no tracepoint {names.RELEASE_TRACEPOINT}"
        )
    addresses = offers.machine == "s390x"
    if addresses and "vmemmap" not in offers.symbols:
        addresses = False
        missing.append("tables given by address are not followed: no symbol vmemmap")
    return Hooks(
        stat=stat,
        counter=offers.enumerators["NR_PAGETABLE"],
        allocators=tuple(allocators),
        unlinkers=tuple(unlinkers),
        gather=gather,
        batch_release=batch,
        defer=defer,
        kernel_defer=kernel_defer,
        exit=ending,
        release=release,
        addresses=addresses,
        trampolines=offers.compiles and not kprobes,
        missing=tuple(missing),
    )
