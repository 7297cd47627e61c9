# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Headers of makedumpfile's compressed dumps (kdump) and of its flattened format."""

from __future__ import annotations

SIGNATURE = b"KDUMP   "
FLATTENED_SIGNATURE = b"makedumpfile\0\0\0\0"
