# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A program that behaves as bpftrace does with the generated script, without a kernel.

``FAKE_BPFTRACE`` says how: ``ok``, ``fails`` (cannot attach), ``silent`` (never ready), ``dies``
(in the middle), ``stubborn`` (SIGTERM does not end it), ``full`` (a map is full), ``late`` (an
event comes at the end).
"""

import json
import os
import signal
import sys
import time
from types import FrameType
from typing import Optional

MODE = os.environ.get("FAKE_BPFTRACE", "ok")
on = False
begun = time.monotonic()


def write(kind: str, data: object) -> None:
    os.write(1, (json.dumps({"type": kind, "data": data}) + "\n").encode())


def nsecs() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def reading(end: bool) -> None:
    write("printf", f"reading {nsecs()}\n")
    write("map", {"@made": {"1": 5, "2": 2}})
    write("map", {"@made_pages": 7})
    write("map", {"@gone": {"1": 4}})
    write("map", {"@gone_pages": 4})
    write("map", {"@made_by": {"42,odd\x1b[2J,1": 5, "42,odd\x1b[2J,2": 2}})
    write("map", {"@freed": {"3,1": 4}})
    write("map", {"@freed_by": {"42,odd\x1b[2J,3,1": 4}})
    write("hist", {"@wait_us": {"3": [{"min": 2048, "max": 2559, "count": 4}]}})
    write("map", {"@unlinked_first": 0})
    write("map", {"@unlinked_way3": 4})
    if end:
        write("map", {"@live": {"4096": [nsecs() - 10**10, 1, 64, 42, "odd"]}})
        write("map", {"@exited": {"64": nsecs() - 9 * 10**9}})
    write("printf", "end\n" if end else "read\n")


def turn(number: int, frame: Optional[FrameType]) -> None:
    global on
    on = not on
    write("printf", f"gate {int(on)} {nsecs()}\n")


def finish(number: int, frame: Optional[FrameType]) -> None:
    if MODE == "stubborn":
        return
    if MODE == "late":
        write("printf", "made 5 40 1 80 42 sh\n")
    if on or begun:
        reading(end=True)
    os._exit(0)


if "--version" in sys.argv:
    print(os.environ.get("FAKE_VERSION", "bpftrace v0.23.2"))
    sys.exit()
assert sys.argv[-5:-1] == ["-f", "json", "-B", "line"]
if os.environ.get("FAKE_PIDFILE"):
    with open(os.environ["FAKE_PIDFILE"], "w") as out:
        out.write(str(os.getpid()))
print("script.bt:1:1-2: WARNING: Return value discarded.", flush=True)
if MODE == "fails":
    print("script.bt:3-4: ERROR: fentry/fexit not available for your kernel version.", flush=True)
    sys.exit(1)
signal.signal(signal.SIGUSR1, turn)
signal.signal(signal.SIGTERM, finish)
write("attached_probes", {"probes": 30})
while True:
    time.sleep(0.05)
    if MODE == "silent":
        continue
    if on:
        reading(end=False)
        if MODE == "dies":
            os._exit(3)
        if MODE == "full":
            write("helper_error", {"msg": "Map full; can't update element"})
    else:
        write("printf", "waiting\n")
