# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP: the shared connection, attaching to a guest, refusals."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import target_files
from drgn import FaultError, ProgramFlags
from target_fake_qemu import FakeQemu

from ptinspect.errors import ExitStatus, TargetError
from ptinspect.target import architecture, qmp
from ptinspect.target.guest import open_guest
from ptinspect.target.options import TargetKind
from ptinspect.target.qmp import QmpConnection


def connected(fake: FakeQemu) -> QmpConnection:
    """A connection in command mode, as drgn leaves it after attaching."""
    connection = QmpConnection(fake.socket)
    fd = connection.duplicate_fd()
    with socket.socket(fileno=fd) as drgn_side:
        line = b""
        while not line.endswith(b"\n"):
            line += drgn_side.recv(1)
    assert b'"QMP"' in line
    connection.execute("qmp_capabilities")
    return connection


def test_greeting_is_left_for_drgn(tmp_path: Path) -> None:
    with FakeQemu(tmp_path) as fake:
        connected(fake).close()
        assert fake.commands() == ["qmp_capabilities"]


def test_replies_are_told_from_events(tmp_path: Path) -> None:
    with FakeQemu(tmp_path, events=True) as fake:
        connection = connected(fake)
        assert connection.is_running()
        connection.execute("stop")
        assert not connection.is_running()
        assert "pc.ram" in connection.monitor("info mtree -f")
        connection.close()


def test_nothing_beyond_the_reply_is_read(tmp_path: Path) -> None:
    """What comes in the same packet after the reply is drgn's."""
    with FakeQemu(tmp_path, events=True) as fake:
        connection = connected(fake)
        with socket.socket(fileno=connection.duplicate_fd()) as drgn_side:
            drgn_side.sendall(b'{"execute": "query-target"}\r\n')
            assert connection.is_running()
            # Both replies were on their way; this one was skipped, for it has another id, and the
            # events before it with it. The line that follows is whole.
            drgn_side.sendall(b'{"execute": "query-target"}\r\n')
            lines = drgn_side.makefile("rb")
            assert b'"event"' in lines.readline()
            assert b'"arch"' in lines.readline()


def test_refused_command(tmp_path: Path) -> None:
    with FakeQemu(tmp_path, refuse=["stop"]) as fake:
        connection = connected(fake)
        with pytest.raises(TargetError, match="QEMU refuses 'stop': not now"):
            connection.execute("stop")
        assert connection.is_running()


def test_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "_REPLY_SECONDS", 0.2)
    with FakeQemu(tmp_path, mute=["query-status"]) as fake:
        connection = connected(fake)
        with pytest.raises(TargetError, match="QEMU does not answer"):
            connection.is_running()


def test_no_answer_to_drgn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """drgn would wait for ever, and no signal would end it."""
    monkeypatch.setattr(qmp, "_REPLY_SECONDS", 1)
    with FakeQemu(tmp_path, mute=["query-target"]) as fake:
        refused(fake.socket, "QEMU does not answer")


def test_vanished_while_attaching(tmp_path: Path) -> None:
    with FakeQemu(tmp_path, end_on="query-target") as fake:
        refused(fake.socket, "closed unexpectedly")


def test_vanished(tmp_path: Path) -> None:
    with FakeQemu(tmp_path) as fake:
        connection = connected(fake)
        fake.end()
        with pytest.raises(OSError, match=r"closed|Broken pipe|reset"):
            connection.is_running()


@pytest.mark.parametrize(
    ("greeting", "message"),
    [
        ("garbage", "does not speak QMP"),
        ("flood", "does not speak QMP"),
        ("close", "closed at once: not a QMP socket"),
        ("none", "another client is connected"),
    ],
)
def test_not_qmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, greeting: str, message: str
) -> None:
    monkeypatch.setattr(qmp, "_GREETING_SECONDS", 0.5)
    with FakeQemu(tmp_path, greeting=greeting) as fake:
        refused(fake.socket, message)


def test_second_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "_GREETING_SECONDS", 0.3)
    with FakeQemu(tmp_path) as fake:
        first = connected(fake)
        # The backlog of a listening socket takes some before it is full.
        for _ in range(4):
            refused(fake.socket, "another client is connected")
        first.close()


def refused(address: str, message: str) -> None:
    """Opening fails with one line that says this."""
    with pytest.raises(TargetError, match=message) as caught, open_guest(address, None, None):
        pass
    text = str(caught.value)
    assert text.startswith(address)
    assert "\n" not in text
    assert caught.value.exit_status == ExitStatus.TARGET


def test_no_socket(tmp_path: Path) -> None:
    refused(str(tmp_path / "gone"), "no such socket")


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(tmp_path / "qmp"))
    refused(str(tmp_path / "qmp"), "nothing listens there")


