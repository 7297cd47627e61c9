# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
One connection to QEMU's machine protocol (QMP), shared with drgn.

A QMP socket serves one client at a time, and drgn keeps the one that it attaches with. So the
connection is made here, drgn gets a duplicate of its file descriptor, and commands such as ``stop``
go over the same connection between drgn's own. That is safe because drgn sends a command only
within a call and reads its reply before the call returns; messages are read here one line at a
time, never beyond, so that nothing that drgn waits for is taken from it. Replies carry the id of
their command; events, which may come at any time, both sides skip.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import socket
import stat
import struct
import time
from typing import Any

from ptinspect.errors import TargetError
from ptinspect.target.wording import reason

#: Seconds within which QEMU greets a client, which it does at once unless it has another one.
_GREETING_SECONDS = 5.0
#: Seconds for a reply; a busy QEMU may take a while, a dead one never answers.
_REPLY_SECONDS = 30.0
#: A greeting is some hundred bytes; whoever sends more without a newline does not speak QMP.
_MOST_GREETING_BYTES = 65536


class QmpConnection:
    """A connection on which QEMU has sent its greeting, which is left for drgn to read."""

    def __init__(self, address: str) -> None:
        """
        :param address: Path of a Unix socket, or ``host:port``.
        :raises TargetError: if nothing there speaks QMP
        """
        self.address = address
        self._ids = itertools.count(1)
        self._socket = _connect(address)
        try:
            self._check_greeting()
        except BaseException:
            self._socket.close()
            raise
        # drgn's reads have no timeout of their own, and a signal does not end them.
        seconds = struct.pack("@ll", int(_REPLY_SECONDS), 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)

    def duplicate_fd(self) -> int:
        """A duplicate of the file descriptor, for drgn to own."""
        return os.dup(self._socket.fileno())

    def fileno(self) -> int:
        """The file descriptor itself."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the connection, also for drgn, so that the socket is free for the next client."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def is_running(self) -> bool:
        """Whether the guest's CPUs run."""
        status = self.execute("query-status")
        return bool(isinstance(status, dict) and status.get("running"))

    def monitor(self, command: str) -> str:
        """The output of a command of the human monitor."""
        return str(self.execute("human-monitor-command", {"command-line": command}))

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """
        Send a command and wait for its reply.

        :raises ConnectionError: if QEMU is gone
        :raises TargetError: if QEMU refuses the command, or does not answer
        """
        identity = f"ptinspect-{os.getpid()}-{next(self._ids)}"
        message: dict[str, Any] = {"execute": command, "id": identity}
        if arguments is not None:
            message["arguments"] = arguments
        self._socket.sendall(json.dumps(message).encode() + b"\r\n")
        deadline = time.monotonic() + _REPLY_SECONDS
        while True:
            line = self._receive_line(deadline)
            try:
                reply = json.loads(line)
            except ValueError:
                continue
            if not isinstance(reply, dict) or reply.get("id") != identity:
                continue
            if "error" in reply:
                reason = reply["error"]
                description = reason.get("desc") if isinstance(reason, dict) else reason
                raise TargetError(f"{self.address}: QEMU refuses {command!r}: {description}")
            return reply.get("return")

    def _receive_line(self, deadline: float) -> bytes:
        """Receive up to the next newline and not a byte more."""
        line = b""
        while True:
            data = self._peek(deadline)
            if data is None:
                raise TargetError(f"{self.address}: QEMU does not answer")
            if not data:
                raise ConnectionError(f"{self.address}: QEMU closed the connection")
            end = data.find(b"\n") + 1
            line += self._socket.recv(end or len(data))
            if end:
                return line

    def _peek(self, deadline: float) -> bytes | None:
        """What can be received now or soon, left in place; None if nothing comes in time."""
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        return self._socket.recv(65536, socket.MSG_PEEK)

    def _check_greeting(self) -> None:
        deadline = time.monotonic() + _GREETING_SECONDS
        size = 0
        while True:
            try:
                data = self._peek(deadline)
            except OSError as error:
                raise TargetError(f"{self.address}: {reason(error)}") from None
            if data is None:
                break
            if not data:
                raise TargetError(f"{self.address}: closed at once: not a QMP socket")
            line, newline, _ = data.partition(b"\n")
            if newline or len(data) >= _MOST_GREETING_BYTES:
                if not _is_greeting(line):
                    raise TargetError(
                        f"{self.address}: what listens there does not speak QMP "
                        "(run QEMU with -qmp unix:SOCKET,server=on,wait=off)"
                    )
                return
            if len(data) == size:
                # Peeking does not wait for more than is there.
                time.sleep(0.01)
            size = len(data)
            if time.monotonic() > deadline:
                break
        raise TargetError(
            f"{self.address}: no QMP greeting within {_GREETING_SECONDS:.0f} s: "
            "another client is connected (a QMP socket serves one at a time), QEMU hangs, "
            "or this is not a QMP socket"
        )


def _is_greeting(line: bytes) -> bool:
    try:
        greeting = json.loads(line)
    except ValueError:
        return False
    return isinstance(greeting, dict) and "QMP" in greeting


def _tcp_address(address: str) -> tuple[str, int] | None:
    """Host and port, if drgn would take the address for such: see Program.set_qemu_qmp()."""
    host, colon, port = address.rpartition(":")
    if not colon or address[0] in "/." or not (port.isascii() and port.isdigit()):
        return None
    return (host or "localhost", int(port)) if 1 <= int(port) <= 65535 else None


def _connect(address: str) -> socket.socket:
    if not address:
        raise TargetError("--qemu: no socket given")
    tcp = _tcp_address(address)
    connection: socket.socket | None = None
    try:
        if tcp is not None:
            connection = socket.create_connection(tcp, timeout=_GREETING_SECONDS)
        else:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(_GREETING_SECONDS)
            connection.connect(address)
        # Blocking from here on: a timeout would make drgn's duplicate non-blocking too.
        connection.settimeout(None)
        return connection
    except OSError as error:
        if connection is not None:
            connection.close()
        raise TargetError(f"{address}: {_connect_problem(address, error)}") from None


def _connect_problem(address: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such socket (is QEMU running with -qmp unix:SOCKET,server=on,wait=off?)"
    if isinstance(error, ConnectionRefusedError):
        if os.path.exists(address) and not stat.S_ISSOCK(os.stat(address).st_mode):
            return "not a socket"
        return "connection refused: nothing listens there (has QEMU ended?)"
    if isinstance(error, (TimeoutError, socket.timeout, BlockingIOError)):
        return "no connection: another client is connected (a QMP socket serves one at a time)"
    if isinstance(error, PermissionError):
        return "permission denied (run as the user that runs QEMU, or as root)"
    if not isinstance(error, socket.gaierror) and os.path.exists(address):
        return f"not a QMP socket ({reason(error)})"
    return reason(error)
