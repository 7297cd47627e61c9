# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run by the kernel that a crash started: write the crashed kernel's memory to the disk."""

from __future__ import annotations

import json
import os
import subprocess

from look import DATA, RESULTS  # type: ignore[import-not-found]


def main() -> None:
    """Filter /proc/vmcore in each of the ways that /data/questions.json names."""
    for name, options in json.loads((DATA / "questions.json").read_text()).items():
        print(f"@@live: makedumpfile {' '.join(options)}", flush=True)
        target = RESULTS / name
        with open(f"{target}.log", "wb") as log:
            subprocess.run(
                ["makedumpfile", *options, "/proc/vmcore", str(target)],
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
    os.sync()


main()
