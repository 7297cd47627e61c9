# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records become text, JSON or CSV; escaping of what comes from the kernel lives here."""
