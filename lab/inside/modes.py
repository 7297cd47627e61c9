# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Runs inside a guest: one trace after the other, each with other options, and what they cost.

Two processes of different names, one of them in a cgroup of its own, each make 100 tables a round;
a third does rounds of pure table churn, timed, with and without a trace.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pty
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPAN = 1 << 21
ROUND = 100
CHURN, ROUNDS = 5000, 8
CGROUP = Path("/sys/fs/cgroup/lab")
PRIVATE_ANONYMOUS = 0x4022  # and MAP_NORESERVE
NOHUGEPAGE = 15
SET_NAME = 15  # prctl

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def make(tables: int) -> int:
    """Map and touch; get where."""
    start: int = libc.mmap(None, (tables + 1) * SPAN, 1, PRIVATE_ANONYMOUS, -1, 0)
    libc.madvise(start, (tables + 1) * SPAN, NOHUGEPAGE)
    first = -(-start // SPAN) * SPAN
    for address in range(first, first + tables * SPAN, SPAN):
        ctypes.c_byte.from_address(address).value  # noqa: B018 (the read is what is wanted)
    return start


def worker(name: str, cgroup: bool) -> None:
    """For each line on stdin a round; the end of stdin is the end, with a last round left over."""
    if cgroup:
        (CGROUP / "cgroup.procs").write_text(str(os.getpid()))
    libc.prctl(SET_NAME, name.encode(), 0, 0, 0)
    print("ready", flush=True)
    for _ in sys.stdin:
        libc.munmap(make(ROUND), (ROUND + 1) * SPAN)
        print("done", flush=True)
    make(ROUND)


class Worker:
    """A process that makes tables when it is told to."""

    def __init__(self, name: str, *, cgroup: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, str(int(cgroup))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._hear()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def round(self) -> None:
        """Make 100 tables and unmap them."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._hear()

    def end(self) -> None:
        """Make 100 more, and exit with them."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def traced(answer: dict[str, Any], *options: str) -> Iterator[subprocess.Popen[str]]:
    """Trace in jsonl; what came out goes into *answer*."""
    command = [sys.executable, "-m", "ptinspect", "trace", "--format", "jsonl", *options]
    trace = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun = time.monotonic()
    assert trace.stdout is not None
    assert trace.stderr is not None
    first = trace.stdout.readline()
    answer["options"], answer["attach_seconds"] = options, round(time.monotonic() - begun, 1)
    print(f"@@at {options}", flush=True)
    if not first:
        raise RuntimeError(trace.stderr.read())
    yield trace
    if not any(option.startswith("--until") for option in options):
        time.sleep(3)
        trace.send_signal(signal.SIGTERM)
    ended = time.monotonic()
    lines = [json.loads(line) for line in trace.stdout]
    answer["status"] = trace.wait()
    answer["seconds_to_end"] = round(time.monotonic() - ended, 1)
    summary = lines[-1]
    answer["footer"] = summary["tables"]["footer"]
    answer["missing"], answer["notes"] = summary["missing"], summary["notes"]
    answer["processes"] = [
        {key: value for key, value in row.items() if value}
        for row in summary["tables"]["processes"][:6]
    ]
    answer["ways"] = summary["tables"].get("ways")
    events: dict[str, int] = {}
    for line in lines:
        if line["kind"] in ("made", "unlinked", "freed"):
            key = f"{line['kind']} {line['comm']}/{line['pid']} {line['level']}"
            events[key] = events.get(key, 0) + 1
        elif line["kind"] == "ended":
            events["ended"] = events.get("ended", 0) + 1
    answer["events"] = events


def filtered() -> Iterator[dict[str, Any]]:
    """Traces that follow one of two processes."""
    CGROUP.mkdir(exist_ok=True)
    for options in (
        ["--pid", "{one}", "--until-exit", "{one}", "--events"],
        ["--comm", "w-one", "--events"],
        ["--cgroup", "lab", "--events"],
    ):
        one, two = Worker("w-one", cgroup=True), Worker("w-two")
        answer: dict[str, Any] = {"one": one.process.pid, "two": two.process.pid}
        words = [word.format(one=one.process.pid) for word in options]
        with traced(answer, *words):
            for _ in range(3):
                one.round()
                two.round()
            one.end()
        two.end()
        yield answer


def churn() -> list[float]:
    """Time rounds of map, touch, unmap, milliseconds."""
    times = []
    for _ in range(ROUNDS):
        begun = time.monotonic()
        libc.munmap(make(CHURN), (CHURN + 1) * SPAN)
        times.append(round(1000 * (time.monotonic() - begun), 1))
    return times


def costs() -> Iterator[dict[str, Any]]:
    """The same load without a trace and with each kind of one, in turn."""
    churn()
    for options in ([], ["--counts-only"], [], ["--leaks", "1h"], [],
                    ["--leaks", "1h", "--stacks"], []):  # fmt: skip
        answer: dict[str, Any] = {"options": options}
        if options:
            with traced(answer, *options):
                times = churn()
        else:
            times = churn()
        yield {**answer, "times": times, "median": statistics.median(times)}


def view() -> dict[str, Any]:
    """The live view, on a terminal of its own: what it shows after a few rounds."""
    one = Worker("w-one")
    pid, terminal = pty.fork()
    if not pid:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-m", "ptinspect", "trace", "--leaks", "1s"])
    said, ended = b"", 0.0
    end = time.monotonic() + 400
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.3)[0]:
            try:
                said += os.read(terminal, 65536)
            except OSError:
                break
        elif b"page tables:" in said and not ended:
            one.round()
        if said.count(b"page tables:") > 5 and not ended:
            ended = time.monotonic()
            os.kill(pid, signal.SIGINT)
    os.waitpid(pid, 0)
    one.end()
    text = said.decode(errors="replace")
    return {"frames": text.count("page tables:"), "text": text[-9000:]}


def main() -> None:
    """Print all answers as lines of JSON."""
    said: dict[str, Any] = {"version": subprocess.run(["bpftrace", "--version"],
                            capture_output=True, text=True).stdout.strip()}  # fmt: skip
    wanted = [word for word in sys.argv[1:] if not word.isdigit()] or ["filtered", "costs", "view"]
    most = next((int(word) for word in sys.argv[1:] if word.isdigit()), 0)
    for name, part in (("filtered", filtered), ("costs", costs)):
        said[name] = []
        try:
            # One by one: what was found before something fails is kept.
            for answer in part() if name in wanted else ():
                said[name].append(answer)
                if len(said[name]) == most:
                    break
        except (RuntimeError, OSError, ValueError) as error:
            said["failure"] = str(error)
    if "view" in wanted:
        said["view"] = view()
    said["left"] = subprocess.run(["pidof", "bpftrace"], capture_output=True, text=True).stdout
    text = json.dumps(said)
    for i in range(0, len(text), 4000):
        print("@@said " + text[i : i + 4000], flush=True)


if sys.argv[1:2] == ["--worker"]:
    worker(sys.argv[2], sys.argv[3] == "1")
else:
    main()
