# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``scripts/bench``: boot a guest, measure, print one table."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click
from tabulate import tabulate

from bench.generated import generated_command
from bench.watch import watched
from lab.crash import ask_crash
from lab.guest import Guest, booted
from lab.initramfs import workload_initramfs
from lab.kernels import Kernel, build_kernel, debian_kernel

#: Each measurement beside the limit that it is a share of.
SCAN = (("raw memmap", "raw memmap"), ("scan", "raw memmap"), ("naive scan", "raw memmap"))
TABLES = (
    ("raw tables", "raw tables"),
    ("walk", "raw tables"),
    ("walk, no leaf tables", "raw tables"),
    ("follow_phys", "raw tables"),
    ("raw census", "raw census"),
    ("census", "raw census"),
    ("check", "raw census"),
    ("ps", "raw census"),
)


class Result(NamedTuple):
    """One measurement of one target."""

    number: int
    #: Median over the rounds.
    seconds: float
    #: Largest anonymous memory of the process, opening the target included.
    peak_anonymous_bytes: int

    @property
    def rate(self) -> float:
        """Things a second."""
        return self.number / self.seconds


def measure(what: str, target: dict[str, str]) -> Result:
    """Run one probe."""
    data, peak = watched("bench.probe", what, json.dumps(target))
    return Result(data["count"], statistics.median(data["seconds"]), peak)


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
        yield ways


def _rows(
    ways: Sequence[tuple[str, dict[str, str]]], plan: Sequence[tuple[str, str]]
) -> Iterator[Sequence[str]]:
    for name, target in ways:
        results: dict[str, Result] = {}
        for what, limit in plan:
            result = results[what] = measure(what, target)
            share = result.rate / results[limit].rate
            yield (
                name,
                what,
                f"{result.number:,}",
                f"{result.seconds * 1000:,.1f}",
                f"{result.rate / 1000:,.0f}",
                f"{share:.2f}",
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
        yield "ELF dump", name, "1", f"{seconds * 1000:,.1f}", "", "", ""


_HEADERS = ("target", "what", "count", "ms", "thousand/s", "of raw", "peak anon MB")

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
@click.option("--scattered", is_flag=True, help="Other pages lie between the tables.")
def tables_command(memory: int, kernel_name: str, tables: int, scattered: bool) -> None:
    """Scan, walk, census and ps of a guest with very many tables."""
    append = f"lab_quiet=1 lab_sparse={tables}" + (" lab_scatter=1" if scattered else "")
    title = f"{kernel_name}, {memory} MiB, {tables:,} tables"
    title += ", scattered" if scattered else ", fresh"
    _bench(kernel_name, memory, append, (*SCAN, *TABLES), title)


def _bench(
    kernel_name: str, memory: int, append: str, plan: Sequence[tuple[str, str]], title: str
) -> None:
    kernel = _kernel(kernel_name)
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        _resting_guest(kernel, memory, append, Path(folder)) as ways,
    ):
        rows = list(_rows(ways, plan))
        if kernel.arch.name == "x86_64":
            rows.extend(_crash_rows(Path(folder) / "elf", kernel))
    click.echo(f"{title}; median of the rounds\n")
    click.echo(tabulate(rows, headers=_HEADERS, colalign=("left", "left", *["right"] * 5)))


if __name__ == "__main__":
    cli()
