# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Run inside a guest: make processes that rest, note what the kernel says of them, and crash it.

The kernel that is started by the crash runs capture.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from look import DATA, RESULTS, kernel_says, pagemap, resting  # type: ignore[import-not-found]


def load_capture_kernel() -> None:
    """Have the kernel ready that is started when this one crashes."""
    console = [w for w in Path("/proc/cmdline").read_text().split() if w.startswith("console=")]
    words = " ".join([*console, "panic=-1", "nr_cpus=1", "reset_devices", "lab_script=capture"])
    subprocess.run(
        [
            *("kexec", "-s", "-p", str(DATA / "image"), f"--initrd={DATA / 'initramfs'}"),
            f"--append={words}",
        ],
        check=True,
    )


def main() -> None:
    """Load the capture kernel, if one is wanted, write down the truth, crash."""
    RESULTS.mkdir(exist_ok=True)
    if "crashkernel=" in Path("/proc/cmdline").read_text():
        load_capture_kernel()
    processes = [
        resting("sparse", 300, 2 << 20),
        resting("dense", 2000, os.sysconf("SC_PAGESIZE")),
        resting("emptied", 100, 2 << 20, empty=True),
    ]
    for process in processes:
        process["pagemap"] = pagemap(int(process["pid"]), int(process["start"]))
    pids = [int(process["pid"]) for process in processes]
    truth = {"release": os.uname().release, "processes": processes, "kernel": kernel_says(pids)}
    (RESULTS / "truth.json").write_text(json.dumps(truth, indent=1))
    os.sync()
    print("@@live: crash", flush=True)
    Path("/proc/sys/kernel/sysrq").write_text("1")
    Path("/proc/sysrq-trigger").write_text("c")


if __name__ == "__main__":
    main()
