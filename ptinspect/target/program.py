# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that somebody else opened, as drgn's shell did: what it is, said as a target."""

from __future__ import annotations

from drgn import Program, ProgramFlags

from ptinspect.errors import TargetError
from ptinspect.target.live import KCORE
from ptinspect.target.options import Target, TargetKind
from ptinspect.target.xen import refuse_xen_pv

#: Where a program remembers the target that it was opened as.
_KEY = "ptinspect_target"


def remember_target(target: Target) -> None:
    """Let commands that are given only the program know how it was opened."""
    target.prog.config[_KEY] = target


def of_program(prog: Program) -> Target:
    """
    Say what an open program is.

    :raises TargetError: if it is no kernel, or one that ptinspect does not read
    """
    known = prog.config.get(_KEY)
    if isinstance(known, Target):
        return known
    if not prog.flags & ProgramFlags.IS_LINUX_KERNEL:
        raise TargetError("this program is not a Linux kernel")
    refuse_xen_pv(prog)
    live = bool(prog.flags & ProgramFlags.IS_LIVE)
    if prog.core_dump_path is not None:
        name = str(prog.core_dump_path)
    elif live and prog.flags & ProgramFlags.IS_LOCAL:
        name = str(KCORE)
    else:
        name = "prog"
    return Target(prog, TargetKind.PROGRAM, name, racing=live)
