# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Runs inside a guest: traces a load, and prints what the kernel itself says beside it.

The load's VmPTE (/proc/PID/status) is read while it holds its tables, and its tables are counted
by the trace from its start, since it starts after the trace.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ERRORS = Path("/tmp/errors")
TABLES = int(sys.argv[1])
OPTIONS = sys.argv[2:]


def load() -> None:
    """In a child: a table for each 2 MiB (s390x: 1 MiB), held until the parent says so."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    span = 1 << 20 if os.uname().machine == "s390x" else 1 << 21
    # PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS|MAP_NORESERVE: each touch maps the zero page.
    start = libc.mmap(None, TABLES * span, 1, 0x4022, -1, 0)
    assert start not in (None, 2**64 - 1)
    libc.madvise(start, TABLES * span, 15)  # MADV_NOHUGEPAGE
    touch = ctypes.c_byte.from_address
    for i in range(TABLES):
        touch(start + i * span).value  # noqa: B018 (the read is what is wanted)
    print("held", flush=True)
    sys.stdin.readline()


def tables_kib(pid: int) -> int:
    """VmPTE."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmPTE"))


def main() -> None:
    """Trace the load."""
    trace = subprocess.Popen(
        [sys.executable, "-m", "ptinspect", "trace", "--format", "jsonl", *OPTIONS],
        stdout=subprocess.PIPE,
        stderr=ERRORS.open("w"),
        text=True,
    )
    begun = time.monotonic()
    first = trace.stdout.readline()
    said = {"attach_seconds": round(time.monotonic() - begun, 1)}
    if not first:
        said["errors"] = ERRORS.read_text()
        print("@@said " + json.dumps(said), flush=True)
        return
    child = subprocess.Popen(
        [sys.executable, __file__, str(TABLES), "--load"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    begun = time.monotonic()
    assert child.stdout.readline() == "held\n"
    said["load_seconds"] = round(time.monotonic() - begun, 2)
    said["pid"], said["vm_pte_kib"] = child.pid, tables_kib(child.pid)
    # What the trace says of it meanwhile: a reading that was begun after now.
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    for line in trace.stdout:
        reading = json.loads(line)
        if reading["nsecs"] > now:
            break
    said["held"] = [row for row in reading["processes"] if row["pid"] == child.pid]
    assert tables_kib(child.pid) == said["vm_pte_kib"]
    for _ in range(20):
        subprocess.run(["/usr/busybox/true"])
    child.communicate("\n")
    time.sleep(3)
    trace.send_signal(signal.SIGINT)
    lines = trace.stdout.read().splitlines()
    said["status"] = trace.wait()
    said["errors"] = ERRORS.read_text()
    said["summary"] = json.loads(lines[-1])
    left = subprocess.run(["pidof", "bpftrace"], capture_output=True, text=True).stdout
    said["left"] = left.strip()
    text = json.dumps(said)
    for i in range(0, len(text), 4000):
        print("@@said " + text[i : i + 4000], flush=True)


if "--load" in sys.argv:
    load()
else:
    main()
