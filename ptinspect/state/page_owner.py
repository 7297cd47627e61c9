# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Who allocated a page, on kernels that write it down (CONFIG_PAGE_OWNER and ``page_owner=on``).

The record lies beside the memory map, in the page extensions of each memory section
(include/linux/page_ext.h, mm/page_owner.c).
"""

from __future__ import annotations

from dataclasses import dataclass

from drgn import FaultError, Object, Program, reinterpret
from drgn.helpers.linux.mmzone import pfn_to_section

#: CONFIG_STACKDEPOT_MAX_FRAMES
_MOST_FRAMES = 64


@dataclass(frozen=True)
class PageOwner:
    """The last allocation of a page."""

    #: Whether that allocation lasts.
    allocated: bool
    order: int
    pid: int
    #: Of the task at that time; not yet escaped.
    comm: str
    #: Nanoseconds after boot.
    when: int
    #: Functions on the stack, the innermost first; empty if the stack cannot be had.
    stack: tuple[str, ...]


def page_owner_enabled(prog: Program) -> bool:
    """Whether this kernel writes down who allocates pages."""
    try:
        return bool(prog["page_owner_inited"].key.enabled.counter.value_() > 0)
    except (LookupError, FaultError):
        return False


def page_owner(prog: Program, pfn: int) -> PageOwner | None:
    """
    Get who allocated a page.

    :return: ``None`` if nothing was written down for it
    :raises FaultError: if the record cannot be read
    :raises LookupError: if this kernel keeps its page extensions in a way that is not known
    """
    section = pfn_to_section(prog, pfn)
    base = section.page_ext.value_()
    # PAGE_EXT_INVALID marks sections that go away (mm/page_ext.c).
    if not base or base & 1:
        return None
    # The pointer of a section is as if it were that of page frame 0.
    address = (base + prog["page_ext_size"].value_() * pfn) & (1 << 64) - 1
    flags = Object(prog, "struct page_ext *", address).flags.value_()
    if not flags & 1 << int(prog.constant("PAGE_EXT_OWNER")):
        return None
    offset = prog["page_owner_ops"].offset.value_()
    owner = Object(prog, "struct page_owner *", address + offset)
    return PageOwner(
        allocated=bool(flags & 1 << int(prog.constant("PAGE_EXT_OWNER_ALLOCATED"))),
        order=int(owner.order),
        pid=int(owner.pid),
        comm=owner.comm.string_().decode("utf-8", "backslashreplace"),
        when=int(owner.ts_nsec),
        stack=_functions(owner),
    )


def _functions(owner: Object) -> tuple[str, ...]:
    try:
        return tuple(_name(owner.prog_, address) for address in _frames(owner))
    except (FaultError, LookupError, AttributeError):
        return ()


def _frames(owner: Object) -> list[int]:
    """
    Get the return addresses of the stack that a record names.

    Not drgn's ``stack_depot_fetch()``: it needs the debugging information of source lines, which
    small debug files lack, and believes the size that a damaged record gives.
    """
    prog = owner.prog_
    if not owner.handle:
        return []
    parts = reinterpret("union handle_parts", owner.handle.read_())
    try:
        # pool_index_plus_1 since a6c1d9cb9a68 (6.9), slabs before 961c949b012f (6.3).
        pool = prog["stack_pools"][parts.pool_index_plus_1 - 1]
    except AttributeError:
        pool = prog["stack_pools"][parts.pool_index]
    except KeyError:
        pool = prog["stack_slabs"][parts.slabindex]
    # Records begin at multiples of 1 << DEPOT_STACK_ALIGN bytes.
    address = pool.value_() + (parts.offset.value_() << 4)
    record = Object(prog, "struct stack_record *", address)
    count = min(record.size.value_(), _MOST_FRAMES)
    return [record.entries[number].value_() for number in range(count)]


def _name(prog: Program, address: int) -> str:
    try:
        return str(prog.symbol(address).name)
    except LookupError:
        return f"{address:#x}"
