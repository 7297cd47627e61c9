# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Orphans: typed pages that nothing accounts for, with what can be known of each.

A table that is just being allocated, or that is on its way from its tree into a batch, is an orphan
for that moment, and a kernel stack may still name it. One that stays is leaked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from drgn import FaultError, Program

from ptinspect.census import UNKNOWN_LEVEL, Census, Holder
from ptinspect.kernel.paging import EntryClass
from ptinspect.state.fields import direct_map_addresses
from ptinspect.state.page_owner import PageOwner, page_owner, page_owner_enabled
from ptinspect.state.pending import Way
from ptinspect.state.rcu import Segment
from ptinspect.state.stacks import KernelStack, kernel_stacks
from ptinspect.tables.contents import read_contents

#: Orphans that are looked at one by one: where there are more, they are much alike.
MOST_DESCRIBED = 1000


@dataclass(frozen=True)
class UsedAs:
    """What the first table of a page would hold if it were of one level."""

    level: str
    #: Entries in use, those of them that no kernel writes at that level, and entries in all.
    used: int
    bad: int
    entries: int


@dataclass(frozen=True)
class Orphan:
    """One typed page that nothing accounts for."""

    #: Index of the descriptor in the census.
    index: int
    pfn: int
    #: Address of the descriptor.
    ptdesc: int
    #: The typed pages just before and after it, and who has them; empty if that page is not typed.
    before: str
    after: str
    #: What it last held, by level; empty if it cannot be read.
    used_as: tuple[UsedAs, ...]
    #: Stacks, or registers, with a word that names its descriptor or its memory, in words.
    on_stacks: tuple[str, ...]
    #: Whether all those stacks are of tasks that sleep at rest.
    at_rest: bool
    #: Its allocation, if the kernel writes that down; words if that cannot be read.
    owner: PageOwner | str | None

    @property
    def filled(self) -> bool:
        """Whether it has entries, of whatever level it may be."""
        return bool(self.used_as) and all(used.used for used in self.used_as)

    @property
    def on_its_way(self) -> bool:
        """
        Whether a stack explains it.

        A task at rest may keep a new table for later, which is empty (vmf->prealloc_pte), but does
        not take one out of a tree: where that has entries, the word is left over from the last use.
        """
        return bool(self.on_stacks) and not (self.at_rest and self.filled)


@dataclass(frozen=True)
class Orphans:
    """The orphans of a census, the first :data:`MOST_DESCRIBED` of them."""

    orphans: tuple[Orphan, ...]
    #: How many there are.
    total: int
    #: CPUs that are seen to take tables out of a tree or to free them, in words: each may have one
    #: in a register that nothing in memory names.
    at_work: tuple[str, ...]
    #: CPUs that run a task, in words: it may be about to link a table, or have just taken one out.
    running: tuple[str, ...]
    #: What could not be seen, in sentences.
    missing: tuple[str, ...]


def describe_orphans(prog: Program, census: Census) -> Orphans:
    """
    Find out what can be known of the pages that nothing accounts for.

    :param prog: The kernel.
    :param census: What :func:`take_census` found in it.
    :return: The first of them, how many there are, and who may be about to use or free one.
    """
    indices = census.unexplained()
    if not len(indices):
        return Orphans((), 0, (), (), ())
    stacks = kernel_stacks(prog, at_rest=True)
    chosen = indices[:MOST_DESCRIBED].tolist()
    return Orphans(
        tuple(_describe(prog, census, index, stacks.stacks) for index in chosen),
        len(indices),
        tuple(dict.fromkeys(_at_work(census))),
        tuple(
            f"CPU {stack.cpu} runs {stack.owner}"
            for stack in stacks.stacks
            if stack.cpu is not None and not stack.of_no_task
        ),
        stacks.missing,
    )


def _at_work(census: Census) -> Iterator[str]:
    for free in census.stories.pending.frees:
        if free.cpu is None:
            continue
        if free.way is Way.GATHER:
            yield f"CPU {free.cpu} gathers tables ({free.task})"
        elif free.segment is Segment.INVOKED:
            yield f"CPU {free.cpu} frees tables after their grace period"


def _describe(prog: Program, census: Census, index: int, stacks: tuple[KernelStack, ...]) -> Orphan:
    pfn, order = int(census.scan.pfns[index]), int(census.scan.orders[index])
    pages = 1 << order
    naming = list(_naming(prog, census, index, stacks))
    return Orphan(
        index=index,
        pfn=pfn,
        ptdesc=int(census.scan.addresses[index]),
        before=_owner(census, pfn - 1),
        after=_owner(census, pfn + pages),
        used_as=tuple(_used_as(prog, census, pfn, pages)),
        on_stacks=tuple(text for text, _ in naming),
        at_rest=all(stack.at_rest for _, stack in naming),
        owner=_page_owner(prog, pfn),
    )


def _page_owner(prog: Program, pfn: int) -> PageOwner | str | None:
    if not page_owner_enabled(prog):
        return None
    try:
        return page_owner(prog, pfn)
    except (FaultError, LookupError, AttributeError) as error:
        return f"cannot be read: {error}"


def _owner(census: Census, pfn: int) -> str:
    """Say who has a page: a level and a space, or what else holds it; empty if it is not typed."""
    index = census.index_of_pfn(pfn) if pfn >= 0 else None
    if index is None:
        return ""
    holder = Holder(int(census.holder[index]))
    if holder is not Holder.TREE:
        return holder.name.lower()
    level = int(census.level[index])
    name = "?" if level == UNKNOWN_LEVEL else census.paging.levels[level].name
    row = int(census.rows_of(index)[0])
    return f"{name} of {census.tables.spaces[int(census.tables.space[row])].name}"


def _used_as(prog: Program, census: Census, pfn: int, pages: int) -> Iterator[UsedAs]:
    paging = census.paging
    for number, level in enumerate(paging.levels):
        if level.table_bytes > pages * paging.page_bytes:
            continue
        contents = read_contents(prog, paging, pfn * paging.page_bytes, number)
        if contents is None:
            return
        counts = contents.counts()
        used = len(contents.kinds) - counts.get(EntryClass.NONE, 0)
        yield UsedAs(level.name, used, counts.get(EntryClass.BAD, 0), len(contents.kinds))


def _naming(
    prog: Program, census: Census, index: int, stacks: tuple[KernelStack, ...]
) -> Iterator[tuple[str, KernelStack]]:
    scan = census.scan
    pages = 1 << int(scan.orders[index])
    bytes_held = pages * census.paging.page_bytes
    page = int(scan.addresses[index])
    table = int(direct_map_addresses(prog, scan.pfns[index : index + 1])[0])
    ranges = (
        ("its descriptor", page, page + scan.descriptors.dtype.itemsize * pages),
        ("its memory", table, table + bytes_held),
    )
    for stack in stacks:
        where = stack.owner if stack.cpu is None else f"{stack.owner} on CPU {stack.cpu}"
        for what, start, end in ranges:
            if np.any((stack.words >= np.uint64(start)) & (stack.words < np.uint64(end))):
                yield f"{where}: {what}", stack
