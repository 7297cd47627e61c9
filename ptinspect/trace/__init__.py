# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Page tables as they are made and freed, by eBPF: a bpftrace script, its runner, its totals."""
