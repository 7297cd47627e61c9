# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Look inside the page tables of a Linux kernel, live or dead.

``from ptinspect import *`` in drgn's shell gives these helpers, none of which hides one of drgn's.
docs/scripting.md has worked examples.

One descriptor: ``page_ptdesc(page)``, ``pfn_to_ptdesc(prog, pfn)``, ``virt_to_ptdesc(prog, addr)``,
``locate_ptdesc(prog, text)``, and back ``ptdesc_page(pt)``, ``ptdesc_pfn(pt)``,
``ptdesc_address(pt)``, ``ptdesc_folio(pt)``; ``page_is_pgtable(page)``, ``ptdesc_test_kernel(pt)``,
``ptdesc_flags(pt)``, ``ptdesc_member(pt, name)``, ``describe_ptdesc(pt)``. They bear the names of
the kernel's own functions where it has them, and take and return drgn objects.

All descriptors: ``scan_memmap(prog)``, ``summarise(prog, scan)``, ``Listing(prog, scan)``,
``read_nr_pagetable(prog)``. Address spaces: ``find_spaces(prog)``, ``walk_address(...)``,
``map_space(...)``, ``walk_spaces(...)``, ``space_usage(tables)``. Both joined:
``take_census(prog)``, ``table_owners(...)``, ``page_owners(...)``. What is never true of a healthy
kernel: ``run_checks(prog)``.

What this kernel looks like: ``ptdesc_type(prog)``, ``ptdesc_dtype(prog)``, ``ptdesc_layout(prog)``,
``ptdesc_has_member(prog, name)``, ``paging_of(prog)``. Outside of a shell:
``with open_target(TargetOptions(core=...)) as target: prog = target.prog``.
"""

from __future__ import annotations

from ptinspect.census import Holder, take_census
from ptinspect.checks import Severity, Verdict, run_checks
from ptinspect.kernel.descriptor import (
    page_is_pgtable,
    page_ptdesc,
    pfn_to_ptdesc,
    ptdesc_address,
    ptdesc_dtype,
    ptdesc_flags,
    ptdesc_folio,
    ptdesc_has_member,
    ptdesc_is_native,
    ptdesc_member,
    ptdesc_page,
    ptdesc_pfn,
    ptdesc_test_kernel,
    ptdesc_type,
    virt_to_ptdesc,
)
from ptinspect.kernel.layout import ptdesc_layout
from ptinspect.kernel.paging import EntryClass, Permission, paging_of
from ptinspect.listing import Listing
from ptinspect.lists import walk_list
from ptinspect.locate import locate_physical, locate_ptdesc
from ptinspect.orphans import describe_orphans
from ptinspect.state.deposits import for_each_deposited_pgtable
from ptinspect.state.fields import describe_ptdesc
from ptinspect.state.lists import for_each_pgd_list_ptdesc
from ptinspect.state.memcg import memcg_path, memcg_usage, read_memcgs
from ptinspect.state.pending import Way
from ptinspect.summary import summarise
from ptinspect.tables.counters import read_nr_pagetable
from ptinspect.tables.lookup import (
    Outcome,
    page_owners,
    table_owners,
    tables_within,
    walk_address,
)
from ptinspect.tables.ranges import map_space
from ptinspect.tables.scan import scan_memmap
from ptinspect.tables.spaces import SpaceKind, find_spaces
from ptinspect.tables.usage import space_usage
from ptinspect.tables.walk import RowState, walk_spaces
from ptinspect.target import TargetOptions, open_target

__version__ = "0.1.0"

__all__ = (
    "EntryClass",
    "Holder",
    "Listing",
    "Outcome",
    "Permission",
    "RowState",
    "Severity",
    "SpaceKind",
    "TargetOptions",
    "Verdict",
    "Way",
    "describe_orphans",
    "describe_ptdesc",
    "find_spaces",
    "for_each_deposited_pgtable",
    "for_each_pgd_list_ptdesc",
    "locate_physical",
    "locate_ptdesc",
    "map_space",
    "memcg_path",
    "memcg_usage",
    "open_target",
    "page_is_pgtable",
    "page_owners",
    "page_ptdesc",
    "paging_of",
    "pfn_to_ptdesc",
    "ptdesc_address",
    "ptdesc_dtype",
    "ptdesc_flags",
    "ptdesc_folio",
    "ptdesc_has_member",
    "ptdesc_is_native",
    "ptdesc_layout",
    "ptdesc_member",
    "ptdesc_page",
    "ptdesc_pfn",
    "ptdesc_test_kernel",
    "ptdesc_type",
    "read_memcgs",
    "read_nr_pagetable",
    "run_checks",
    "scan_memmap",
    "space_usage",
    "summarise",
    "table_owners",
    "tables_within",
    "take_census",
    "virt_to_ptdesc",
    "walk_address",
    "walk_list",
    "walk_spaces",
)
