# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Look inside the page tables of a Linux kernel, live or dead.

``from ptinspect import *`` in drgn's shell gives the helpers below; they take and return drgn
objects with the kernel's own names.
"""

from __future__ import annotations

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
from ptinspect.listing import Listing
from ptinspect.state.fields import describe_ptdesc
from ptinspect.summary import summarise
from ptinspect.tables.counters import read_nr_pagetable
from ptinspect.tables.scan import scan_memmap

__version__ = "0.1.0"

__all__ = (
    "Listing",
    "describe_ptdesc",
    "page_is_pgtable",
    "page_ptdesc",
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
    "read_nr_pagetable",
    "scan_memmap",
    "summarise",
    "virt_to_ptdesc",
)
