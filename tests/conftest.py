# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes depends on what else the machine does: no reason to fail.
settings.register_profile("ptinspect", deadline=None)
settings.load_profile("ptinspect")
