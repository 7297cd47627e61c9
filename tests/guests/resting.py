# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests with stock Debian kernels in which the lab's workload has made its states and rests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lab.archive import ArchiveUnreachableError
from lab.errors import MissingToolError
from lab.guest import Guest, booted
from lab.initramfs import workload_initramfs
from lab.kernels import Kernel, debian_kernel
from lab.matrix import Row
from lab.truth import parse_report
from ptinspect.target import TargetOptions


class Running(NamedTuple):
    """A guest in which the workload has made its states and now rests."""

    guest: Guest
    kernel: Kernel
    truth: dict[str, Any]
    texts: dict[str, str]

    @property
    def paused(self) -> TargetOptions:
        """How to look into it, stopped."""
        return TargetOptions(
            qemu=str(self.guest.qmp_socket), symbols=(self.kernel.vmlinux,), pause=True
        )

    def status(self) -> str:
        """QEMU's word for whether it runs."""
        return str(self.guest.control.execute("query-status")["status"])


class Stock(NamedTuple):
    """A stock kernel, by Debian's names."""

    suite: str
    architecture: str
    series: str
    #: MiB
    memory: int = 1024
    #: Words for the kernel's command line.
    append: str = ""
    #: What Debian appends to the release, where it is not the plain kernel.
    flavour: str | None = None
    #: QEMU options.
    extra: tuple[str, ...] = ()

    def kernel(self) -> Kernel:
        """Get the kernel."""
        return debian_kernel(self.suite, self.architecture, self.series, self.flavour)

    def __str__(self) -> str:
        kernel = self.flavour or self.architecture
        return "-".join((kernel, self.series, *self.append.split()))


class Busy(NamedTuple):
    """A guest that does something for ever."""

    guest: Guest
    kernel: Kernel

    @property
    def watched(self) -> TargetOptions:
        """How to look into it; it has to be stopped by whoever looks."""
        return TargetOptions(qemu=str(self.guest.qmp_socket), symbols=(self.kernel.vmlinux,))


@contextmanager
def busy_guest(
    stock: Stock,
    append: str,
    *,
    cpus: int = 2,
    extra: Sequence[str] = (),
    text: str = "@@ready",
) -> Iterator[Busy]:
    """
    Boot a stock kernel with the workload, which goes on doing something.

    :param append: Words for the kernel command line, which tell the workload what to do.
    :param extra: More options for QEMU.
    :param text: What the guest says on its console when it is about to begin.
    """
    kernel, initrd = _prepared(stock)

    def make() -> Guest:
        return Guest(
            *(kernel.arch, kernel.image, initrd),
            memory=stock.memory,
            smp=str(cpus),
            append=f"{stock.append} {append}".strip(),
            extra=extra,
            stub=True,
        )

    with booted(make, text, timeout=600) as guest:
        yield Busy(guest, kernel)


@contextmanager
def resting_guest(stock: Stock | Row) -> Iterator[Running]:
    """Boot a kernel with the workload and wait until it rests."""
    kernel, initrd = _prepared(stock)

    def make() -> Guest:
        return Guest(
            *(kernel.arch, kernel.image, initrd),
            memory=stock.memory,
            smp="2",
            append=stock.append,
            extra=stock.extra,
            stub=True,
        )

    with booted(make, "@@ready", timeout=600) as guest:
        yield Running(guest, kernel, *parse_report(guest.console()))


def _prepared(stock: Stock | Row) -> tuple[Kernel, Path]:
    """Get a kernel and the workload for it, or skip the test with the reason."""
    try:
        kernel = stock.kernel()
        return kernel, workload_initramfs(kernel.arch, kernel.modules)
    except (MissingToolError, ArchiveUnreachableError) as error:
        pytest.skip(str(error))
