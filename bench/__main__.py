# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``scripts/bench``: boot a guest, measure, print one table."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click
from tabulate import tabulate

from bench.generated import generated_command
from bench.probe import Round
from bench.watch import in_own_process
from lab.crash import ask_crash
from lab.dump import move_program_headers
from lab.guest import Guest, booted
from lab.initramfs import workload_initramfs
from lab.kernels import Kernel, build_kernel, debian_kernel

#: What is measured; see bench/probe.py.
SCAN = ("raw memmap", "scan", "naive scan")
TABLES = (
    "raw tables",
    "walk",
    "walk, no leaf tables",
    "follow_phys",
    "raw census",
    "census",
    "check",
    "ps",
)


class Result(NamedTuple):
    """One measurement of one target; medians over the rounds."""

    number: int
    seconds: float
    cpu_seconds: float
    #: Its rate as a share of its limit's, both by the time that the process was running.
    share: float
    #: Largest anonymous memory of the process, opening the target included.
    peak_anonymous_bytes: int


def measure(what: str, target: dict[str, str]) -> Result:
    """Run one probe."""
    answer = in_own_process("bench.probe", what, json.dumps(target))
    rounds = [Round(*each) for each in answer["rounds"]]
    limits = [Round(*each) for each in answer["limits"]]
    shares = [
        (done.number / done.cpu_seconds) / (limit.number / limit.cpu_seconds)
        for done, limit in zip(rounds, limits)
    ]
    return Result(
        number=rounds[0].number,
        seconds=statistics.median(done.seconds for done in rounds),
        cpu_seconds=statistics.median(done.cpu_seconds for done in rounds),
        share=statistics.median(shares),
        peak_anonymous_bytes=answer["peak"],
    )


def _kernel(name: str) -> Kernel:
    """A kernel by what ``--kernel`` says."""
    if name.startswith("debian:"):
        _, suite, architecture, series = name.split(":")
        return debian_kernel(suite, architecture, series)
    return build_kernel(name)


@contextmanager
def _resting_guest(
    kernel: Kernel, memory: int, append: str, dumps: Path
) -> Iterator[list[tuple[str, dict[str, str]]]]:
    """Boot a guest, stop it when it rests, and yield the ways to look into it."""
    initrd = workload_initramfs(kernel.arch, kernel.modules)
    symbols = str(kernel.vmlinux)

    def make() -> Guest:
        return Guest(kernel.arch, kernel.image, initrd, memory=memory, smp="2", append=append)

    with booted(make, "@@ready", timeout=900) as guest:
        guest.stop()
        ways = [("QMP", {"qemu": str(guest.qmp_socket), "symbols": symbols})]
        for form, name in (("elf", "ELF dump"), ("kdump-zlib", "kdump-zlib")):
            core = dumps / form
            guest.dump(core, form)
            ways.append((name, {"core": str(core), "symbols": symbols}))
        filtered = _makedumpfile(dumps / "elf", dumps / "makedumpfile")
        if filtered is not None:
            ways.append(("makedumpfile", {"core": str(filtered), "symbols": symbols}))
        yield ways


def _makedumpfile(elf: Path, core: Path) -> Path | None:
    """Filter and compress a dump as distributions do, unless the program is missing or cannot."""
    program = shutil.which("makedumpfile")
    if program is None:
        return None
    move_program_headers(elf)
    done = subprocess.run(
        [program, "-l", "-d", "31", elf, core], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        click.echo(f"makedumpfile failed: {done.stdout.decode(errors='replace')}", err=True)
        return None
    return core


def _rows(
    ways: Sequence[tuple[str, dict[str, str]]], plan: Sequence[str]
) -> Iterator[Sequence[str]]:
    for name, target in ways:
        for what in plan:
            result = measure(what, target)
            yield (
                name,
                what,
                f"{result.number:,}",
                f"{result.seconds * 1000:,.1f}",
                f"{result.cpu_seconds * 1000:,.1f}",
                f"{result.cpu_seconds / result.number * 1e9:,.0f}",
                f"{result.share:.2f}",
                f"{result.peak_anonymous_bytes / 1e6:.0f}",
            )


def _crash_rows(core: Path, kernel: Kernel) -> Iterator[Sequence[str]]:
    """crash on the same ELF dump: its start alone, and with its list of all page types."""
    for name, commands in (
        ("crash: start", ()),
        ("crash: start, kmem -m page_type", ("kmem -m page_type",)),
    ):
        start = time.perf_counter()
        ask_crash(core, kernel.vmlinux, commands)
        seconds = time.perf_counter() - start
        yield "ELF dump", name, "1", f"{seconds * 1000:,.1f}", "", "", "", ""


_HEADERS = ("target", "what", "count", "ms", "CPU ms", "CPU ns each", "of raw", "peak anon MB")

_KERNEL_OPTION = click.option(
    "--kernel",
    "kernel_name",
    default="debian:trixie:x86_64:6.12",
    show_default=True,
    help="debian:SUITE:ARCH:SERIES, or a kernel that the lab builds.",
)
_MEMORY_OPTION = click.option(
    "--memory", default=4096, show_default=True, help="Memory of the guest in MiB."
)


@click.group()
def cli() -> None:
    """Measure ptinspect on a guest, beside raw reads and naive loops in the same run."""


cli.add_command(generated_command)


@cli.command("scan")
@_MEMORY_OPTION
@_KERNEL_OPTION
def scan_command(memory: int, kernel_name: str) -> None:
    """The memory-map scan: pages a second, as a share of raw reads, and memory."""
    _bench(kernel_name, memory, "lab_quiet=1", SCAN, f"{kernel_name}, {memory} MiB")


@cli.command("tables")
@_MEMORY_OPTION
@_KERNEL_OPTION
@click.option("--tables", default=200_000, show_default=True, help="Tables to make.")
@click.option("--scattered", is_flag=True, help="Hardly any two of the tables adjoin.")
def tables_command(memory: int, kernel_name: str, tables: int, scattered: bool) -> None:
    """Scan, walk, census and ps of a guest with very many tables."""
    append = f"lab_quiet=1 lab_sparse={tables}" + (" lab_scatter=1" if scattered else "")
    title = f"{kernel_name}, {memory} MiB, {tables:,} tables"
    title += ", scattered" if scattered else ", fresh"
    _bench(kernel_name, memory, append, (*SCAN, *TABLES), title)


def _bench(kernel_name: str, memory: int, append: str, plan: Sequence[str], title: str) -> None:
    kernel = _kernel(kernel_name)
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        _resting_guest(kernel, memory, append, Path(folder)) as ways,
    ):
        rows = list(_rows(ways, plan))
        if kernel.arch.name == "x86_64":
            rows.extend(_crash_rows(Path(folder) / "elf", kernel))
    load = " ".join(f"{each:.1f}" for each in os.getloadavg())
    click.echo(f"{title}; medians of the rounds; load average at the end {load}\n")
    click.echo(tabulate(rows, headers=_HEADERS, colalign=("left", "left", *["right"] * 6)))


if __name__ == "__main__":
    cli()
