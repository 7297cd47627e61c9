# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Run inside a guest: load a driver with a bug in page tables, and have its victim crash the kernel.

The driver is lab/provoke/ptring.c. The kernel that is started by the crash runs capture.py.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import signal
from pathlib import Path

from crash import load_capture_kernel  # type: ignore[import-not-found]
from look import DATA, RESULTS, kernel_says, pagemap, resting  # type: ignore[import-not-found]

#: Memory of the process: some PTE tables, of which the driver spoils one.
TABLE_SPAN = 2 << 20
TABLES = 4
SPOILT = 2

_FINIT_MODULE = {"x86_64": 313}


def insert_module(path: Path, parameters: str) -> None:
    """Load a module, as insmod does."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file:
        number = _FINIT_MODULE[platform.machine()]
        if libc.syscall(number, file.fileno(), parameters.encode(), 0):
            error = ctypes.get_errno()
            raise OSError(error, f"{path.name}: {os.strerror(error)}")


def victim() -> tuple[int, int, int]:
    """
    Make a process that has PTE tables, one of them without pages, and waits.

    :return: its number, where the span of that table begins, and what to write to for it to go on
    """
    reading, writing = os.pipe()
    told, telling = os.pipe()
    pid = os.fork()
    if pid == 0:
        Path("/proc/self/comm").write_text("buffers")
        area = mmap.mmap(-1, TABLES * TABLE_SPAN, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(mmap.MADV_NOHUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        first, last = -start % TABLE_SPAN, len(area) - TABLE_SPAN
        spans = range(first, last + 1, TABLE_SPAN)
        for at in spans:
            area[at] = 1
        # Its pages are given back; the table, now empty, stays.
        spoilt = spans[SPOILT - 1]
        area.madvise(mmap.MADV_DONTNEED, spoilt, TABLE_SPAN)
        os.write(telling, (start + spoilt).to_bytes(8, "little"))
        os.read(reading, 1)
        area[spoilt] = 1
        os.write(telling, bytes(8))  # not reached
        signal.pause()
    return pid, int.from_bytes(os.read(told, 8), "little"), writing


def main() -> None:
    """Load the capture kernel, write down the truth, load the driver, let the victim go on."""
    RESULTS.mkdir(exist_ok=True)
    load_capture_kernel()
    Path("/proc/sys/kernel/panic_on_oops").write_text("1")
    # More memory is mapped than there is; little of it is touched.
    Path("/proc/sys/vm/overcommit_memory").write_text("1")
    processes = [
        resting("sparse", 60, TABLE_SPAN),
        resting("dense", 500, mmap.PAGESIZE),
        resting("emptied", 40, TABLE_SPAN, empty=True),
    ]
    for process in processes:
        process["pagemap"] = pagemap(int(process["pid"]), int(process["start"]))
    pid, address, go_on = victim()
    pids = [*(int(process["pid"]) for process in processes), pid]
    truth = {
        "release": os.uname().release,
        "processes": processes,
        "victim": {"pid": pid, "address": address},
        "kernel": kernel_says(pids),
    }
    (RESULTS / "truth.json").write_text(json.dumps(truth, indent=1))
    insert_module(DATA / "ptring.ko", f"pid={pid} address={address:#x}")
    os.sync()
    print("@@live: crash", flush=True)
    os.write(go_on, b"\n")
    signal.pause()


main()
