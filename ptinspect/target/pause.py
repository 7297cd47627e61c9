# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stop a QEMU guest for as long as it is looked at, and continue it whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Callable

from ptinspect.errors import TargetError
from ptinspect.target.qmp import QmpConnection
from ptinspect.target.wording import reason

#: Seconds that the guard gets to end once it is dismissed.
_GUARD_SECONDS = 20.0

#: What ends a process unless it does something about it, apart from Ctrl-C, which Python makes an
#: exception itself.
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def paused(connection: QmpConnection) -> Iterator[str]:
    """
    Keep a guest's CPUs stopped within the context.

    The guest runs again when the context ends. SIGTERM and SIGHUP end it like an exception. Should
    this process die without ending it (SIGKILL, a crash), a guard process that shares the
    connection continues the guest. A guest that was stopped already stays so.

    :return: what was done, for the target's notes
    :raises TargetError: if it cannot be stopped, or cannot be continued
    """
    try:
        running = connection.is_running()
    except OSError as error:
        raise TargetError(f"{connection.address}: {reason(error)}") from None
    if not running:
        yield "the guest was already stopped, and stays so"
        return
    with _signals_as_exits(), _guard(connection) as dismiss:
        try:
            connection.execute("stop")
            yield "guest paused"
        finally:
            _resume(connection)
            dismiss()


@contextmanager
def _signals_as_exits() -> Iterator[None]:
    """Let signals that would end the process at once end it through all its contexts instead."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    replaced = []
    # Only the main thread may; and what somebody else has arranged stays.
    if threading.current_thread() is threading.main_thread():
        for number in _ENDING_SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, leave)
                replaced.append(number)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def _resume(connection: QmpConnection) -> None:
    try:
        connection.execute("cont")
    except OSError:
        # QEMU has ended, and the guest with it.
        pass
    except TargetError as error:
        raise TargetError(f"the guest could not be continued and stays stopped: {error}") from None


@contextmanager
def _guard(connection: QmpConnection) -> Iterator[Callable[[], None]]:
    """
    Have a process that continues the guest should this one die.

    :return: tells it that this is not needed any more
    """
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
        raise TargetError(f"not paused: no guard can be started: {reason(error)}") from None
    assert guard.stdin is not None
    assert guard.stdout is not None

    def dismiss() -> None:
        assert guard.stdin is not None
        try:
            guard.stdin.write(b"done\n")
            guard.stdin.flush()
            guard.wait(_GUARD_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            guard.kill()

    try:
        if os.read(guard.stdout.fileno(), 16) != b"ready\n":
            raise TargetError("not paused: the guard that would continue the guest does not start")
        yield dismiss
    finally:
        # Without dismissal this makes the guard continue the guest.
        guard.stdin.close()
        guard.stdout.close()
        guard.wait()
