# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line."""

from ptinspect.cli.main import main

__all__ = ["main"]
