# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Running the script: bpftrace as a child, its lines, the gate, and a clean end whatever happens.

bpftrace's programs and hooks live as long as the child does; it is ended with SIGTERM, and killed
if it does not go. It gets SIGTERM from the kernel too should this process die.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Callable

from ptinspect.errors import TargetError
from ptinspect.trace.counter import page_table_pages
from ptinspect.trace.reader import (
    Dropped,
    EndEvent,
    Gate,
    Message,
    Reader,
    Reading,
    TableEvent,
    Waiting,
)
from ptinspect.trace.totals import CounterChange, TraceResult, read_totals

#: Seconds. Attaching some thirty hooks takes a second or two on hardware, a minute under emulation.
ATTACH_TIMEOUT = 300.0
_ANSWER_TIMEOUT = 120.0
_END_TIMEOUT = 120.0

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class InterruptedTraceError(Exception):
    """The user has asked to end before the trace began."""


class Tracer:
    """
    A running script, as long as the ``with`` block.

    :param bpftrace: path of the program
    :param script: the script's text
    :param options: for bpftrace, besides its own
    :param unseen: what the script cannot see on this kernel
    :param filtered: whether it follows only some processes
    :param kprobes: whether its hooks are kprobes
    :param stop: set when the trace shall end
    :param root: where /proc is; for tests
    """

    def __init__(
        self,
        bpftrace: str,
        script: str,
        *,
        options: Sequence[str] = (),
        unseen: tuple[str, ...] = (),
        filtered: bool = False,
        kprobes: bool = False,
        stop: threading.Event | None = None,
        root: Path = Path("/"),
    ) -> None:
        self._bpftrace, self._script, self._options = bpftrace, script, options
        self._unseen, self._filtered, self._root = unseen, filtered, root
        self._kprobes = kprobes
        self.stop = stop or threading.Event()
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = Reader()
        self._dropped: dict[str, int] = {}
        self._last: Reading | None = None
        self._gone = False
        self._opened: tuple[int | None, int | None] = (None, None)
        self._missed_before: int | None = None
        self._began = 0.0
        #: Events that :meth:`messages` did not yield: they came while the gate turned, or later.
        self.late: list[TableEvent | EndEvent] = []
        #: When the gate was opened: nanoseconds after boot.
        self.opened_ns = 0

    def __enter__(self) -> Tracer:
        self._folder = tempfile.TemporaryDirectory(prefix="ptinspect-trace-")
        try:
            path = Path(self._folder.name) / "script.bt"
            path.write_text(self._script)
            self._errors = (Path(self._folder.name) / "errors").open("w+", errors="replace")
            # A session of its own: Ctrl-C on the terminal is for this process, which closes the
            # gate first.
            self._process = subprocess.Popen(
                [self._bpftrace, *self._options, "-f", "json", "-B", "line", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        except OSError as error:
            self._folder.cleanup()
            raise TargetError(f"bpftrace could not be started: {error}") from error
        threading.Thread(target=self._pump, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()
        self._errors.close()
        self._folder.cleanup()

    def _pump(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def _end(self) -> None:
        """End the child, gently and then not, and wait for it."""
        process = self._process
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_END_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _message(self, timeout: float) -> Message | None:
        """Get the next message; ``None`` when the time is over or the child has ended."""
        end = time.monotonic() + timeout
        while not self._gone:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return None
            if line is None:
                self._gone = True
                return None
            message = self._reader.feed(line)
            if isinstance(message, Dropped):
                self._dropped[message.what] = self._dropped.get(message.what, 0) + message.count
            if message is not None:
                return message
        return None

    def _failed(self, what: str) -> TargetError:
        self._errors.seek(0)
        said = self._reader.chatter + [line.strip() for line in self._errors if line.strip()]
        errors = [line for line in said if "ERROR" in line] or said[-1:]
        errors = [line.partition("ERROR:")[2].strip() or line for line in errors]
        more = f": {errors[0]}" if errors else ""
        if any("fentry" in line or "fexit" in line for line in errors):
            more += " (--kprobes does without fentry)"
        return TargetError(f"{what}{more}")

    def open_gate(self) -> None:
        """
        Wait until all hooks are attached, and begin to count.

        :raises TargetError: if bpftrace ends or does not get ready
        :raises InterruptedTraceError: if :attr:`stop` was set meanwhile
        """
        end = time.monotonic() + ATTACH_TIMEOUT
        while True:
            message = self._message(0.2)
            if isinstance(message, Waiting):
                break
            if self.stop.is_set():
                raise InterruptedTraceError
            if self._gone:
                self._process.wait()
                raise self._failed("bpftrace could not attach the hooks")
            if time.monotonic() > end:
                raise self._failed("bpftrace did not attach the hooks in time")
        self._missed_before = self._missed()
        before = page_table_pages(self._root)
        self._turn_gate(True)
        self._opened = (before, page_table_pages(self._root))
        self._began = time.monotonic()

    def _turn_gate(self, on: bool) -> None:
        self._process.send_signal(signal.SIGUSR1)
        end = time.monotonic() + _ANSWER_TIMEOUT
        while time.monotonic() < end and not self._gone:
            message = self._message(1.0)
            if isinstance(message, Gate):
                if on:
                    self.opened_ns = message.nsecs
                if message.on != on:
                    raise self._failed("the script's gate is not where it should be")
                return
            if isinstance(message, Reading):
                self._last = message
            self._keep(message)
        raise self._failed(f"bpftrace did not {'open' if on else 'close'} the gate")

    def _keep(self, message: Message | None) -> None:
        """Keep an event that comes while the gate turns, or after it was closed."""
        if isinstance(message, (TableEvent, EndEvent)):
            self.late.append(message)

    def messages(self, until: Callable[[Reading | None], bool]) -> Iterator[Message]:
        """
        Yield readings and events until it is time to end.

        :param until: asked several times a second with the latest reading: is it time?
        """
        while not self.stop.is_set() and not until(self._last):
            message = self._message(0.1)
            if isinstance(message, Reading):
                self._last = message
            if message is not None and not isinstance(message, (Dropped, Waiting)):
                yield message
            if self._gone:
                return

    def _missed(self) -> int | None:
        """
        Get how many calls of the child's programs BPF has skipped.

        A program's descriptor says ``recursion_misses`` (kernel/bpf/syscall.c:bpf_prog_show_fdinfo,
        5.12), a kprobe's link ``missed`` where the kernel has it.
        """
        folder = self._root / "proc" / str(self._process.pid) / "fdinfo"
        missed, programs, links = 0, 0, 0
        try:
            for name in os.listdir(folder):
                with contextlib.suppress(OSError):
                    for line in (folder / name).read_text().splitlines():
                        key, _, value = line.partition(":")
                        if key in ("recursion_misses", "missed"):
                            missed += int(value)
                            programs += key == "recursion_misses"
                            links += key == "missed"
        except (OSError, ValueError):
            return None
        # A kprobe that is hit while another one runs is missed before any program is asked.
        known = programs and (links or not self._kprobes)
        return missed if known else None

    def so_far(self) -> tuple[int | None, int, int | None]:
        """Get calls missed, things dropped, and the change of nr_page_table_pages until now."""
        missed, now = self._missed(), page_table_pages(self._root)
        if missed is not None and self._missed_before is not None:
            missed -= self._missed_before
        before = self._opened[0]
        change = None if now is None or before is None else now - before
        return missed, sum(self._dropped.values()), change

    def finish(self) -> TraceResult:
        """
        Close the gate, end bpftrace and sum up.

        :raises TargetError: if there is nothing to sum up: bpftrace died at once
        """
        ended_early = None
        seconds = time.monotonic() - self._began
        before = after = missed = None
        if not self._gone and self._process.poll() is None:
            before = page_table_pages(self._root)
            try:
                self._turn_gate(False)
            except TargetError as error:
                ended_early = str(error)
            after = page_table_pages(self._root)
            missed = self._missed()
            if self._process.poll() is None:
                self._process.terminate()
        else:
            ended_early = str(self._failed("bpftrace ended by itself"))
        end = time.monotonic() + _END_TIMEOUT
        while not self._gone and time.monotonic() < end:
            message = self._message(1.0)
            if isinstance(message, Reading):
                self._last = message
                if message.last:
                    break
            self._keep(message)
        self._end()
        if self._last is None:
            raise self._failed("bpftrace ended before it said anything")
        if not self._last.last and ended_early is None:
            ended_early = "bpftrace ended without its last reading"
        if missed is not None and self._missed_before is not None:
            missed -= self._missed_before
        return TraceResult(
            read_totals(self._last),
            CounterChange(*self._opened, before, after),
            missed,
            dict(self._dropped),
            seconds,
            self._filtered,
            self._unseen,
            ended_early,
        )