def test_not_a_socket(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(str(tmp_path / "file"), "not a socket")
    refused(str(tmp_path), "not a socket")


def test_overlong_path() -> None:
    refused("/" + "x" * 200, "too long")


def test_tcp() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def greet() -> None:
        client, _ = listener.accept()
        with client:
            client.sendall(b'{"QMP": {}}\r\n')
            client.recv(1)

    thread = threading.Thread(target=greet)
    thread.start()
    QmpConnection(f":{port}").close()
    thread.join()
    listener.close()
    refused(f"127.0.0.1:{port}", "nothing listens there")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("localhost:4444", ("localhost", 4444)),
        (":1", ("localhost", 1)),
        ("/tmp/x:1", None),
        ("./x:1", None),
        ("x:0", None),
        ("x:65536", None),
        ("qmp", None),
        ("x:y", None),
    ],
)
def test_tcp_address(address: str, expected: object) -> None:
    assert qmp._tcp_address(address) == expected


def open_options(fake: FakeQemu, **options: Any) -> Any:
    return open_guest(fake.socket, options.get("architecture"), options.get("note"))


def test_guest_with_device(tmp_path: Path) -> None:
    with FakeQemu(tmp_path, device=True) as fake, open_options(fake) as guest:
        target = guest.target
        assert target.kind is TargetKind.QEMU
        assert target.racing
        assert target.notes == ()
        assert target.prog.flags & ProgramFlags.IS_LINUX_KERNEL
        assert target.prog.flags & ProgramFlags.IS_LIVE
        assert target.prog["UTS_RELEASE"].string_().decode() == target_files.RELEASE


@pytest.mark.parametrize("arch", ["x86_64", "s390x"])
def test_guest_without_device(tmp_path: Path, arch: str) -> None:
    with FakeQemu(tmp_path, arch=arch) as fake, open_options(fake) as guest:
        prog = guest.target.prog
        expected = "lowcore" if arch == "s390x" else "physical address 0x40000"
        (note,) = guest.target.notes
        assert expected in note
        base = 0 if arch == "s390x" else target_files.X86_KERNEL
        address = base + target_files.UTS_NAMESPACE + 8
        assert prog.read_c_string(address) == b"Linux"
        assert prog.read(target_files.UTS_NAMESPACE + 8, 5, True) == b"Linux"
        with pytest.raises(FaultError):
            prog.read(target_files.MEMORY_BYTES, 8, True)


def test_lowcore_without_pointer(tmp_path: Path) -> None:
    """Then the note is searched for as on any other architecture."""
    with FakeQemu(tmp_path, arch="s390x", note=False) as fake, open_options(fake) as guest:
        assert "physical address 0x40000" in guest.target.notes[0]


def test_guest_without_note(tmp_path: Path) -> None:
    with FakeQemu(tmp_path, note=False) as fake:
        refused(fake.socket, r"no VMCOREINFO note.*-device vmcoreinfo.*--vmcoreinfo FILE")


def test_given_note(tmp_path: Path) -> None:
    fake = FakeQemu(tmp_path, note=False)
    with fake, open_options(fake, note=target_files.x86_text()) as guest:
        address = target_files.X86_KERNEL + target_files.UTS_NAMESPACE + 8
        assert guest.target.prog.read_c_string(address) == b"Linux"


def test_slow_memory(tmp_path: Path) -> None:
    """Through the monitor memory can be read, but is not searched."""
    with FakeQemu(tmp_path, hidden=True) as fake:
        refused(fake.socket, "too slow to search")
    (tmp_path / "s390x").mkdir()
    with (
        FakeQemu(tmp_path / "s390x", hidden=True, arch="s390x") as fake,
        open_options(fake) as guest,
    ):
        assert guest.target.notes[0] == "memory is read through QEMU's monitor: slow"
        assert guest.target.prog.read_c_string(target_files.UTS_NAMESPACE + 8) == b"Linux"


@pytest.mark.parametrize("name", ["i386", "arm", "riscv32", "loongarch64", "sh4"])
def test_unsupported_architecture(tmp_path: Path, name: str) -> None:
    with FakeQemu(tmp_path, arch=name) as fake:
        refused(fake.socket, "unsupported architecture")


def test_contradicting_architecture(tmp_path: Path) -> None:
    fake = FakeQemu(tmp_path)
    contradiction = pytest.raises(TargetError, match="but the guest is x86_64")
    with fake, contradiction, open_options(fake, architecture=architecture.by_name("s390x")):
        pass


def test_socket_is_free_afterwards(tmp_path: Path) -> None:
    with FakeQemu(tmp_path, device=True) as fake:
        kept = []
        for _ in range(3):
            with open_options(fake) as guest:
                # Programs that live on must not keep the socket.
                kept.append(guest.target.prog)
