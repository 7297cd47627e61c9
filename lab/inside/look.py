# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Run inside a guest: ask ptinspect about the kernel that it runs on, and the kernel about itself.

A question is a command, or ``drgn`` and commands of drgn's shell, which are all run in one session.
Some processes are made that rest, so that what both say of them can be compared exactly.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

DATA = Path("/data")
RESULTS = DATA / "results"

#: The number of membarrier(), which the C library has no function for.
MEMBARRIER = {"x86_64": 324, "s390x": 356, "aarch64": 283, "ppc64le": 365, "riscv64": 283}


def resting(name: str, pages: int, step: int, *, empty: bool = False) -> dict[str, object]:
    """
    Make a process that has touched pages, so many bytes apart, and then sleeps.

    :param empty: give the pages back, but not the tables
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        Path("/proc/self/comm").write_text(name)
        area = mmap.mmap(-1, pages * step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            area.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(pages):
            area[page * step] = 1
        if empty:
            area.madvise(mmap.MADV_DONTNEED)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        os.write(writing, struct.pack("=Q", start))
        while True:
            signal.pause()
    (start,) = struct.unpack("=Q", os.read(reading, 8))
    return {"name": name, "pid": pid, "start": start, "pages": pages, "step": step}


def pagemap(pid: int, address: int) -> int:
    """Read the entry of an address in /proc/PID/pagemap."""
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        file.seek(address // mmap.PAGESIZE * 8)
        return int(struct.unpack("=Q", file.read(8))[0])


def counted_tables() -> int:
    """What /proc/vmstat says, once stat_refresh folded the counters of the CPUs in."""
    Path("/proc/sys/vm/stat_refresh").write_text("1")
    vmstat = Path("/proc/vmstat").read_text()
    (count,) = re.findall(r"^nr_page_table_pages (\d+)$", vmstat, re.M)
    return int(count)


def kernel_says(pids: list[int]) -> dict[str, object]:
    """What /proc says of all page tables, and of some processes."""
    status = {}
    for pid in pids:
        text = Path(f"/proc/{pid}/status").read_text()
        status[pid] = dict(re.findall(r"^(VmPTE|VmRSS|Threads):\s+(\d+)", text, re.M))
    return {"nr_page_table_pages": counted_tables(), "status": status}


def wait_for_rcu() -> None:
    """Wait until every CPU has passed a quiescent state: tables that were freed before may go."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(MEMBARRIER[os.uname().machine]), ctypes.c_long(1), 0, 0):
        raise OSError(ctypes.get_errno(), "membarrier")


def settled(pids: list[int]) -> dict[str, object]:
    """What /proc says once RCU let go of the tables of the last process that ended."""
    wait_for_rcu()
    said = kernel_says(pids)
    for _ in range(20):
        time.sleep(1)
        before, said = said, kernel_says(pids)
        if before == said:
            break
    return said


SESSION = """
import sys
from drgn.commands import run_command

for line in sys.argv[1:]:
    print("@@", line, flush=True)
    run_command(prog, line)
    sys.stdout.flush()
"""


def ask(arguments: list[str], stem: Path) -> dict[str, object]:
    """
    Run a command to its end; its output goes to files.

    Meanwhile the kernel is asked again and again how many page tables there are.
    """
    if arguments[0] == "drgn":
        script = Path("/tmp/session.py")
        script.write_text(SESSION)
        arguments = ["python3", "-m", "drgn", str(script), *arguments[1:]]
    started = time.monotonic()
    with open(f"{stem}.out", "wb") as out, open(f"{stem}.err", "wb") as err:
        process = subprocess.Popen(arguments, stdout=out, stderr=err)
        most = pid = 0
        while not pid:
            time.sleep(0.2)
            most = max(most, counted_tables())
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    return {
        "arguments": arguments,
        "status": os.waitstatus_to_exitcode(status),
        "seconds": round(time.monotonic() - started, 2),
        "max_rss_kb": usage.ru_maxrss,
        "most_page_table_pages": most,
    }


def main() -> None:
    """Answer /data/questions.json."""
    questions = json.loads((DATA / "questions.json").read_text())
    RESULTS.mkdir(exist_ok=True)
    for wheel in DATA.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall("/data/site")
    # vmlinux is mapped, privately: more than there is memory.
    Path("/proc/sys/vm/overcommit_memory").write_text("1")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    processes = [resting("sparse", 300, 2 << 20), resting("dense", 2000, mmap.PAGESIZE)]
    for process in processes:
        address = int(process["start"])  # type: ignore[call-overload]
        process["pagemap"] = pagemap(int(process["pid"]), address)  # type: ignore[call-overload]
    pids = [int(process["pid"]) for process in processes]  # type: ignore[call-overload]
    words = {f"{{{p['name']}.pid}}": str(p["pid"]) for p in processes}
    words.update({f"{{{p['name']}.start}}": f"{p['start']:x}" for p in processes})
    answers = []
    for number, question in enumerate(questions):
        arguments = [
            re.sub(r"\{\w+\.\w+\}", lambda match: words[match[0]], word) for word in question
        ]
        print(f"@@live: {' '.join(arguments)}", flush=True)
        before = settled(pids)
        answer = ask(arguments, RESULTS / f"{number:02}")
        answers.append({**answer, "before": before, "after": settled(pids)})
    document = {
        "release": os.uname().release,
        "machine": os.uname().machine,
        "python": sys.version.split()[0],
        "page_size": mmap.PAGESIZE,
        "memory_kb": int(re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[0]),
        "command_line": Path("/proc/cmdline").read_text().strip(),
        "processes": processes,
        "answers": answers,
    }
    (RESULTS / "answers.json").write_text(json.dumps(document, indent=1))
    os.sync()


if __name__ == "__main__":
    main()
