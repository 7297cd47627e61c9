# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Levels and entry formats of a target's page tables, as data; one module an architecture."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from drgn import Architecture, Program

from ptinspect.errors import TargetError
from ptinspect.kernel.paging.model import (
    ALL_PERMISSIONS,
    Attribute,
    EntryClass,
    Level,
    MmFields,
    Paging,
    Permission,
    Root,
)

__all__ = (
    "ALL_PERMISSIONS",
    "Attribute",
    "EntryClass",
    "Level",
    "MmFields",
    "Paging",
    "Permission",
    "Root",
    "paging_of",
)

#: Each module has read_paging(prog) -> Paging. Imported when needed.
_MODULES = {
    Architecture.X86_64: "x86_64",
    Architecture.S390X: "s390x",
    Architecture.PPC64: "ppc64",
    Architecture.AARCH64: "aarch64",
    Architecture.RISCV64: "riscv64",
}

_CACHE_KEY = "ptinspect.paging"


def paging_of(prog: Program) -> Paging:
    """
    Get the paging of a target. What varies at run time is read from it, once.

    :param prog: The kernel.
    :return: Its levels, entry formats and modes.
    :raises TargetError: if the architecture or its paging mode is not supported
    :raises FaultError: if the target lacks the memory that tells the mode
    """
    if _CACHE_KEY not in prog.cache:
        prog.cache[_CACHE_KEY] = _read_paging(prog)
    return cast(Paging, prog.cache[_CACHE_KEY])


def _read_paging(prog: Program) -> Paging:
    platform = prog.platform
    if platform is None:
        raise TargetError("the target's architecture is not known")
    try:
        name = _MODULES[platform.arch]
    except KeyError:
        raise TargetError(
            f"page tables of {platform.arch.name} are not supported; supported are "
            + ", ".join(sorted(_MODULES.values()))
        ) from None
    module = import_module(f"ptinspect.kernel.paging.{name}")
    return cast(Paging, module.read_paging(prog))
