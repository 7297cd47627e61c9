# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory that a process has mapped, to set its page tables beside."""

from __future__ import annotations

from drgn import FaultError, Object, Program
from drgn.helpers.linux.mm import task_rss

from ptinspect.tables.spaces import Space


def resident_pages(prog: Program, space: Space) -> int | None:
    """
    Get the resident set size of a space in pages, swapped pages not included.

    :return: ``None`` if no task has the space or the counters cannot be read.
    """
    if not space.tasks:
        return None
    task = Object(prog, "struct task_struct *", space.tasks[0].address)
    try:
        return int(task_rss(prog, task).total)
    except FaultError:
        return None
