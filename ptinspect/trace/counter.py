# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's own count of page-table pages, beside which a trace is held."""

from __future__ import annotations

from pathlib import Path

_REFRESH = Path("/proc/sys/vm/stat_refresh")
_VMSTAT = Path("/proc/vmstat")


def page_table_pages(root: Path = Path("/")) -> int | None:
    """
    Read nr_page_table_pages, with what the CPUs have not yet folded in.

    :return: pages, or ``None`` if it cannot be read or cannot be folded
    """
    try:
        # Reading the file folds every CPU's part into the sum (mm/vmstat.c:vmstat_refresh).
        (root / _REFRESH.relative_to("/")).read_bytes()
        for line in (root / _VMSTAT.relative_to("/")).read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "nr_page_table_pages":
                return int(value)
    except (OSError, ValueError):
        pass
    return None
