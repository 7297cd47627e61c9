# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What this machine's kernel offers to a tracer: functions, their parameters, a few types.

A function of which BTF knows cannot always be traced (inlined, or marked notrace); tracefs says
which can. Both are asked, so that a hook that is not there is known before anything is attached.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptinspect.errors import TargetError, UsageError
from ptinspect.trace.btf import read_btf

BTF = Path("/sys/kernel/btf/vmlinux")
TRACEFS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
KALLSYMS = Path("/proc/kallsyms")
#: Only there if the kernel has a BPF compiler (net/core/sysctl_net_core.c).
JIT = Path("/proc/sys/net/core/bpf_jit_enable")

#: The newest name first: the hook that is chosen is the first that a kernel has.
STAT_HOOKS = (
    "lruvec_stat_mod_folio",  # mm/memcontrol.c in 7.2; an inline wrapper of the next in 6.12
    "__lruvec_stat_mod_folio",  # 6.12
    "__mod_lruvec_page_state",  # 6.1
)
PTE_ALLOCATORS = (
    "pte_alloc_one",  # x86: arch/x86/mm/pgtable.c; elsewhere inlined into __pte_alloc
    "page_table_alloc_noprof",  # s390 with allocation profiling: arch/s390/mm/pgalloc.c
    "page_table_alloc",  # s390
    "__pte_alloc",  # mm/memory.c, everywhere; misses tables made beside it
)
OTHER_ALLOCATORS = {
    "PMD": ("__pmd_alloc",),
    "PUD": ("__pud_alloc",),
    "P4D": ("__p4d_alloc",),
    "PGD": ("pgd_alloc", "mm_init"),  # s390 inlines pgd_alloc into mm_init
}
KERNEL_PTE_ALLOCATOR = "__pte_alloc_kernel"
UPGRADE = "crst_table_upgrade"  # s390: makes a new root, of one level more
UNLINKERS = {
    "PTE": "___pte_free_tlb",
    "PMD": "___pmd_free_tlb",
    "PUD": "___pud_free_tlb",
    "P4D": "___p4d_free_tlb",
}
ROOT_FREE = "pgd_free"
GATHER = "tlb_remove_table"
BATCH_RELEASE = "tlb_remove_table_rcu"
DEFER = "pte_free_defer"
KERNEL_DEFER = "pagetable_free_kernel"
EXIT = "exit_mmap"
RELEASE_TRACEPOINT = "kmem:mm_page_free"

_FUNCTIONS = (
    *STAT_HOOKS,
    *PTE_ALLOCATORS,
    *(name for names in OTHER_ALLOCATORS.values() for name in names),
    KERNEL_PTE_ALLOCATOR,
    UPGRADE,
    *UNLINKERS.values(),
    ROOT_FREE,
    GATHER,
    BATCH_RELEASE,
    DEFER,
    KERNEL_DEFER,
    EXIT,
)
_STRUCTS = ("mmu_table_batch", "vm_layout")
_ENUMERATORS = ("NR_PAGETABLE",)
_SYMBOLS = ("vmemmap", "vm_layout")

SCHEMA = "ptinspect-trace-offers/1"


@dataclass(frozen=True)
class KernelOffers:
    """What one kernel offers, as far as the script asks for it."""

    release: str
    machine: str  #: as ``uname -m`` says
    #: Functions that can be traced, with the names of their parameters.
    traceable: dict[str, tuple[str, ...]]
    #: Functions that BTF knows and tracefs does not offer.
    hidden: tuple[str, ...]
    #: Members of structures.
    structs: dict[str, tuple[str, ...]]
    enumerators: dict[str, int]
    #: Symbols of data.
    symbols: tuple[str, ...]
    tracepoints: tuple[str, ...]
    #: Whether BPF programs are compiled: without, there are no trampolines (fentry, fexit).
    compiles: bool

    def to_json(self) -> str:
        """Write the offers down, for a bug report or a test."""
        return json.dumps({"schema": SCHEMA, **self.__dict__}, indent=2, sort_keys=True) + "\n"


def offers_from_json(text: str) -> KernelOffers:
    """
    Read what :meth:`KernelOffers.to_json` wrote.

    :raises UsageError: if it is something else
    """
    try:
        data: dict[str, Any] = json.loads(text)
        if data.pop("schema") != SCHEMA:
            raise ValueError(f"not {SCHEMA}")
        return KernelOffers(
            release=str(data["release"]),
            machine=str(data["machine"]),
            traceable={str(k): tuple(map(str, v)) for k, v in data["traceable"].items()},
            hidden=tuple(map(str, data["hidden"])),
            structs={str(k): tuple(map(str, v)) for k, v in data["structs"].items()},
            enumerators={str(k): int(v) for k, v in data["enumerators"].items()},
            symbols=tuple(map(str, data["symbols"])),
            tracepoints=tuple(map(str, data["tracepoints"])),
            compiles=bool(data["compiles"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"these are no recorded offers of a kernel: {error}") from error


def read_offers(root: Path = Path("/")) -> KernelOffers:
    """
    Ask the running kernel.

    :param root: where /proc and /sys are; for tests
    :raises TargetError: if there is no BTF or no tracefs, or they cannot be read
    """

    def at(path: Path) -> Path:
        return root / path.relative_to("/")

    btf = at(BTF)
    if not btf.exists():
        raise TargetError("trace needs the kernel's BTF, and there is no /sys/kernel/btf/vmlinux")
    names = read_btf(_bytes(btf), _FUNCTIONS, _STRUCTS, _ENUMERATORS)
    listed = [at(path) for path in TRACEFS if (at(path) / "available_filter_functions").exists()]
    if not listed:
        raise TargetError(
            "trace needs tracefs, and it is not mounted: mount -t tracefs none /sys/kernel/tracing"
        )
    tracefs = listed[0]
    available = set()
    for line in _bytes(tracefs / "available_filter_functions").splitlines():
        available.add(line.split(maxsplit=1)[0].decode(errors="replace") if line else "")
    events = set(_bytes(tracefs / "available_events").decode(errors="replace").split())
    symbols = set()
    wanted = {name.encode() for name in _SYMBOLS}
    for line in _bytes(at(KALLSYMS)).splitlines():
        words = line.split()
        if len(words) == 3 and words[2] in wanted:
            symbols.add(words[2].decode())
    known = names.functions
    return KernelOffers(
        release=platform.release(),
        machine=platform.machine(),
        traceable={name: known[name] for name in _FUNCTIONS if name in known and name in available},
        hidden=tuple(name for name in _FUNCTIONS if name in known and name not in available),
        structs=names.structs,
        enumerators=names.enumerators,
        symbols=tuple(sorted(symbols)),
        tracepoints=tuple(name for name in (RELEASE_TRACEPOINT,) if name in events),
        compiles=at(JIT).exists() and _bytes(at(JIT)).strip() not in (b"", b"0"),
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TargetError(
            f"trace needs {path}, and it cannot be read: {os.strerror(error.errno or 0)}"
        ) from error
