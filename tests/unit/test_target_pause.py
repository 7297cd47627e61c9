# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A paused guest is continued on every way out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from target_fake_qemu import FakeQemu

from ptinspect.errors import TargetError
from ptinspect.target import pause
from ptinspect.target.guest import Guest, open_guest
from ptinspect.target.pause import paused

#: What the process in the tests below does with a paused guest.
HOLDER = """
import os, sys, time
from ptinspect.target.guest import open_guest
from ptinspect.target.pause import paused
with open_guest(sys.argv[1], None, None) as guest, paused(guest.connection):
    print("paused", flush=True)
    {action}
"""


@contextmanager
def paused_guest(fake: FakeQemu) -> Iterator[Guest]:
    """Attach to a guest and stop it."""
    with open_guest(fake.socket, None, None) as guest, paused(guest.connection):
        yield guest


def test_stop_and_cont(tmp_path: Path) -> None:
    with FakeQemu(tmp_path) as fake, open_guest(fake.socket, None, None) as guest:
        with paused(guest.connection) as how:
            assert how == "guest paused"
            assert fake.cpu_commands() == ["stop"]
            assert not guest.connection.is_running()
        assert fake.cpu_commands() == ["stop", "cont"]
        assert guest.connection.is_running()


def test_already_stopped(tmp_path: Path) -> None:
    with FakeQemu(tmp_path, running=False) as fake, open_guest(fake.socket, None, None) as guest:
        with paused(guest.connection) as how:
            assert "stays so" in how
        assert fake.cpu_commands() == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, BrokenPipeError])
def test_exceptions(tmp_path: Path, error: type[BaseException]) -> None:
    with FakeQemu(tmp_path) as fake:
        with pytest.raises(error), paused_guest(fake):
            raise error
        assert fake.cpu_commands() == ["stop", "cont"]


def test_refused_stop(tmp_path: Path) -> None:
    """It may have stopped all the same, so it is continued."""
    with FakeQemu(tmp_path, refuse=["stop"]) as fake:
        with pytest.raises(TargetError, match="refuses 'stop'"), paused_guest(fake):
            pytest.fail("not paused")
        assert fake.cpu_commands() == ["stop", "cont"]


def test_refused_cont(tmp_path: Path) -> None:
    with FakeQemu(tmp_path, refuse=["cont"]) as fake, ExitStack() as stack:
        stack.enter_context(paused_guest(fake))
        with pytest.raises(TargetError, match="could not be continued and stays stopped"):
            stack.close()


def test_qemu_ends_meanwhile(tmp_path: Path) -> None:
    with FakeQemu(tmp_path) as fake, paused_guest(fake):
        fake.end()


def test_qemu_ends_before(tmp_path: Path) -> None:
    fake = FakeQemu(tmp_path, end_on="query-status")
    closed = pytest.raises(TargetError, match="closed the connection")
    with fake, closed, paused_guest(fake):
        pytest.fail("not paused")


@pytest.mark.parametrize("executable", ["/nonexistent/python", "/bin/false"])
def test_no_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str) -> None:
    """Without what would continue the guest it is not stopped in the first place."""
    with FakeQemu(tmp_path) as fake, open_guest(fake.socket, None, None) as guest:
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(TargetError, match="not paused: "), paused(guest.connection):
            pytest.fail("paused")
        assert "stop" not in fake.commands()


def test_no_process_is_left(tmp_path: Path) -> None:
    with FakeQemu(tmp_path) as fake, open_guest(fake.socket, None, None) as guest:
        with paused(guest.connection):
            pass
        # Only the fake itself is a child now.
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)
        assert fake.cpu_commands() == ["stop", "cont"]


def test_signal_handlers_are_restored(tmp_path: Path) -> None:
    with FakeQemu(tmp_path) as fake, open_guest(fake.socket, None, None) as guest:
        before = signal.getsignal(signal.SIGTERM)
        with paused(guest.connection):
            assert signal.getsignal(signal.SIGTERM) != before
        assert signal.getsignal(signal.SIGTERM) == before


def test_own_signal_handler_stays(tmp_path: Path) -> None:
    def own(number: int, frame: object) -> None:
        pass

    before = signal.signal(signal.SIGHUP, own)
    try:
        with FakeQemu(tmp_path) as fake, paused_guest(fake):
            assert signal.getsignal(signal.SIGHUP) == own
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread(tmp_path: Path) -> None:
    """There signal handlers cannot be set; everything else works."""
    done = []

    def work() -> None:
        with FakeQemu(tmp_path) as fake, open_guest(fake.socket, None, None) as guest:
            with paused(guest.connection):
                pass
            done.append(fake.cpu_commands())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [["stop", "cont"]]


def _heed_signals() -> None:
    """What runs the tests may ignore some (nohup, jobs in the background); children inherit it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def hold(fake: FakeQemu, action: str) -> subprocess.Popen[str]:
    """Start a process that pauses the guest and does something."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(action=action), fake.socket],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=_heed_signals,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "paused\n"
    return process


@pytest.mark.parametrize(
    "action", ["time.sleep(60)", "while True: guest.target.prog.read(0, 4096, True)"]
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals(tmp_path: Path, number: signal.Signals, action: str) -> None:
    """The guest runs again when the process has ended, not some time later."""
    with FakeQemu(tmp_path) as fake:
        process = hold(fake, action)
        assert fake.cpu_commands() == ["stop"]
        time.sleep(0.1)
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode in (-number, 128 + number)
        assert fake.cpu_commands() == ["stop", "cont"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT, signal.SIGSEGV])
def test_sudden_death(tmp_path: Path, number: signal.Signals) -> None:
    """The guard continues the guest."""
    with FakeQemu(tmp_path) as fake:
        process = hold(fake, "time.sleep(60)")
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode == -number
        assert fake.wait_for("cont")


@pytest.mark.parametrize("action", ["os._exit(5)", "os.abort()"])
def test_exit_without_unwinding(tmp_path: Path, action: str) -> None:
    with FakeQemu(tmp_path) as fake:
        hold(fake, action).communicate(timeout=30)
        assert fake.wait_for("cont")


def test_closed_pipe(tmp_path: Path) -> None:
    with FakeQemu(tmp_path) as fake:
        process = hold(fake, "while True: print('x' * 4096)")
        assert process.stdout is not None
        process.stdout.close()
        process.wait(30)
        assert fake.cpu_commands() == ["stop", "cont"]


def test_process_group_dies(tmp_path: Path) -> None:
    """A terminal's Ctrl-C and a shell's kill reach the whole group; the guard is in none."""
    with FakeQemu(tmp_path) as fake:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER.format(action="time.sleep(60)"), fake.socket],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"paused\n"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
        assert fake.wait_for("cont")


def test_guard_alone(tmp_path: Path) -> None:
    """The guard's own reading of "done": nothing is sent."""
    with FakeQemu(tmp_path) as fake, open_guest(fake.socket, None, None) as guest:
        with pause._guard(guest.connection) as dismiss:
            dismiss()
        assert fake.cpu_commands() == []
        with pause._guard(guest.connection):
            pass
        assert fake.cpu_commands() == ["cont"]
