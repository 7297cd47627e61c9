# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``scripts/bench``: boot a guest, measure, print one table."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click
from tabulate import tabulate

from lab.guest import Guest
from lab.initramfs import workload_initramfs
from lab.kernels import build_kernel, debian_kernel


class Result(NamedTuple):
    """One measurement of one target."""

    pages: int
    #: Median over the rounds.
    seconds: float
    #: Largest anonymous memory of the process, opening the target included.
    peak_anonymous_bytes: int

    @property
    def rate(self) -> float:
        """Pages a second."""
        return self.pages / self.seconds


def measure(what: str, target: dict[str, str]) -> Result:
    """Run one probe and watch its memory."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.probe", what, json.dumps(target)],
        stdout=subprocess.PIPE,
        text=True,
    )
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            break
        peak = max([peak, *(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))])
        time.sleep(0.005)
    answer, _ = process.communicate()
    if process.returncode:
        raise click.ClickException(f"measuring {what} failed")
    data = json.loads(answer)
    return Result(data["pages"], statistics.median(data["seconds"]), peak)


@click.group()
def cli() -> None:
    """Measure ptinspect on a guest, beside raw reads and naive loops in the same run."""


@cli.command("scan")
@click.option("--memory", default=4096, show_default=True, help="Memory of the guest in MiB.")
@click.option(
    "--kernel",
    "kernel_name",
    default="x86_64-7.3",
    show_default=True,
    help="A kernel of the lab, or debian:SUITE:ARCH:SERIES.",
)
def scan_command(memory: int, kernel_name: str) -> None:
    """The memory-map scan: pages a second, as a share of raw reads, and memory."""
    if kernel_name.startswith("debian:"):
        _, suite, architecture, series = kernel_name.split(":")
        kernel = debian_kernel(suite, architecture, series)
        append = ""
    else:
        kernel = build_kernel(kernel_name)
        append = "qemu_fw_cfg.ioport=12@0x510:0:1:4"
    initrd = workload_initramfs(kernel.arch, kernel.modules)
    rows = []
    guest = Guest(kernel.arch, kernel.image, initrd, memory=memory, smp="2", append=append)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, guest:
        guest.wait_for("@@ready", timeout=300)
        guest.stop()
        core = Path(folder) / "vmcore"
        guest.dump(core)
        symbols = str(kernel.vmlinux)
        for name, target in (
            ("QMP", {"qemu": str(guest.qmp_socket), "symbols": symbols}),
            ("ELF dump", {"core": str(core), "symbols": symbols}),
        ):
            raw = measure("raw", target)
            for what in ("raw", "scan", "naive"):
                result = raw if what == "raw" else measure(what, target)
                rows.append(
                    (
                        name,
                        what,
                        f"{result.pages:,}",
                        f"{result.seconds * 1000:,.1f}",
                        f"{result.rate / 1e6:,.2f}",
                        f"{result.rate / raw.rate:.2f}",
                        f"{result.peak_anonymous_bytes / 1e6:.0f}",
                    )
                )
    click.echo(f"{kernel_name}, {memory} MiB; median of the rounds\n")
    headers = ("target", "what", "pages", "ms", "Mpages/s", "of raw", "peak anon MB")
    click.echo(tabulate(rows, headers=headers, colalign=("left", "left", *["right"] * 5)))


if __name__ == "__main__":
    cli()
