# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measurements beside their limit (raw reads) and their peers, all in one run."""
