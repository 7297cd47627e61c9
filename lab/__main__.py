# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m lab``."""

from lab.cli import main

main()
