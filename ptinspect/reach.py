# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""One descriptor in the census: what reaches its tables, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass

from drgn import FaultError, Program

from ptinspect.census import UNKNOWN_LEVEL, Census, Holder
from ptinspect.errors import PtinspectError
from ptinspect.kernel.paging import Paging
from ptinspect.reached import census_missing
from ptinspect.state.told import Told
from ptinspect.tables.contents import Contents, read_contents
from ptinspect.tables.lookup import TableOwner, table_owners, tables_within
from ptinspect.tables.spaces import Space


@dataclass(frozen=True)
class Reach:
    """The tables in the page (or pages) of one descriptor."""

    paging: Paging
    spaces: tuple[Space, ...]
    #: Every entry and root that leads to them.
    owners: tuple[TableOwner, ...]
    #: Each of them once; what cannot be read is left out and stands in *missing*.
    contents: tuple[Contents, ...]
    #: Name of what accounts for the page; ``None`` if it is not typed.
    holder: str | None
    #: The kernel's name of the level; ``None`` if it is not reached.
    level: str | None
    missing: tuple[str, ...]
    #: What the stories say of the descriptor.
    told: tuple[Told, ...]

    @property
    def of_kernel(self) -> bool:
        """Whether the kernel's space reaches them."""
        return any(self.spaces[owner.space].kernel for owner in self.owners)


def reach_of(prog: Program, census: Census, pfn: int, ptdesc: int, order: int) -> Reach:
    """
    Find what reaches the tables of a page.

    :param pfn: The head page, and *ptdesc* the address of its descriptor.
    """
    page_bytes = census.paging.page_bytes
    first, end = pfn * page_bytes, (pfn + (1 << order)) * page_bytes
    tables = census.tables
    owners: list[TableOwner] = []
    contents = []
    missing = census_missing(census)
    for address in tables_within(tables, first, end):
        found = table_owners(tables, address)
        owners.extend(found)
        if not found:
            continue
        space = tables.spaces[found[0].space]
        held = read_contents(
            prog,
            census.paging,
            address,
            found[0].level,
            kernel=space.kernel,
            kvm_owned=space.kvm_owned,
        )
        if held is not None:
            contents.append(held)
        else:
            missing.append(f"the table at {address:#x} cannot be read")
    index = census.index_of_pfn(pfn)
    holder = None if index is None else Holder(int(census.holder[index]))
    level = owners[0].level if owners else UNKNOWN_LEVEL
    if holder is Holder.DEPOSIT:
        level = 0
    told: tuple[Told, ...] = ()
    try:
        told = census.stories.told(pfn, ptdesc)
    except (FaultError, LookupError, PtinspectError) as error:
        missing.append(f"what its members say could not be read: {error}")
    return Reach(
        paging=census.paging,
        spaces=tables.spaces,
        owners=tuple(owners),
        contents=tuple(contents),
        holder=None if holder is None else holder.name.lower(),
        level=None if level == UNKNOWN_LEVEL else census.paging.levels[level].name,
        missing=tuple(missing),
        told=told,
    )
