# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A live kernel, a dump, a QEMU guest or a sample, opened as a drgn program."""

from __future__ import annotations

from ptinspect.target.opening import open_symbols, open_target
from ptinspect.target.options import Target, TargetKind, TargetOptions
from ptinspect.target.samples import sample_names

__all__ = [
    "Target",
    "TargetKind",
    "TargetOptions",
    "open_symbols",
    "open_target",
    "sample_names",
]
