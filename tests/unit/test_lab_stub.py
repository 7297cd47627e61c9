# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The debug stub's protocol, against a stub of 8 KiB."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.errors import GuestError
from lab.stub import Stub

BASE, SIZE = 0x1000, 0x2000


class FakeStub(threading.Thread):
    """Answers one client; addresses in the last KiB are like a ROM's."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.memory = bytearray(SIZE)
        self.packets: list[str] = []
        #: Laid before the next answer.
        self.noise = b""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self.start()

    def run(self) -> None:
        client, _ = self._listener.accept()
        text = b""
        while chunk := client.recv(8192):
            text = (text + chunk).lstrip(b"+")
            while found := re.match(rb"\$([^#]*)#([0-9a-f]{2})", text):
                text = text[found.end() :].lstrip(b"+")
                body = found[1].decode()
                assert int(found[2], 16) == sum(found[1]) % 256
                self.packets.append(body)
                answer = self._answer(body).encode()
                client.sendall(self.noise + b"+$%b#%02x" % (answer, sum(answer) % 256))
        client.close()

    def _answer(self, body: str) -> str:
        if body == "Qqemu.PhyMemMode:1":
            return "OK"
        kind, address, size, data = re.fullmatch(
            "([mM])([0-9a-f]+),([0-9a-f]+):?(.*)", body
        ).groups()  # type: ignore[union-attr]
        start = int(address, 16) - BASE
        if not 0 <= start <= SIZE - int(size, 16):
            return "E14"
        if kind == "m":
            return self.memory[start : start + int(size, 16)].hex()
        if start < SIZE - 1024:
            self.memory[start : start + int(size, 16)] = bytes.fromhex(data)
        return "OK"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[tuple[FakeStub, Stub]]:
    path = tmp_path / "stub"
    server = FakeStub(path)
    with Stub(path) as stub:
        yield server, stub
    server.join(10)


def test_memory_is_written_and_read(fake: tuple[FakeStub, Stub]) -> None:
    server, stub = fake
    data = bytes(n % 251 for n in range(3000))
    stub.write(BASE + 5, data)
    assert server.memory[5:3005] == data
    assert stub.read(BASE + 5, 3000) == data
    assert server.packets[0] == "Qqemu.PhyMemMode:1"
    # QEMU's packets have at most 4096 characters.
    assert max(map(len, server.packets)) < 4096


def test_what_was_said_before_is_skipped(fake: tuple[FakeStub, Stub]) -> None:
    server, stub = fake
    server.noise = b"++"
    stub.write(BASE, b"\x24\x23\x7d")
    assert server.memory[:3] == b"$#}"


def test_no_memory(fake: tuple[FakeStub, Stub]) -> None:
    _, stub = fake
    with pytest.raises(GuestError, match="error 14"):
        stub.write(BASE - 1, b"x")
    with pytest.raises(GuestError, match="does not keep"):
        stub.write(BASE + SIZE - 1, b"x")


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="debug stub"):
        Stub(tmp_path / "none")
