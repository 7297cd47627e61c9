# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open a QEMU guest over QMP."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from drgn import Program, ProgramFlags

from ptinspect.errors import TargetError
from ptinspect.target import architecture as architectures
from ptinspect.target import ppc64, recovery, riscv64
from ptinspect.target.architecture import TargetArchitecture
from ptinspect.target.options import Target, TargetKind
from ptinspect.target.qmp import QmpConnection
from ptinspect.target.wording import reason

#: A line of ``info mtree -f``: "  0000000000000000-00000000000bffff (prio 0, ram): ..."
_RAM_RANGE = re.compile(r"^\s+([0-9a-f]+)-([0-9a-f]+) \(prio -?\d+, (?:nv-)?ram\)", re.MULTILINE)

#: What is read to see how fast that is: 64 KiB take a millisecond at most from the process, and
#: some 100 through the monitor.
_PROBE_BYTES = 1 << 16
_SLOW_SECONDS = 0.02


@dataclass(frozen=True)
class Guest:
    """An opened guest and the connection that can stop it."""

    target: Target
    connection: QmpConnection


@contextmanager
def open_guest(
    address: str, architecture: TargetArchitecture | None, note: bytes | None
) -> Iterator[Guest]:
    """
    Attach to a guest, without debugging information.

    :param address: Path of the QMP socket, or ``host:port``.
    :param note: VMCOREINFO to use instead of the guest's own.
    :raises TargetError: if the guest cannot be opened, with the reason
    """
    connection = QmpConnection(address)
    try:
        yield Guest(_attach(connection, architecture, note), connection)
    finally:
        connection.close()


def _attach(
    connection: QmpConnection, wanted: TargetArchitecture | None, note: bytes | None
) -> Target:
    name = connection.address
    prog = Program()
    try:
        prog.set_qemu_qmp(connection.duplicate_fd())
    except BlockingIOError:
        raise TargetError(f"{name}: QEMU does not answer") from None
    except Exception as error:
        raise TargetError(f"{name}: {reason(error)}") from None
    assert prog.platform is not None
    found = architectures.by_platform(name, prog.platform)
    if wanted is not None and wanted != found:
        raise TargetError(f"{name}: --architecture {wanted.name}, but the guest is {found.name}")
    notes: tuple[str, ...] = ()
    ranges = _ram_ranges(connection)
    slow = _is_slow(prog, ranges)
    if slow:
        notes += ("memory is read through QEMU's monitor: slow",)
    if note is not None:
        prog = recovery.with_note(name, prog, found, note, live=True)
    elif not prog.flags & ProgramFlags.IS_LINUX_KERNEL:
        text, how = recovery.find_note(name, prog, found, [] if slow else ranges)
        prog = recovery.with_note(name, prog, found, text, live=True)
        notes += (how,)
    else:
        riscv64.add_virtual_memory(prog)
        ppc64.add_linear_map(prog)
    return Target(prog, TargetKind.QEMU, name, racing=True, notes=notes)


def _is_slow(prog: Program, ranges: Sequence[tuple[int, int]]) -> bool:
    """
    Whether memory comes through QEMU's monitor, about 1 MB/s, and not from the QEMU process itself.

    drgn reads from the process if the socket is a Unix one and it may; it does not tell which.
    """
    if not ranges:
        return True
    start, size = max(ranges, key=lambda r: r[1])
    best = float("inf")
    for _ in range(2):
        begin = time.monotonic()
        prog.read(start, min(size, _PROBE_BYTES), True)
        best = min(best, time.monotonic() - begin)
    return best > _SLOW_SECONDS


def _ram_ranges(connection: QmpConnection) -> list[tuple[int, int]]:
    """Start and size of each range of the guest's RAM, by guest-physical address."""
    tree = connection.monitor("info mtree -f")
    for view in tree.split("FlatView")[1:]:
        if '\n AS "memory"' in view:
            return [
                (int(start, 16), int(end, 16) + 1 - int(start, 16))
                for start, end in _RAM_RANGE.findall(view)
            ]
    return []
