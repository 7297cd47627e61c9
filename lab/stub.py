# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
QEMU's debug stub, as far as writing a guest's memory needs it.

The protocol is GDB's: ``$packet#checksum``, acknowledged with ``+``. What GDB and QEMU add to it is
described in "Debugging with GDB" (Remote Protocol) and in QEMU's docs/system/gdb.rst.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from lab.errors import GuestError

#: Bytes of memory in one packet. QEMU takes packets of 4096 characters, two for each byte.
_MOST = 1024


class Stub:
    """
    A connection to the stub, in a ``with`` block. Addresses are the guest's physical ones.

    QEMU stops the guest when somebody connects, and leaves it stopped when the connection is closed
    without a word. So stop the guest before, and let it run again after, through QMP.
    """

    def __init__(self, path: Path, timeout: float = 60) -> None:
        """
        :param path: The Unix socket.
        :raises GuestError: if nobody listens there, or it cannot be told apart from GDB's own
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(str(path))
            self._stream = self._socket.makefile("rb")
            # Else addresses are virtual ones of whatever the first CPU is doing.
            self._command("Qqemu.PhyMemMode:1")
        except BaseException as error:
            self._socket.close()
            if isinstance(error, OSError):
                raise GuestError(f"QEMU's debug stub: {error}") from error
            raise

    def __enter__(self) -> Stub:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._socket.close()

    def read(self, address: int, size: int) -> bytes:
        """
        Read memory.

        :raises GuestError: if QEMU refuses, or is gone
        """
        data = b""
        while len(data) < size:
            length = min(size - len(data), _MOST)
            data += bytes.fromhex(self._ask(f"m{address + len(data):x},{length:x}"))
        return data

    def write(self, address: int, data: bytes) -> None:
        """
        Write memory, and see to it that it is there.

        :raises GuestError: if QEMU refuses or is gone, or there is no memory that can be written
        """
        for start in range(0, len(data), _MOST):
            part = data[start : start + _MOST]
            self._command(f"M{address + start:x},{len(part):x}:{part.hex()}")
        # What is written to a hole is lost without an error.
        if self.read(address, len(data)) != data:
            raise GuestError(f"QEMU's debug stub: {address:#x} does not keep what is written there")

    def _command(self, packet: str) -> None:
        answer = self._ask(packet)
        if answer != "OK":
            raise GuestError(f"QEMU's debug stub: {packet[:40]!r} gives {answer!r}")

    def _ask(self, packet: str) -> str:
        try:
            self._socket.sendall(f"${packet}#{_checksum(packet.encode()):02x}".encode())
            answer = self._receive()
        except OSError as error:
            raise GuestError(f"QEMU's debug stub: {error}") from error
        if answer.startswith("E") and len(answer) == 3:
            raise GuestError(f"QEMU's debug stub: {packet[:40]!r} gives error {answer[1:]}")
        return answer

    def _receive(self) -> str:
        while True:
            byte = self._stream.read(1)
            if byte == b"":
                raise GuestError("QEMU closed its debug stub")
            if byte == b"-":
                raise GuestError("QEMU's debug stub did not understand a packet")
            if byte == b"$":
                break
        body = bytearray()
        while (byte := self._stream.read(1)) != b"#":
            if byte == b"":
                raise GuestError("QEMU closed its debug stub")
            body += byte
        if int(self._stream.read(2), 16) != _checksum(body):
            raise GuestError("QEMU's debug stub sent a packet with a wrong checksum")
        self._socket.sendall(b"+")
        return body.decode()


def _checksum(body: Iterable[int]) -> int:
    return sum(body) % 256
