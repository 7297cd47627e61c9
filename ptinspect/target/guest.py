# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open a QEMU guest over QMP, and stop it for as long as it is looked at."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from drgn import Program, ProgramFlags

from ptinspect.errors import TargetError
from ptinspect.target import architecture as architectures
from ptinspect.target import recovery
from ptinspect.target.architecture import TargetArchitecture
from ptinspect.target.options import Target, TargetKind
from ptinspect.target.qmp import QmpConnection

#: A line of ``info mtree -f``: "  0000000000000000-00000000000bffff (prio 0, ram): ..."
_RAM_RANGE = re.compile(r"^\s+([0-9a-f]+)-([0-9a-f]+) \(prio -?\d+, (?:nv-)?ram\)", re.MULTILINE)

#: Seconds that the guard gets to start, and to end once it is dismissed.
_GUARD_SECONDS = 20.0


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
    except Exception as error:
        raise TargetError(f"{name}: {error}") from None
    assert prog.platform is not None
    found = architectures.by_platform(prog.platform)
    if wanted is not None and wanted != found:
        raise TargetError(f"{name}: --architecture {wanted.name}, but the guest is {found.name}")
    notes: tuple[str, ...] = ()
    if note is not None:
        prog = recovery.with_note(prog, found, note, live=True)
    elif not prog.flags & ProgramFlags.IS_LINUX_KERNEL:
        text, how = recovery.find_note(name, prog, found, _ram_ranges(connection))
        prog = recovery.with_note(prog, found, text, live=True)
        notes = (how,)
    return Target(prog, TargetKind.QEMU, name, racing=True, notes=notes)


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


@contextmanager
def paused(connection: QmpConnection) -> Iterator[str]:
    """
    Keep a guest's CPUs stopped within the context.

    The guest runs again when the context ends, and also when this process dies in a way that leaves
    it no time for that (SIGTERM, SIGKILL, a crash): a guard process that shares the connection sees
    to it. A guest that was stopped already stays so.

    :return: what was done, for the target's notes
    :raises TargetError: if it cannot be stopped, or cannot be continued
    """
    if not connection.is_running():
        yield "the guest was already stopped, and stays so"
        return
    guard = _start_guard(connection)
    try:
        try:
            connection.execute("stop")
            yield "guest paused"
        finally:
            _resume(connection)
            _dismiss(guard)
    finally:
        assert guard.stdin is not None
        guard.stdin.close()


def _resume(connection: QmpConnection) -> None:
    try:
        connection.execute("cont")
    except OSError:
        # QEMU has ended or closed the connection: there is nothing left to continue, or the guard
        # cannot reach it either.
        pass
    except TargetError as error:
        raise TargetError(f"the guest could not be continued and stays stopped: {error}") from None


def _start_guard(connection: QmpConnection) -> subprocess.Popen[bytes]:
    """Start the process that continues the guest should this one die, and wait until it is up."""
    script = Path(__file__).with_name("resume_guard.py")
    try:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script), str(connection.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(connection.fileno(),),
            # Not for the terminal's Ctrl-C, nor for a shell that ends its process group.
            start_new_session=True,
        )
    except OSError as error:
        raise TargetError(
            f"not paused: cannot start what would continue the guest: {error}"
        ) from None
    assert guard.stdout is not None
    if os.read(guard.stdout.fileno(), 16) != b"ready\n":
        raise TargetError("not paused: what would continue the guest does not start")
    guard.stdout.close()
    return guard


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    assert guard.stdin is not None
    try:
        guard.stdin.write(b"done\n")
        guard.stdin.flush()
        guard.wait(_GUARD_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        guard.kill()
