# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A terminal for tests: run ptinspect on it, and get all that it showed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios


def on_terminal(
    *arguments: str, typed: bytes = b"", lines: int = 24, **env: str
) -> tuple[int, str]:
    """
    Run ptinspect on a terminal of its own.

    :return: Its exit status, and what the terminal got.
    """
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", lines, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "ptinspect", *arguments],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", **env},
        start_new_session=True,
    )
    os.close(terminal)
    seen = b""
    os.write(controller, typed)
    with contextlib.suppress(OSError):  # the terminal's other end is gone
        while chunk := os.read(controller, 1 << 16):
            seen += chunk
    os.close(controller)
    return process.wait(timeout=60), seen.decode()
