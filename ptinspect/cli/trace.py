# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect trace``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import click
from drgn import Object
from tabulate import tabulate

from ptinspect.census import take_census
from ptinspect.cli.output import emit, status_of
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.errors import ExitStatus, UsageError
from ptinspect.faces.data import write_json
from ptinspect.faces.escape import escape
from ptinspect.faces.trace import (
    event_data,
    live_lines,
    reading_data,
    tables_data,
    trace_report,
)
from ptinspect.kernel.descriptor import page_is_pgtable
from ptinspect.target import open_target
from ptinspect.trace.explain import Explanation, explain_tables
from ptinspect.trace.hooks import choose_hooks
from ptinspect.trace.offers import offers_from_json, read_offers
from ptinspect.trace.program import check_machine, find_bpftrace, kprobe_options
from ptinspect.trace.reader import EndEvent, Reading, TableEvent
from ptinspect.trace.runner import InterruptedTraceError, Tracer
from ptinspect.trace.script import ScriptOptions, write_script
from ptinspect.trace.totals import Totals, read_totals

_CGROUPS = Path("/sys/fs/cgroup")

#: What the maps may take together, and about how many count by key.
_MAP_BYTES, _MAPS = 512 << 20, 8

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

#: Seconds that a table counts as just made in a record of a trace without --leaks.
_YOUNG = 1.0

#: Seconds that tables of a process that has ended may take to be released before the trace ends.
_DRAIN = 30.0


