# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The stories that descriptors tell on one target, each read once, when it is first asked for.

A story is a module of this folder. Its reader takes the walked tables and the scan and returns a
frozen record of its own; commands, the census and the invariants share what was read here.
"""

from __future__ import annotations

from typing import Protocol

from drgn import Program

from ptinspect.memory import AddressArray
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
