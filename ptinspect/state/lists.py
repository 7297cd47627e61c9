# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
``pt_list``: the lists that descriptors are on, and what the word is in each descriptor.

The same 16 bytes are a node of x86's list of all PGDs (pgd_list, arch/x86/mm/pgtable.c), of the
kernel tables that wait to be freed (kernel_pgtable_work, mm/pgtable-generic.c of 7.x), of the
half-free pages of an mm on s390 (context.pgtable_list, arch/s390/mm/pgalloc.c of 6.1), of the
ring of tables deposited for huge pages, of s390's lists of a guest's tables (crst_list and pt_list
of struct gmap, up to 6.x), or an RCU callback; their second half is ``pmd_huge_pte``.
Elsewhere they are what the page allocator left there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Object, Program, offsetof

from ptinspect.kernel.descriptor import byte_order, ptdesc_type
from ptinspect.kernel.paging.model import object_or_none
from ptinspect.lists import walk_both_ways, walk_list_at
from ptinspect.memory import AddressArray, read_blocks
from ptinspect.state.deposits import Deposits
from ptinspect.state.fields import RCU_FREE_FUNCTIONS
from ptinspect.state.gmap import Gmap
from ptinspect.state.pmd_tables import PmdTables
from ptinspect.state.told import Told
from ptinspect.tables.memmap import Memmap
from ptinspect.tables.scan import MemmapScan
from ptinspect.tables.spaces import SpaceKind
from ptinspect.tables.walk import Tables

#: No list node is in the first page of any address space.
_LOWEST_ADDRESS = 4096

PGD_LIST = "pgd_list"
FREE_LIST = "kernel_pgtable_work.list"


class Role(IntEnum):
    """What the bytes of ``pt_list`` are in a descriptor."""

    #: Left by the page allocator, or by a list that it was taken from.
    STALE = 0
    PGD_LIST = 1
    #: A list of tables to be freed.
    FREE_LIST = 2
    #: s390: one half of the page is free.
    PGTABLE_LIST = 3
    #: The ring of tables that are deposited for huge pages.
    DEPOSIT = 4
    #: The callback that frees the table after a grace period.
    RCU = 5
    #: ``pmd_huge_pte`` lies over the second word.
    PMD_HUGE_PTE = 6
    #: Its own neighbour: a list of one, or one that was initialised and never used.
    SELF = 7
    #: Both neighbours point back, but it is on none of the lists above.
    OTHER_LIST = 8
    #: s390: the tables of a guest address space, which are not typed.
    GMAP = 9


@dataclass(frozen=True)
class WordList:
    """One list of descriptors."""

    #: The kernel's name of it; with the space's name if each mm has one.
    name: str
    #: Address of its ``struct list_head``.
    head: int
    role: Role
    #: Page frames in order: those up to a break, then those found from the other end.
    pfns: tuple[int, ...]
    #: Addresses of their ``struct ptdesc``.
    ptdescs: tuple[int, ...]
    #: How many of them are on the near side of the break: all if the list is whole.
    before_break: int
    #: Where it is broken, walked forward and backward; empty if it is whole.
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Lists:
    """The lists of one target, and the role of ``pt_list`` in each typed descriptor."""

    lists: tuple[WordList, ...]
    #: uint8 of :class:`Role`, by descriptor of the scan.
    roles: npt.NDArray[np.uint8]
    #: Whether the work that frees kernel tables is queued; ``None`` if this kernel has none.
    free_work_pending: bool | None
    missing: tuple[str, ...]
    #: By page frame: the list that it is on, and its place there.
    places: dict[int, tuple[WordList, int]] = field(repr=False)

    def named(self, name: str) -> WordList | None:
        """Get a list by its name."""
        return next((found for found in self.lists if found.name == name), None)


def read_lists(
    prog: Program,
    tables: Tables,
    scan: MemmapScan,
    pmds: PmdTables,
    deposits: Deposits,
    gmaps: Sequence[Gmap],
) -> Lists:
    """
    Walk every list of descriptors, and tell the role of the word in each typed descriptor.

    :param pmds: The PMD tables of *tables*, and *deposits* what hangs on them.
    :param gmaps: s390's guest address spaces, which up to 6.x list their tables.
    """
    memmap = Memmap(prog)
    lists = tuple(
        _read_list(prog, memmap, name, head, role)
        for name, head, role in _heads(prog, tables, gmaps)
    )
    places: dict[int, tuple[WordList, int]] = {}
    for found in lists:
        for place, pfn in enumerate(found.pfns):
            places.setdefault(pfn, (found, place))
    return Lists(
        lists=lists,
        roles=_roles(prog, scan, lists, pmds, deposits),
        free_work_pending=_work_pending(prog),
        missing=tuple(f"{found.name}: {text}" for found in lists for text in found.problems),
        places=places,
    )


def _heads(prog: Program, tables: Tables, gmaps: Sequence[Gmap]) -> Iterator[tuple[str, int, Role]]:
    """Find the heads of the lists that this kernel has."""
    head = object_or_none(prog, PGD_LIST)
    if head is not None and tables.paging.architecture == "x86_64":
        yield PGD_LIST, int(head.address_of_().value_()), Role.PGD_LIST
    work = object_or_none(prog, "kernel_pgtable_work")
    if work is not None:
        yield FREE_LIST, int(work.list.address_of_().value_()), Role.FREE_LIST
    for gmap in gmaps:
        type_ = prog.type("struct gmap")
        for name in ("crst_list", "pt_list"):
            # Since 7.0 KVM keeps no list of them (arch/s390/kvm/gmap/gmap.h).
            if type_.has_member(name):
                head_at = gmap.address + offsetof(type_, name)
                yield f"{name} of {gmap.name}", head_at, Role.GMAP
    mm_type = prog.type("struct mm_struct")
    try:
        offset = offsetof(mm_type, "context.pgtable_list")
    except LookupError:
        return
    for space in tables.spaces:
        if space.mm is not None and space.kind in (SpaceKind.USER, SpaceKind.KERNEL):
            yield f"pgtable_list of {space.name}", space.mm.address + offset, Role.PGTABLE_LIST


