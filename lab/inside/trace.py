# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Runs inside a guest: one trace over a large load, and over many small ones, each of which uses page
tables in its own way.

The large load's VmPTE is read while it holds its tables, all of which it made under the trace.
Each small load is a process with a name of its own, so that the trace's rows tell them apart; what
the kernel itself says (VmPTE, AnonHugePages, vmstat) is noted beside. At the end, if the module is
there, it leaks a table and holds RCU up, and if the kernel's debug file is there, the running
kernel is asked about its orphans.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

SPAN = 1 << 20 if os.uname().machine == "s390x" else 1 << 21  # what one PTE table maps
GIB = 1 << 30
RECORD, ERRORS = Path("/tmp/trace.jsonl"), Path("/tmp/errors")
MODULE = Path("/project/ptprovoke.ko")
DEBUG = Path(f"/usr/lib/debug/boot/vmlinux-{platform.release()}")

READ, WRITE = 1, 2
SHARED, PRIVATE, FIXED, ANONYMOUS, NORESERVE = 1, 2, 0x10, 0x20, 0x4000
DONTNEED, HUGEPAGE, NOHUGEPAGE, COLLAPSE = 4, 14, 15, 25
MFD_HUGETLB = 4
FINIT_MODULE = {"x86_64": 313, "s390x": 344}.get(os.uname().machine, 273)
SET_NAME = 15  # prctl

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_memory(
    size: int,
    protection: int = READ,
    flags: int = PRIVATE | ANONYMOUS,
    fd: int = -1,
    at: int = 0,
    align: int = SPAN,
) -> int:
    """Map memory that begins at a multiple of *align*."""
    if not at:
        whole = libc.mmap(None, size + align, 0, PRIVATE | ANONYMOUS | NORESERVE, -1, 0)
        at = -(-whole // align) * align
    got = libc.mmap(at, size, protection, flags | NORESERVE | FIXED, fd, 0)
    if got != at:
        raise OSError(ctypes.get_errno(), "mmap")
    return at


def advise(start: int, size: int, advice: int) -> int:
    """Get 0, or the error."""
    return 0 if libc.madvise(start, size, advice) == 0 else ctypes.get_errno()


def touch(start: int, size: int, step: int = SPAN, write: bool = False) -> None:
    """Read, or write, a byte of each step."""
    for address in range(start, start + size, step):
        byte = ctypes.c_byte.from_address(address)
        if write:
            byte.value = 1
        else:
            byte.value  # noqa: B018 (the read is what is wanted)


def status(key: str, path: str = "/proc/self/status") -> int:
    """A number of /proc/self/status or smaps_rollup, KiB."""
    with open(path) as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def provoke(options: str) -> int:
    """Load the module, which does its work and refuses to stay; get the error."""
    with MODULE.open("rb") as module:
        libc.syscall(FINIT_MODULE, module.fileno(), options.encode(), 0)
    return ctypes.get_errno()


def fault() -> dict[str, Any]:
    """64 tables by reading, and unmapped again."""
    before = status("VmPTE")
    start = map_memory(64 * SPAN)
    advise(start, 64 * SPAN, NOHUGEPAGE)
    touch(start, 64 * SPAN)
    held = status("VmPTE")
    libc.munmap(start, 64 * SPAN)
    return {"tables_kib": held - before, "after_kib": status("VmPTE") - before}


def fork() -> dict[str, Any]:
    """20 children, one after the other, each with a copy of this process's tables."""
    start = map_memory(32 * SPAN, READ | WRITE)
    advise(start, 32 * SPAN, NOHUGEPAGE)
    touch(start, 32 * SPAN, write=True)
    child_kib = 0
    for _ in range(20):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(write, str(status("VmPTE")).encode())
            os._exit(0)
        child_kib += int(os.read(read, 20))
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
    return {"children_kib": child_kib}


def execute() -> dict[str, Any]:
    """20 programs, one after the other."""
    for _ in range(20):
        subprocess.run(["/usr/busybox/true"], check=True)
    return {"programs": 20}


def large_exit() -> dict[str, Any]:
    """5,000 tables, left to exit."""
    start = map_memory(5000 * SPAN)
    advise(start, 5000 * SPAN, NOHUGEPAGE)
    touch(start, 5000 * SPAN)
    return {"tables_kib": status("VmPTE")}


def move() -> dict[str, Any]:
    """mremap 16 tables' worth to an address that no whole table fits: new tables are needed."""
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = (
        [ctypes.c_void_p] + [ctypes.c_size_t] * 2 + [ctypes.c_int, ctypes.c_void_p]
    )
    start = map_memory(16 * SPAN, READ | WRITE)
    advise(start, 16 * SPAN, NOHUGEPAGE)
    touch(start, 16 * SPAN, write=True)
    there = map_memory(17 * SPAN, 0)
    moved = libc.mremap(start, 16 * SPAN, 16 * SPAN, 3, there + SPAN // 2)
    return {"moved": moved == there + SPAN // 2}


def huge_pages() -> dict[str, Any]:
    """32 anonymous huge pages; 8 are split; all are unmapped."""
    start = map_memory(32 * SPAN, READ | WRITE)
    failed = advise(start, 32 * SPAN, HUGEPAGE)
    before = status("VmPTE")
    touch(start, 32 * SPAN, write=True)
    huge = status("AnonHugePages", "/proc/self/smaps_rollup")
    made = status("VmPTE") - before
    for i in range(8):
        advise(start + i * SPAN, 4096, DONTNEED)
    left = status("AnonHugePages", "/proc/self/smaps_rollup")
    split = status("VmPTE") - before
    libc.munmap(start, 32 * SPAN)
    return {
        "failed": failed,
        "huge_kib": huge,
        "after_split_kib": left,
        "made_kib": made,
        "made_with_split_kib": split,
    }


def collapse() -> dict[str, Any]:
    """8 ranges of small anonymous pages that become huge ones."""
    start = map_memory(8 * SPAN, READ | WRITE)
    touch(start, 8 * SPAN, 4096, write=True)
    before = status("VmPTE")
    failed = advise(start, 8 * SPAN, COLLAPSE)
    huge = status("AnonHugePages", "/proc/self/smaps_rollup")
    after = status("VmPTE")
    libc.munmap(start, 8 * SPAN)
    return {"failed": failed, "huge_kib": huge, "pte_kib": [before, after]}


def collapse_file(size: int = 8) -> dict[str, Any]:
    """8 ranges of shared memory that become huge pages under the feet of this and a child."""
    fd = os.memfd_create("shared")
    os.ftruncate(fd, size * SPAN)
    start = map_memory(size * SPAN, READ | WRITE, SHARED, fd)
    touch(start, size * SPAN, 4096, write=True)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        name_this("w-shmem2")
        touch(start, size * SPAN, 4096)
        os.write(write, b"x")
        signal.pause()
    os.read(read, 1)
    before = status("VmPTE"), status("VmPTE", f"/proc/{pid}/status")
    failed = advise(start, size * SPAN, COLLAPSE)
    huge = status("ShmemPmdMapped", "/proc/self/smaps_rollup")
    after = status("VmPTE"), status("VmPTE", f"/proc/{pid}/status")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return {"failed": failed, "huge_kib": huge, "pte_kib": [before, after]}


def hugetlb() -> dict[str, Any]:
    """A PMD table that two processes share, or, where their addresses do not fit, two tables."""
    with open("/proc/sys/vm/nr_hugepages", "w") as pages:
        pages.write("4")
    with open("/proc/sys/vm/nr_hugepages") as pages:
        have = int(pages.read())
    fd = os.memfd_create("huge", MFD_HUGETLB)
    os.ftruncate(fd, 2 * GIB)
    shared = map_memory(GIB, READ | WRITE, SHARED, fd, align=GIB)
    small = map_memory(GIB // 2, READ | WRITE, SHARED, fd, align=GIB)
    kib = [status("VmPTE")]
    touch(shared, 1, write=True)
    kib.append(status("VmPTE"))
    touch(small, 1, write=True)
    kib.append(status("VmPTE"))
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        name_this("w-huge2")
        mine = [status("VmPTE")]
        touch(shared, 1)
        mine.append(status("VmPTE"))
        touch(small, 1)
        mine.append(status("VmPTE"))
        os.write(write, json.dumps(mine).encode())
        os._exit(0)
    child = json.loads(os.read(read, 100))
    os.waitpid(pid, 0)
    return {"pages": have, "pte_kib": kib, "child_pte_kib": child}


def reclaim() -> dict[str, Any]:
    """16 tables whose pages are given up, but not their addresses (7.2: CONFIG_PT_RECLAIM)."""
    start = map_memory(16 * SPAN, READ | WRITE)
    advise(start, 16 * SPAN, NOHUGEPAGE)
    touch(start, 16 * SPAN, write=True)
    before = status("VmPTE")
    advise(start, 16 * SPAN, DONTNEED)
    return {"pte_kib": [before, status("VmPTE")]}


def kernel_tables() -> dict[str, Any]:
    """64 MiB of vmalloc space twice: by small pages, then by huge ones at the same place."""
    before = vmstat()
    errors = [provoke("what=vmap pages=16384")]
    middle = vmstat()
    errors.append(provoke("what=huge pages=16384"))
    return {"errors": errors, "nr_page_table_pages": [before, middle, vmstat()]}


def leak() -> dict[str, Any]:
    """Two tables, one of which the module takes out of the tree; then exit."""
    start = map_memory(2 * SPAN)
    advise(start, 2 * SPAN, NOHUGEPAGE)
    touch(start, 2 * SPAN)
    return {"error": provoke(f"what=leak addr={start:#x}"), "va": start}


def hold(tables: int) -> None:
    """A program of its own: a table for each span, and word when they are there."""
    start = map_memory(tables * SPAN)
    advise(start, tables * SPAN, NOHUGEPAGE)
    touch(start, tables * SPAN)
    print("held", flush=True)
    sys.stdin.readline()


def large(tables: int) -> dict[str, Any]:
    """Hold that many tables until a reading of the trace has them."""
    child = subprocess.Popen(
        [sys.executable, __file__, "--hold", str(tables)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    begun = time.monotonic()
    assert child.stdout.readline() == "held\n"
    seconds = round(time.monotonic() - begun, 2)
    kib = status("VmPTE", f"/proc/{child.pid}/status")
    rows = held_by(child.pid, time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    assert status("VmPTE", f"/proc/{child.pid}/status") == kib
    child.communicate("\n")
    return {"pid": child.pid, "vm_pte_kib": kib, "seconds": seconds, "rows": rows}


def held_by(pid: int, after: int) -> list[dict[str, Any]]:
    """Get a process's rows in the first reading that was begun after a moment."""
    place = 0
    while True:
        with RECORD.open() as record:
            record.seek(place)
            for line in iter(record.readline, ""):
                if not line.endswith("\n"):
                    break
                place = record.tell()
                said = json.loads(line)
                if said["kind"] == "reading" and said["nsecs"] > after:
                    return [row for row in said["processes"] if row["pid"] == pid]
        time.sleep(0.2)


LOADS: list[Callable[[], dict[str, Any]]] = [
    fault, fork, execute, large_exit, move, huge_pages, collapse, collapse_file, hugetlb, reclaim,
]  # fmt: skip


def vmstat() -> int:
    """nr_page_table_pages, folded."""
    Path("/proc/sys/vm/stat_refresh").read_bytes()
    with open("/proc/vmstat") as lines:
        return next(
            int(line.split()[1]) for line in lines if line.startswith("nr_page_table_pages")
        )


def name_this(name: str) -> None:
    """Name this thread: at most 15 signs."""
    libc.prctl(SET_NAME, name[:15].encode(), 0, 0, 0)


def run(load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a load in a process of its name; get what it found, and its number."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        name_this(f"w-{load.__name__}")
        try:
            found = load()
        except BaseException as error:
            found = {"failure": repr(error)}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        found = json.loads(answer.read() or "{}")
    os.waitpid(pid, 0)
    return {"pid": pid, **found}


@contextlib.contextmanager
def rcu_held_up() -> Iterator[None]:
    """Hold RCU up in another process as long as the block runs, two minutes at most."""
    pid = os.fork()
    if not pid:
        name_this("w-stall")
        os._exit(provoke("what=stall ms=120000") & 0x7F)
    while b"ptprovoke: holds RCU up" not in subprocess.check_output(["dmesg"]):
        time.sleep(0.2)
    time.sleep(0.5)
    yield
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def ask(*words: str) -> dict[str, Any]:
    """Ask ptinspect about the kernel that runs here."""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "ptinspect", *words], capture_output=True, text=True
    )
    return {
        "arguments": words,
        "status": done.returncode,
        "out": done.stdout[-20000:],
        "errors": done.stderr[-2000:],
        "seconds": round(time.monotonic() - begun, 1),
    }


def progress(text: str) -> None:
    """Tell the console how far it has come."""
    print(f"@@at {text} {time.monotonic():.0f}", flush=True)


def question(*words: str) -> dict[str, Any]:
    """Ask a question that needs the record of the trace."""
    return ask(*words, "--trace", str(RECORD))


def main() -> None:
    """Trace the loads; print all that was found in lines of JSON."""
    tables, *options = sys.argv[1:]
    said: dict[str, Any] = {"release": platform.release(), "loads": {}, "asked": []}
    debug, module = DEBUG.exists(), MODULE.exists()
    command = ["trace", "--format", "jsonl", "--stacks", "--leaks", "2s"]
    command += ["--top", "1000", "--interval", "2"]
    with RECORD.open("w") as record, ERRORS.open("w") as errors:
        trace = subprocess.Popen(
            [sys.executable, "-m", "ptinspect", *command, *options], stdout=record, stderr=errors
        )
    begun = time.monotonic()
    while not RECORD.stat().st_size and trace.poll() is None:
        time.sleep(0.2)
    said["attach_seconds"] = round(time.monotonic() - begun, 1)
    if trace.poll() is None:
        run_loads(said, int(tables), trace, debug=debug, module=module)
    said["status"] = trace.wait()
    progress("ended")
    said["errors"] = ERRORS.read_text()[-2000:]
    lines = RECORD.read_text().splitlines()
    said["lines"] = len(lines)
    said["summary"] = json.loads(lines[-1]) if lines else {}
    if debug:
        said["asked"] += [question("check", "--only", "typed-reachability")]
        leaked = [row for row in said["summary"]["tables"]["left"] if "suspect" in row["verdict"]]
        if leaked:
            said["asked"] += [question("show", f"page:{leaked[0]['page']}")]
    said["left"] = subprocess.run(["pidof", "bpftrace"], capture_output=True, text=True).stdout
    text = json.dumps(said)
    for i in range(0, len(text), 4000):
        print("@@said " + text[i : i + 4000], flush=True)


def run_loads(
    said: dict[str, Any],
    tables: int,
    trace: subprocess.Popen[bytes],
    *,
    debug: bool,
    module: bool,
) -> None:
    """Run all loads, and end the trace."""
    progress("loads")
    said["large"] = large(tables)
    for load in LOADS:
        said["loads"][load.__name__] = run(load)
        time.sleep(0.3)
    if module:
        said["loads"]["kernel_tables"] = run(kernel_tables)
        said["loads"]["leak"] = run(leak)
    time.sleep(4)
    if debug and "--events" in sys.argv:
        progress("questions")
        said["asked"] += [
            question("list", "--orphan", "--format", "json"),
            question("check", "--only", "typed-reachability"),
        ]
    if not module or debug:
        trace.send_signal(signal.SIGINT)
        return
    progress("stall")
    with rcu_held_up():
        said["loads"]["held"] = run(fault)
        said["loads"]["held_file"] = run(collapse_file)
        time.sleep(4)
        # It closes its gate now, and cannot take its hooks away until RCU goes on.
        trace.send_signal(signal.SIGINT)
        time.sleep(10)


if sys.argv[1] == "--hold":
    hold(int(sys.argv[2]))
else:
    main()
