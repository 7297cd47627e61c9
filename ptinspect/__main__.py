# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m ptinspect``."""

from ptinspect.cli import main

if __name__ == "__main__":
    main()
