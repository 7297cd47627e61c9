# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The stories that descriptors tell on one target, each read once, when it is first asked for.

A story is a module of this folder. Its reader takes the walked tables and the scan and returns a
frozen record of its own; commands, the census and the invariants share what was read here.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

from drgn import Program

from ptinspect.memory import AddressArray
from ptinspect.state.deposits import Deposits, read_deposits
from ptinspect.state.gmap_relations import GmapStory, read_gmap_story
from ptinspect.state.pending import Pending, read_pending
from ptinspect.state.pmd_tables import PmdTables, read_pmd_tables
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
    def pending(self) -> Pending:
        """Tables that wait to be freed."""
        return read_pending(self.prog, self.tables, self.scan)

    @cached_property
    def gmaps(self) -> GmapStory:
        """s390's guest address spaces."""
        return read_gmap_story(self.prog, self.tables)