def _read_list(prog: Program, memmap: Memmap, name: str, head: int, role: Role) -> WordList:
    offset = offsetof(ptdesc_type(prog), "pt_list")
    walk = walk_both_ways(prog, head)
    nodes = np.array(walk.nodes, np.uint64)
    problems = [("from its end: " if end else "") + str(at) for end, at in enumerate(walk.breaks)]
    addresses = nodes - np.uint64(offset)
    pfns, good = memmap.pfns(addresses)
    for node in nodes[~good].tolist():
        problems.append(f"node {node:#x} is in no descriptor")
        break
    return WordList(
        name=name,
        head=head,
        role=role,
        pfns=tuple(pfns[good].tolist()),
        ptdescs=tuple(addresses[good].tolist()),
        before_break=int(np.count_nonzero(good[: walk.before_break])),
        problems=tuple(problems),
    )


def _roles(
    prog: Program,
    scan: MemmapScan,
    lists: tuple[WordList, ...],
    pmds: PmdTables,
    deposits: Deposits,
) -> npt.NDArray[np.uint8]:
    roles = np.full(len(scan.pfns), Role.STALE, np.uint8)
    if not len(roles):
        return roles
    node = scan.addresses + np.uint64(offsetof(ptdesc_type(prog), "pt_list"))
    following = scan.descriptors["pt_list.next"].astype(np.uint64)
    previous = scan.descriptors["pt_list.prev"].astype(np.uint64)
    own = (following == node) & (previous == node)
    # Not only addresses with the highest bit set: those of s390 are low.
    lowest = np.uint64(_LOWEST_ADDRESS)
    likely = np.flatnonzero(~own & (following >= lowest) & (previous >= lowest))
    linked = _points_to(prog, following[likely] + np.uint64(8), node[likely])
    linked &= _points_to(prog, previous[likely], node[likely])
    roles[likely[linked]] = Role.OTHER_LIST
    roles[own] = Role.SELF
    if "pt_rcu_head.func" in (scan.descriptors.dtype.names or ()):
        functions = np.array(list(_free_functions(prog)), np.uint64)
        roles[np.isin(scan.descriptors["pt_rcu_head.func"], functions)] = Role.RCU
    roles[_index(scan, pmds.pfns)] = Role.PMD_HUGE_PTE
    if not deposits.node_in_table:
        roles[_index(scan, deposits.held_pfns)] = Role.DEPOSIT
    for found in lists:
        roles[_index(scan, np.array(found.pfns, np.uint64))] = found.role
    return roles


def _index(scan: MemmapScan, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """Get the descriptors of head pages that are typed."""
    place = np.searchsorted(scan.pfns, pfns)
    place[place == len(scan.pfns)] = 0
    found: npt.NDArray[np.intp] = place[scan.pfns[place] == pfns]
    return found


def _points_to(
    prog: Program, addresses: AddressArray, targets: AddressArray
) -> npt.NDArray[np.bool_]:
    words = read_blocks(prog, addresses, 8, physical=False)
    values = words.data.reshape(-1).view(f"{byte_order(prog)}u8")
    same: npt.NDArray[np.bool_] = words.readable & (values == targets)
    return same


def _free_functions(prog: Program) -> Iterator[int]:
    for name in RCU_FREE_FUNCTIONS:
        try:
            yield int(prog.symbol(name).address)
        except LookupError:
            continue


def _work_pending(prog: Program) -> bool | None:
    work = object_or_none(prog, "kernel_pgtable_work")
    if work is None:
        return None
    try:
        # WORK_STRUCT_PENDING_BIT is bit 0 of work->data (include/linux/workqueue.h).
        return bool(work.work.data.counter.value_() & 1)
    except (FaultError, AttributeError):
        return None


def tell_lists(story: Lists, pfn: int) -> Iterator[Told]:
    """Say which list a descriptor is on."""
    # What is on the lists of a gmap, that story tells.
    if pfn in story.places and story.places[pfn][0].role is not Role.GMAP:
        found, place = story.places[pfn]
        text = f"node {place + 1} of {len(found.pfns)} of {found.name}"
        if found.problems:
            text += ", which is broken"
        yield Told(text, "pt_list")


def for_each_pgd_list_ptdesc(prog: Program) -> Iterator[Object]:
    """
    Iterate over the descriptors on x86's pgd_list: the PGD of every mm, in the list's order.

    :param prog: The kernel.
    :return: Iterator of ``struct ptdesc *`` objects; ends where the list is broken.
    :raises ObjectNotFoundError: if the kernel has no such list
    """
    head = prog.variable(PGD_LIST).address_of_().value_()
    pointer = prog.pointer_type(ptdesc_type(prog))
    offset = offsetof(ptdesc_type(prog), "pt_list")
    for node in walk_list_at(prog, head).nodes:
        yield Object(prog, pointer, node - offset)
