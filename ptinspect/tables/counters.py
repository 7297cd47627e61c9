# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel itself counted: NR_PAGETABLE, with the parts that CPUs have not added yet."""

from __future__ import annotations

from drgn import Program
from drgn.helpers.linux.cpumask import for_each_possible_cpu
from drgn.helpers.linux.mmzone import for_each_online_pgdat
from drgn.helpers.linux.percpu import per_cpu_ptr

from ptinspect.errors import TargetError
from ptinspect.records import CounterReading


def read_nr_pagetable(prog: Program) -> CounterReading:
    """
    Read NR_PAGETABLE exactly, in pages.

    /proc/vmstat shows only the global part; each CPU adds up to its ``stat_threshold`` (at most
    125) pages in ``vm_node_stat_diff`` before it folds them in (mm/vmstat.c).

    :param prog: The kernel.
    :return: The global part, that of each CPU and of each node, in pages.
    :raises FaultError: if the counters are not in the dump
    :raises TargetError: if the kernel keeps NR_PAGETABLE elsewhere (a zone counter before 5.11)
    """
    item = prog.constant("NR_PAGETABLE")
    if item.type_.tag != "node_stat_item":
        raise TargetError("NR_PAGETABLE is not a node counter on this kernel (before 5.11)")
    index = item.value_()
    remainders: dict[int, int] = {}
    nodes: dict[int, int] = {}
    for pgdat in for_each_online_pgdat(prog):
        node = int(pgdat.node_id.value_())
        nodes[node] = int(pgdat.vm_stat[index].counter.value_())
        for cpu in for_each_possible_cpu(prog):
            stats = per_cpu_ptr(pgdat.per_cpu_nodestats, cpu)
            diff = int(stats.vm_node_stat_diff[index].value_())
            nodes[node] += diff
            if diff:
                remainders[cpu] = remainders.get(cpu, 0) + diff
    return CounterReading(
        global_pages=int(prog["vm_node_stat"][index].counter.value_()),
        cpu_remainders=remainders,
        node_pages=nodes,
    )
