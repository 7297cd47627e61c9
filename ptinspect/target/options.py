# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What to open, and what an opened target is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from drgn import Program

#: A note about a dump that says of itself that it was cut.
INCOMPLETE = "incomplete dump: makedumpfile ran out of space, so memory is missing"


@dataclass(frozen=True)
class TargetOptions:
    """What to open: at most one of *core*, *qemu*, *sample*, *program*, else the live kernel."""

    core: Path | None = None
    #: QMP socket: a path, or ``host:port``.
    qemu: str | None = None
    #: Name of a sample, or the path of its folder.
    sample: str | None = None
    #: Files with debugging information, tried first.
    symbols: tuple[Path, ...] = ()
    #: Where else to look for the kernel's files, as drgn's option of that name.
    kernel_directory: tuple[Path, ...] = ()
    #: A file whose VMCOREINFO is used instead of the target's own.
    vmcoreinfo: Path | None = None
    #: The architecture, where the target does not tell it.
    architecture: str | None = None
    #: Stop the guest's CPUs while it is open; only with *qemu*.
    pause: bool = False
    #: A program that is open already, debugging information and all, as in drgn's shell.
    program: Program | None = None


class TargetKind(Enum):
    """The kinds of target."""

    LIVE = "live kernel"
    CORE = "dump"
    QEMU = "QEMU guest"
    SAMPLE = "sample"
    PROGRAM = "open program"


@dataclass(frozen=True)
class Target:
    """An opened target."""

    prog: Program
    kind: TargetKind
    #: What to call it in headings: ``/proc/kcore``, the file, the socket, the sample.
    name: str
    #: Whether memory can change while it is read.
    racing: bool
    #: How it was opened where that was not plain.
    notes: tuple[str, ...] = ()
