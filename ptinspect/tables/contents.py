# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The entries of one table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from drgn import Program

from ptinspect.kernel.paging import EntryClass, Paging
from ptinspect.memory import read_blocks
from ptinspect.tables.entries import raw_entries


@dataclass(frozen=True)
class Contents:
    """What one table holds; arrays by index of the entry."""

    #: Physical address of the table.
    address: int
    level: int
    #: uint64 in the byte order of this machine.
    values: npt.NDArray[np.uint64]
    #: uint8 of :class:`EntryClass`.
    kinds: npt.NDArray[np.uint8]

    def counts(self) -> dict[EntryClass, int]:
        """Count the entries by class; classes without any are left out."""
        number = np.bincount(self.kinds, minlength=len(EntryClass)).tolist()
        return {kind: number[kind] for kind in EntryClass if number[kind]}


def read_contents(
    prog: Program,
    paging: Paging,
    address: int,
    level: int,
    *,
    kernel: bool = False,
    kvm_owned: bool = False,
) -> Contents | None:
    """
    Read one table.

    :param address: Physical address.
    :param kernel: Whether it is the kernel's (:meth:`Paging.kernel_kinds`).
    :param kvm_owned: Whether it is KVM's own (:meth:`Paging.kvm_kinds`).
    :return: ``None`` if its memory cannot be read.
    """
    size = paging.levels[level].table_bytes
    blocks = read_blocks(prog, np.array([address], np.uint64), size)
    if not blocks.readable[0]:
        return None
    values = paging.values(raw_entries(blocks.data)[0])
    kinds = paging.classify(values, level)
    if kernel:
        kinds = paging.kernel_kinds(kinds, values, level)
    if kvm_owned:
        kinds = paging.kvm_kinds(kinds)
    return Contents(address, level, values, kinds)
