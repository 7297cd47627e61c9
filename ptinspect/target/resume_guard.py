# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The process that continues a paused QEMU guest if the one that paused it dies.

Run with the file descriptor of the QMP connection as its only argument. When "done" comes on its
standard input it ends; when its standard input ends without that, the guest is continued first.
It stands alone (python -I -S, nothing of ptinspect imported) so that it starts within milliseconds.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

_SECONDS = 20.0
_IDENTITY = b"ptinspect-guard"


def continue_guest(connection: socket.socket) -> None:
    """Send ``cont`` and wait for the reply, or for as long as it is worth it."""
    # 0xff puts QEMU's parser back to its start, should the dead process have sent half a command
    # (QEMU's docs/interop/qmp-spec: forcing the JSON parser into known-good state).
    connection.sendall(b'\xff\r\n{"execute": "cont", "id": "' + _IDENTITY + b'"}\r\n')
    connection.settimeout(1.0)
    deadline = time.monotonic() + _SECONDS
    received = b""
    while time.monotonic() < deadline and _IDENTITY not in received:
        try:
            data = connection.recv(65536)
        except socket.timeout:
            continue
        if not data:
            return
        received = received[-len(_IDENTITY) :] + data


def main() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        told = b""
        while data := os.read(0, 64):
            told += data
            if b"done" in told:
                return
        continue_guest(connection)


if __name__ == "__main__":
    main()
