# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nothing is found in stock kernels that rest, stopped."""

from __future__ import annotations

from test_checks import test_silent_on_a_healthy_kernel

__all__ = ("test_silent_on_a_healthy_kernel",)
