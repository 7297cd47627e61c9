# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest under QEMU, without KVM: boot, wait, stop, continue, dump; gone when the block ends."""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Callable

from lab.arches import Arch
from lab.errors import GuestError
from lab.run import made_whole, say, tool

_QEMU_PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-s390x": "qemu-system-misc",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-ppc64": "qemu-system-ppc",
    "qemu-system-riscv64": "qemu-system-misc",
}


_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def _die_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone, however it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Qmp:
    """QEMU's control protocol (JSON lines over a Unix socket), as far as the lab needs it."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._stream = self._socket.makefile("rw", encoding="utf-8")
        self._read()  # the greeting
        self.execute("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        line = self._stream.readline()
        if not line:
            raise GuestError("QEMU closed its control socket")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, **arguments: object) -> Any:
        """
        Run a command and get what it returns; events in between are dropped.

        :raises GuestError: if QEMU refuses, or is gone
        """
        try:
            json.dump({"execute": command, "arguments": arguments}, self._stream)
            self._stream.write("\n")
            self._stream.flush()
            while True:
                message = self._read()
                if "error" in message:
                    raise GuestError(f"QEMU refused {command}: {message['error'].get('desc')}")
                if "return" in message:
                    return message["return"]
        except OSError as error:
            raise GuestError(f"{command}: QEMU's control socket failed: {error}") from error

    def close(self) -> None:
        """Let go of the socket."""
        self._stream.close()
        self._socket.close()


class Guest:
    """
    A guest that runs as long as the ``with`` block.

    :param kernel: bootable image
    :param memory: MiB
    :param append: words added to the kernel command line (the console is there already)
    :param extra: QEMU options, after the architecture's own
    :param console_log: where to keep the console's text; by default it goes with the guest
    :param stub: whether QEMU is to offer its debug stub (:class:`lab.stub.Stub`)
    """

    def __init__(
        self,
        arch: Arch,
        kernel: Path,
        initrd: Path | None = None,
        *,
        memory: int = 1024,
        smp: str = "1",
        append: str = "",
        extra: Sequence[str] = (),
        console_log: Path | None = None,
        stub: bool = False,
    ) -> None:
        self.arch = arch
        self.command_line = f"console={arch.console} panic=-1 {append}".strip()
        # A Unix socket's path has to be short, so not in the cache nor in a test's folder.
        self._folder = Path(tempfile.mkdtemp(prefix="lab-"))
        self.qmp_socket = self._folder / "qmp"  #: for drgn: one client at a time
        self.second_socket = self._folder / "second"  #: the same for somebody else
        self._control_socket = self._folder / "control"
        self.stub_socket = self._folder / "stub"  #: there if it was asked for
        self.console_log = console_log or self._folder / "console"
        self._errors = self._folder / "errors"
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Qmp | None = None
        self._command = [
            tool(arch.qemu, _QEMU_PACKAGES.get(arch.qemu, "qemu-system")),
            *arch.machine,
            *("-m", str(memory), "-smp", smp, "-kernel", str(kernel)),
            *(("-initrd", str(initrd)) if initrd else ()),
            *("-append", self.command_line),
            *("-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot"),
            *("-serial", f"file:{self.console_log}"),
            *("-qmp", f"unix:{self.qmp_socket},server=on,wait=off"),
            *("-qmp", f"unix:{self.second_socket},server=on,wait=off"),
            *("-qmp", f"unix:{self._control_socket},server=on,wait=off"),
            *(("-gdb", f"unix:{self.stub_socket},server=on,wait=off") if stub else ()),
            *extra,
        ]

    def __enter__(self) -> Guest:
        self.console_log.write_bytes(b"")
        try:
            with self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    preexec_fn=_die_with_parent,
                )
            self._control = self._connect()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _connect(self, timeout: float = 30) -> Qmp:
        end = time.monotonic() + timeout
        while True:
            self._check_alive()
            try:
                return Qmp(self._control_socket)
            except OSError:
                if time.monotonic() > end:
                    raise GuestError("QEMU did not open its control socket") from None
                time.sleep(0.02)

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _check_alive(self) -> None:
        if self._process is None:
            raise GuestError("the guest is not running")
        if self._process.poll() is not None:
            said = self._errors.read_text(errors="replace").strip()
            tail = "\n".join(self.console().splitlines()[-20:])
            raise GuestError(
                f"QEMU ended with status {self._process.returncode}"
                + (f": {said}" if said else "")
                + (f"\nthe console's end:\n{tail}" if tail else "")
            )

    @property
    def control(self) -> Qmp:
        """The control connection (the other one is left to drgn)."""
        if self._control is None:
            raise GuestError("the guest is not running")
        return self._control

    @property
    def pid(self) -> int:
        """QEMU's process."""
        self._check_alive()
        assert self._process is not None
        return self._process.pid

    def console(self) -> str:
        """Get what the guest wrote on its console so far, lines ended by ``\\n``."""
        if not self.console_log.exists():
            return ""
        return self.console_log.read_bytes().decode(errors="replace").replace("\r", "")

    def wait_for(
        self, text: str, timeout: float = 120, *, panics: bool = False, failed: str = ""
    ) -> str:
        """
        Wait until the console has said this; a kernel panic ends the wait at once.

        :param panics: the kernel is meant to panic, and another one takes over
        :param failed: what the guest says if it cannot go on, with the reason behind it
        :return: the console's text
        :raises GuestError: when the guest ended or the time is over, with the console's end
        """
        end = time.monotonic() + timeout
        while True:
            said = self.console()
            if text in said:
                return said
            self._check_alive()
            late = time.monotonic() > end
            if late or ("Kernel panic" in said and not panics):
                tail = "\n".join(said.splitlines()[-20:])
                why = f"{text!r} did not come in {timeout:g} s" if late else "the kernel panicked"
                raise GuestError(f"{why}; the console's end:\n{tail}")
            if failed and failed in said:
                why = said.partition(failed)[2].partition("\n")[0]
                tail = "\n".join(said.splitlines()[-20:])
                raise GuestError(f"{why}; the console's end:\n{tail}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop all CPUs."""
        self.control.execute("stop")

    def cont(self) -> None:
        """Let the CPUs run again."""
        self.control.execute("cont")

    def dump(self, path: Path, form: str = "elf") -> None:
        """
        Dump the guest's memory.

        :param form: as QEMU names it: ``elf``, ``kdump-zlib``
        :raises GuestError: if QEMU cannot
        """
        with made_whole(path) as unfinished:
            self.control.execute(
                "dump-guest-memory", paging=False, protocol=f"file:{unfinished}", format=form
            )


#: Under emulation a guest with two CPUs now and then oopses in its idle loop while it boots, before
#: there is anything to look at.
_BOOT_ATTEMPTS = 3


@contextmanager
def booted(make: Callable[[], Guest], text: str, timeout: float) -> Iterator[Guest]:
    """
    A guest that has said on its console that it is ready; one that dies before is booted again.

    :param make: makes the guest, not yet started
    :param text: what it says when it is ready
    :raises GuestError: if none of some attempts gets there
    """
    for attempt in range(1, _BOOT_ATTEMPTS + 1):
        with make() as guest:
            try:
                guest.wait_for(text, timeout)
            except GuestError as error:
                if attempt == _BOOT_ATTEMPTS:
                    raise
                say(f"the guest did not get ready, booting it again: {error}")
                continue
            yield guest
            return
