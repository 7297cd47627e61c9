# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A sample that has been opened and scanned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from drgn import Program

from ptinspect.tables.scan import MemmapScan


@dataclass(frozen=True)
class Sample:
    name: str
    prog: Program
    #: What the guest's own kernel said at the instant of the dump.
    truth: dict[str, Any]
    scan: MemmapScan
    #: The kernel's own dumps of its page tables (debugfs), by file name.
    texts: dict[str, str]
