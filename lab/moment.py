# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A moment of a guest under load: stopped again and again until page tables are being freed.

What is said of the moment is read from the dump with plain drgn: the callbacks that wait for RCU,
the kernel's tables that wait for their work, and what each CPU is doing.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import drgn
from drgn.helpers.linux.cpumask import for_each_online_cpu, for_each_possible_cpu
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mm import page_to_pfn
from drgn.helpers.linux.percpu import per_cpu
from drgn.helpers.linux.sched import cpu_curr

from lab.dump import count_typed, nr_page_table_pages, open_dump, read_pages
from lab.errors import LabError
from lab.guest import Guest
from lab.run import say

#: Stops after which the guest is given up.
_MOST_STOPS = 1000

_BATCH_FUNCTION = "tlb_remove_table_rcu"

#: Functions that gather the tables of an address space (mm/memory.c).
_GATHERING = ("free_pgd_range", "free_p4d_range", "free_pud_range", "free_pmd_range")


def callbacks(program: drgn.Program) -> list[dict[str, Any]]:
    """Tell which callbacks each CPU has on its list, and how many tables their batches hold."""
    rcu = []
    for cpu in for_each_possible_cpu(program):
        segments = per_cpu(program["rcu_data"], cpu).cblist
        functions: Counter[str] = Counter()
        tables = 0
        head = segments.head
        while head:
            name = program.symbol(head.func.value_()).name
            functions[name] += 1
            if name == _BATCH_FUNCTION:
                tables += drgn.container_of(head, "struct mmu_table_batch", "rcu").nr.value_()
            head = head.next.read_()
        length = segments.len
        if length.type_.kind != drgn.TypeKind.INT:
            length = getattr(length, "counter", length)
        rcu.append(
            {
                "cpu": cpu,
                "len": int(length),
                "functions": dict(sorted(functions.items())),
                "tables": tables,
            }
        )
    return rcu


def kernel_tables(program: drgn.Program) -> list[dict[str, Any]] | None:
    """Tell which of the kernel's tables wait to be freed; ``None`` if it frees them at once."""
    try:
        head = program["kernel_pgtable_work"].list.address_of_()
    except KeyError:
        return None
    return [
        {
            "pfn": f"{page_to_pfn(drgn.cast('struct page *', table)).value_():#x}",
            "page_type": f"{table.member_('__page_type').value_():#x}",
            "refcount": table.member_("__page_refcount").counter.value_(),
        }
        for table in list_for_each_entry("struct ptdesc", head, "pt_list")
    ]


def running(dump: Path, vmlinux: Path) -> list[dict[str, Any]]:
    """
    Tell what each CPU was doing: its task and the functions on its stack.

    The registers are in the dump's notes, which drgn reads on x86_64 and aarch64 only.
    """
    program = drgn.Program()
    program.set_core_dump(dump)
    program.load_debug_info([vmlinux])
    cpus = []
    for cpu in for_each_online_cpu(program):
        task = cpu_curr(program, cpu)
        frames = [frame.name for frame in program.stack_trace(task)]
        cpus.append({"cpu": cpu, "pid": int(task.pid), "frames": frames})
    return cpus


#: What a guest can be waited for.
GATHERING, KERNEL_TABLES = "gathering", "kernel tables"


def wait_for_moment(guest: Guest, vmlinux: Path, into: Path, wanted: str) -> dict[str, Any]:
    """
    Stop a guest again and again until it is at a wanted moment, and dump it.

    The guest stays stopped.

    :param wanted: :data:`GATHERING`: a CPU gathers tables while others wait for RCU;
        :data:`KERNEL_TABLES`: several of the kernel's tables wait to be freed
    :return: what the dump shows
    :raises LabError: if no stop of many met it
    """
    for stops in range(1, _MOST_STOPS + 1):
        time.sleep(random.uniform(0.05, 0.5))
        guest.stop()
        guest.dump(into)
        program = open_dump(into, vmlinux)
        rcu, cpus = callbacks(program), running(into, vmlinux)
        kernel = kernel_tables(program)
        waiting = sum(each["functions"].get(_BATCH_FUNCTION, 0) for each in rcu)
        gathering = any(set(each["frames"]) & set(_GATHERING) for each in cpus)
        counted = nr_page_table_pages(program)
        typed = count_typed(program, read_pages(program))
        here = (waiting and gathering) if wanted == GATHERING else len(kernel or ()) > 2
        if here and typed["pages"] == counted["exact"]:
            say(f"stop {stops}: {waiting} batches wait, {len(kernel or ())} kernel tables")
            moment = {"rcu": rcu, "cpus": cpus, "typed": typed, "nr_page_table_pages": counted}
            return moment if kernel is None else {**moment, "kernel_tables": kernel}
        guest.cont()
    raise LabError(f"in {_MOST_STOPS} stops the guest was not {wanted}")
