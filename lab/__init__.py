# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab: kernels, guests, dumps and the samples made of them (see docs/lab.md)."""