def _seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Read seconds, or a number with a unit: ms, s, m, h."""
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)?", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is no duration: say 10, 500ms, 10s, 5m or 1h")
    return float(found[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[found[2] or "s"]


@click.command("trace", short_help="Live: who makes and frees page tables, how long they wait.")
@target_options
@click.option("--pid", type=click.IntRange(1), help="Follow only tables of this process.")
@click.option("--comm", metavar="NAME", help="Follow only tables of threads of this name.")
@click.option("--cgroup", metavar="PATH", help="Follow only tables of this cgroup (version 2).")
@click.option("--duration", callback=_seconds, metavar="T", help="End after this time (10s, 5m).")
@click.option(
    "--until-exit",
    type=click.IntRange(1),
    metavar="PID",
    help="End when this process has ended and its tables are released.",
)
@click.option("--stacks", is_flag=True, help="Keep the kernel's stacks of making and unlinking.")
@click.option(
    "--leaks",
    callback=_seconds,
    metavar="AGE",
    help="List tables made during the trace that are older than this at its end.",
)
@click.option(
    "--census",
    is_flag=True,
    help="Explain the orphans of a census that is taken at the end (needs --leaks and DWARF).",
)
@click.option("--counts-only", is_flag=True, help="Count only: cheapest, without ways and waits.")
@click.option("--events", is_flag=True, help="Tell each table made and freed (needs jsonl).")
@click.option(
    "--top", type=click.IntRange(1), default=20, show_default=True, help="Rows of long tables."
)
@click.option(
    "--interval", type=click.IntRange(1), default=1, show_default=True, help="Seconds a reading."
)
@click.option(
    "--max-tables",
    type=click.IntRange(1024),
    help="How many tables can be followed at a time; by default what takes half a GiB at most.",
)
@click.option("--kprobes", is_flag=True, help="Use kprobes even where fentry is there.")
@click.option("--bpftrace", metavar="PROGRAM", help="The bpftrace to use.")
@click.option("--print-script", is_flag=True, help="Show the script and do nothing.")
@click.option("--print-offers", is_flag=True, help="Show what this kernel offers, as JSON.")
@click.option(
    "--offers",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --print-script: a kernel's offers instead of this kernel's.",
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["text", "json", "csv", "jsonl"]),
    default="text",
    show_default=True,
    help="How to write the answer.",
)
def command(
    pid: int | None,
    comm: str | None,
    cgroup: str | None,
    duration: float | None,
    until_exit: int | None,
    stacks: bool,
    leaks: float | None,
    census: bool,
    counts_only: bool,
    events: bool,
    top: int,
    interval: int,
    max_tables: int | None,
    kprobes: bool,
    bpftrace: str | None,
    print_script: bool,
    print_offers: bool,
    offers: Path | None,
    output_format: str,
) -> int:
    """
    Who makes and frees page tables now, by which way, and how long freed ones wait.

    Needs bpftrace and root, and traces the kernel that runs here. Ends with --duration,
    --until-exit, Ctrl-C or SIGTERM, and then sums up.

    Example: ptinspect trace --duration 10s --leaks 5s --stacks
    """
    _refuse_targets()
    if events and output_format != "jsonl":
        raise click.UsageError("--events needs --format jsonl")
    if counts_only and (leaks is not None or events):
        raise click.UsageError("--counts-only follows no table: no --leaks, no --events")
    if census and leaks is None:
        raise click.UsageError("--census needs --leaks AGE: what is younger is just made")
    if offers is not None and not print_script:
        raise click.UsageError("--offers needs --print-script")
    if offers is None:
        check_machine()
    program = None if print_script or print_offers else find_bpftrace(bpftrace)
    offered = read_offers() if offers is None else offers_from_json(_text(offers))
    if print_offers:
        click.echo(offered.to_json(), nl=False)
        return ExitStatus.OK
    hooks = choose_hooks(offered, kprobes=kprobes)
    script = write_script(
        offered,
        hooks,
        ScriptOptions(
            pid=pid,
            comm=comm,
            cgroup=None if cgroup is None else _cgroup_id(cgroup),
            counts_only=counts_only,
            stacks=stacks,
            tables=leaks is not None,
            events=events,
            interval=interval,
            max_tables=max_tables or _most_tables(offers is not None),
        ),
    )
    if print_script or program is None:
        click.echo(script, nl=False)
        return ExitStatus.OK
    ended = None if until_exit is None else _ProcessEnd(until_exit)
    end = _End(duration, ended)
    view = _View(output_format, top)
    filtered = pid is not None or comm is not None or cgroup is not None
    explained = None
    with contextlib.ExitStack() as opened:
        # Opened first: a kernel without debug information is told before anything is traced.
        target = opened.enter_context(open_target(chosen_target())) if census else None
        stop = opened.enter_context(_signals())
        tracer = opened.enter_context(
            Tracer(
                program,
                script,
                options=() if hooks.trampolines else kprobe_options(program),
                unseen=hooks.missing,
                filtered=filtered,
                kprobes=not hooks.trampolines,
                stop=stop,
            )
        )
        view.say("attaching hooks ...")
        try:
            tracer.open_gate()
        except InterruptedTraceError:
            raise click.exceptions.Abort from None
        view.say("tracing")
        end.begin()
        if output_format == "jsonl":
            begin = {
                "kind": "begin",
                "nsecs": tracer.opened_ns,
                "release": offered.release,
                "boot_id": _boot_id(),
                "events": events,
                "filtered": filtered,
                "young_ns": int((_YOUNG if leaks is None else leaks) * 1e9),
            }
            click.echo(json.dumps(begin))
        for message in tracer.messages(end):
            view.show(message, tracer)
        view.say("ending ...")
        taken = None if target is None else take_census(target.prog)
        result = tracer.finish()
        for late in tracer.late:
            view.show(late, tracer)
        if target is not None and taken is not None and leaks is not None:
            prog = target.prog
            explained = explain_tables(
                taken,
                result.totals.live,
                result.totals.pending,
                int(leaks * 1e9),
                lambda page: page_is_pgtable(Object(prog, "struct page *", value=page)),
                unknown=Explanation.UNKNOWN if filtered else Explanation.OLDER,
            )
    report = trace_report(
        result,
        f"Linux {offered.release}",
        top=top,
        leak_age_ns=None if leaks is None else int(leaks * 1e9),
        explained=explained,
    )
    if output_format != "jsonl":
        return emit(report, output_format)
    if leaks is not None:
        click.echo(json.dumps(tables_data(result.totals)))
    text = io.StringIO()
    write_json(report, text)
    click.echo(json.dumps({"kind": "summary", **json.loads(text.getvalue())}))
    return status_of(report)


def _boot_id() -> str | None:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return None


def _most_tables(elsewhere: bool) -> int:
    """
    Get how many entries every map may have.

    bpftrace gives all maps one size, and the kernel allocates them at once; those that count have
    a value for each CPU.
    """
    if elsewhere:
        return ScriptOptions.max_tables
    cpus = os.sysconf("SC_NPROCESSORS_CONF")
    return max(1024, min(ScriptOptions.max_tables, _MAP_BYTES // (_MAPS * (8 * cpus + 128))))


def _refuse_targets() -> None:
    """Refuse a target that is not the kernel that runs here."""
    target = chosen_target()
    for name in ("core", "qemu", "sample"):
        if getattr(target, name) is not None:
            raise click.UsageError(f"trace looks at the kernel that runs here, so not at --{name}")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _cgroup_id(path: str) -> int:
    """Get a cgroup's number: the inode of its folder (kernel: fs/kernfs)."""
    folder = Path(path) if path.startswith(f"{_CGROUPS}") else _CGROUPS / path.lstrip("/")
    try:
        return folder.stat().st_ino
    except OSError as error:
        raise UsageError(f"there is no cgroup {folder}: {error.strerror}") from error


