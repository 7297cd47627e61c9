# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The stories that descriptors tell on one target, each read once, when it is first asked for.

A story is a module of this folder. Its reader takes the walked tables and the scan and returns a
frozen record of its own; commands, the census and the invariants share what was read here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from drgn import Program

from ptinspect.memory import AddressArray
from ptinspect.state.asce import Asces, read_asces
from ptinspect.state.deposits import Deposits, read_deposits, tell_deposits
from ptinspect.state.fragments import Fragments, read_fragments, tell_fragments
from ptinspect.state.gmap import Gmaps, read_gmaps
from ptinspect.state.gmap_relations import GmapStory, read_gmap_story, tell_gmaps
from ptinspect.state.halves import Halves, read_halves, tell_halves
from ptinspect.state.lists import Lists, read_lists, tell_lists
from ptinspect.state.locks import Locks, read_locks, tell_locks
from ptinspect.state.owners import Owners, read_owners, tell_owners
from ptinspect.state.pending import Pending, Way, read_pending, tell_pending
from ptinspect.state.pmd_tables import PmdTables, read_pmd_tables
from ptinspect.state.rcu import Segment
from ptinspect.state.sharing import Sharing, read_sharing, tell_sharing
from ptinspect.state.told import Told
from ptinspect.tables.scan import MemmapScan
from ptinspect.tables.walk import Tables


class Holding(Protocol):
    """What a story must tell the census, if it accounts for tables that no tree reaches."""

    @property
    def held_pfns(self) -> AddressArray:
        """uint64: page frames of the tables that it accounts for, in any order."""

    @property
    def missing(self) -> tuple[str, ...]:
        """What it could not see, in sentences."""


class Stories:
    """
    The stories of one target.

    :param tables: Every space walked.
    """

    def __init__(self, prog: Program, tables: Tables, scan: MemmapScan) -> None:
        self.prog = prog
        self.tables = tables
        self.scan = scan

    @cached_property
    def pmd_tables(self) -> PmdTables:
        """The PMD tables of mms with their descriptors."""
        return read_pmd_tables(self.prog, self.tables)

    @cached_property
    def deposits(self) -> Deposits:
        """The spare tables of huge pages."""
        return read_deposits(self.prog, self.tables, self.pmd_tables)

    @cached_property
    def sharing(self) -> Sharing:
        """PMD tables that several entries point to."""
        return read_sharing(self.prog, self.tables, self.pmd_tables)

    @cached_property
    def lists(self) -> Lists:
        """The lists that descriptors are on."""
        return read_lists(
            self.prog,
            self.tables,
            self.scan,
            self.pmd_tables,
            self.deposits,
            self.guests.gmaps,
        )

    @cached_property
    def owners(self) -> Owners:
        """The root tables of mms, and the mms that they name."""
        return read_owners(self.prog, self.tables, self.lists)

    @cached_property
    def pending(self) -> Pending:
        """Tables that wait to be freed."""
        return read_pending(self.prog, self.tables, self.scan)

    @cached_property
    def asces(self) -> Asces:
        """s390's address-space-control elements."""
        return read_asces(self.prog, self.tables.spaces)

    @cached_property
    def guests(self) -> Gmaps:
        """s390's guest address spaces, as they are."""
        return read_gmaps(self.prog, self.tables.spaces)

    @cached_property
    def gmaps(self) -> GmapStory:
        """The same, compared with all else: that looks at every page of KVM's own tables."""
        return read_gmap_story(self.prog, self.tables, self.guests)

    @cached_property
    def locks(self) -> Locks:
        """Page-table locks."""
        return read_locks(self.prog, self.tables, self.scan)

    @cached_property
    def fragments(self) -> Fragments | None:
        """powerpc: pages with several tables; ``None`` if this kernel has none."""
        deposits, pending = self.deposits, self.pending
        return read_fragments(
            self.prog,
            self.tables,
            self.scan,
            deposited=_addresses(deposits),
            pending=_pending_addresses(pending, sure=True),
            perhaps=_pending_addresses(pending, sure=False),
            missing=(*deposits.missing, *pending.missing),
        )

    @cached_property
    def halves(self) -> Halves | None:
        """s390 as of 6.1: pages with two tables; ``None`` if this kernel has none."""
        deposits = self.deposits
        return read_halves(
            self.prog,
            self.tables,
            self.scan,
            deposited=_addresses(deposits),
            pending=self.pending.addresses,
            missing=deposits.missing,
        )

    @property
    def parted_pages(self) -> Holding:
        """Pages with several tables, of whichever kind this kernel has."""
        for story in (self.fragments, self.halves):
            if story is not None:
                return story
        return _Nothing()

    def told(self, pfn: int, ptdesc: int) -> tuple[Told, ...]:
        """
        What the stories say of one descriptor.

        :param pfn: Page frame of its first page.
        :param ptdesc: Its address.
        """
        return (
            *tell_deposits(self.deposits, self.tables, pfn, ptdesc),
            *tell_lists(self.lists, pfn),
            *tell_pending(self.pending, pfn),
            *tell_owners(self.owners, self.tables, ptdesc),
            *tell_sharing(self.sharing, self.tables, ptdesc),
            *tell_gmaps(self.guests, self.tables, pfn),
            *tell_fragments(self.fragments, pfn),
            *tell_halves(self.halves, pfn),
            *tell_locks(self.locks, pfn),
        )


@dataclass(frozen=True)
class _Nothing:
    """A story that accounts for nothing on this kernel."""

    held_pfns: AddressArray = field(default_factory=lambda: np.empty(0, np.uint64))
    missing: tuple[str, ...] = ()


def _pending_addresses(pending: Pending, *, sure: bool) -> AddressArray:
    """
    uint64: physical addresses of PTE and PMD tables that wait to be freed.

    :param sure: Those that nobody can have freed yet; else those in batches on kernel stacks, which
        may be done already, in part or all of it.
    """
    unsure = np.array(
        [free.way is Way.GATHER or free.segment is Segment.INVOKED for free in pending.frees]
        or [False],
        np.bool_,
    )
    wanted = (pending.level <= 1) & (unsure[pending.free] != sure)
    addresses: AddressArray = pending.addresses[wanted]
    return addresses


def _addresses(deposits: Deposits) -> AddressArray:
    """uint64: physical addresses of the spare tables."""
    return np.array([table for ring in deposits.rings for table in ring.tables], np.uint64)
