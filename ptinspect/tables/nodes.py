# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The NUMA node of a page, from its flags word."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from drgn import Program, TypeKind, sizeof


def nodes_shift(prog: Program) -> int:
    """
    Get NODES_SHIFT: how many bits a node number has.

    The macro is not in DWARF, but ``node_data`` has MAX_NUMNODES elements. A kernel without
    CONFIG_NUMA has one node and no ``node_data``.
    """
    try:
        type_ = prog.variable("node_data").type_
    except LookupError:
        return 0
    if type_.unaliased_kind() != TypeKind.ARRAY or not type_.unaliased().length:
        return 0
    return int(type_.unaliased().length or 1).bit_length() - 1


def page_nodes(prog: Program, flags: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """
    Get the node of each page.

    The node number lies in the uppermost bits of the flags word when the memory map is virtually
    contiguous (SECTIONS_WIDTH is 0 then; include/linux/page-flags-layout.h), which is the only
    sparse memory model that drgn supports.

    :param flags: uint64, shape (n,).
    :return: int64, shape (n,).
    """
    shift = nodes_shift(prog)
    if not shift:
        return np.zeros(len(flags), np.int64)
    bits = 8 * sizeof(prog.type("unsigned long"))
    nodes: npt.NDArray[np.int64] = (flags >> np.uint64(bits - shift)).astype(np.int64)
    return nodes