class _ProcessEnd:
    """Whether a process has given up its mm: it is gone, or a zombie."""

    def __init__(self, pid: int) -> None:
        self._stat = Path(f"/proc/{pid}/stat")
        self._start = self._read()
        if self._start is None:
            raise UsageError(f"there is no process {pid}")

    def _read(self) -> tuple[str, str] | None:
        """Get state and start time (Documentation/filesystems/proc.rst: fields 3 and 22)."""
        try:
            fields = self._stat.read_text().rpartition(")")[2].split()
            return fields[0], fields[19]
        except (OSError, IndexError):
            return None

    def __call__(self) -> bool:
        now = self._read()
        return now is None or self._start is None or now[1] != self._start[1] or now[0] in "ZX"


class _End:
    """Whether it is time to end."""

    def __init__(self, duration: float | None, ended: _ProcessEnd | None) -> None:
        self._duration, self._ended = duration, ended
        self._began = self._left = 0.0
        self._goal: int | None = None
        self._gone = False

    def begin(self) -> None:
        """The gate is open."""
        self._began = time.monotonic()

    def __call__(self, reading: Reading | None) -> bool:
        now = time.monotonic()
        if self._duration is not None and now - self._began >= self._duration:
            return True
        if self._ended is None:
            return False
        if not self._gone:
            if self._ended():
                self._gone, self._left = True, now
                # bpftrace's nsecs is this clock (bpf_ktime_get_boot_ns).
                self._nsecs = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            return False
        if now - self._left >= _DRAIN:
            return True
        # A reading that began after the end knows of all that the process unlinked.
        if reading is None or reading.nsecs < self._nsecs:
            return False
        totals = read_totals(reading)
        freed = sum(sum(way.freed) for way in totals.ways)
        if totals.waiting is None:
            return True
        if self._goal is None:
            self._goal = freed + totals.waiting
        return freed >= self._goal


class _View:
    """What is shown while the trace runs."""

    def __init__(self, output_format: str, top: int) -> None:
        self._jsonl = output_format == "jsonl"
        self._live = output_format == "text" and sys.stdout.isatty()
        self._top = top
        self._before: Totals | None = None

    def say(self, text: str) -> None:
        """Tell on a terminal's stderr what is being done."""
        if sys.stderr.isatty():
            click.echo(f"ptinspect: {text}", err=True)

    def show(self, message: object, tracer: Tracer) -> None:
        """Show a reading or an event."""
        if isinstance(message, (TableEvent, EndEvent)) and self._jsonl:
            click.echo(json.dumps(event_data(message)))
        if not isinstance(message, Reading) or not (self._jsonl or self._live):
            return
        totals = read_totals(message)
        if self._jsonl:
            click.echo(json.dumps(reading_data(totals, self._top)))
            return
        lines = list(self._frame(totals, tracer))
        # At once, so that nothing flickers, and no more than the terminal has room for.
        room = max(1, shutil.get_terminal_size().lines - 1)
        click.clear()
        click.echo("\n".join(lines[:room]))

    def _frame(self, totals: Totals, tracer: Tracer) -> Iterator[str]:
        heading, *rows = live_lines(totals, self._before, self._top)
        self._before = totals
        yield (
            f"page tables: {totals.made_pages} pages made, {totals.gone_pages} gone, "
            f"net {totals.net_pages}"
            + ("" if totals.waiting is None else f", {totals.waiting} tables waiting")
        )
        for way in totals.ways:
            yield (
                f"{way.way}: {sum(way.freed)} released, p50 {way.wait_p50_us} us, "
                f"p99 {way.wait_p99_us} us"
            )
        missed, dropped, change = tracer.so_far()
        yield (
            f"nr_page_table_pages changed by {_known(change)}, missed calls {_known(missed)}, "
            f"dropped {dropped}"
        )
        cells = [[escape(cell) for cell in row] for row in rows]
        yield from tabulate(
            cells, headers=heading, tablefmt="plain", disable_numparse=True
        ).splitlines()


def _known(value: int | None) -> str:
    return "?" if value is None else str(value)


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set, instead of what they did before."""
    stop = threading.Event()

    def handler(number: int, frame: object) -> None:
        stop.set()

    before: dict[int, Callable[..., Any] | int | None] = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
