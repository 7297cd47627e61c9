# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A QMP server with a crafted guest in its own memory, enough of one that drgn attaches to it.

It is a process of its own (drgn does not let other threads run while it waits for a reply), serves
one client at a time as QEMU does, and writes down every command that it gets.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import target_files

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}}}


class FakeQemu:
    """
    Run the server for the length of a ``with`` block.

    :param behaviour: ``greeting``: ``"none"``, ``"garbage"``, ``"close"`` or ``"flood"`` instead of
        a proper one; ``arch``: what query-target answers; ``running``: whether the CPUs run;
        ``device``: whether dumps have VMCOREINFO; ``note``: whether memory has it; ``refuse``:
        commands that fail; ``events``: send some before each reply; ``mute``: commands without
        reply; ``end_on``: a command at which QEMU ends.
    """

    def __init__(self, folder: Path, **behaviour: Any) -> None:
        self.socket = str(folder / "qmp")
        self._log = folder / "commands"
        self._behaviour = {"socket": self.socket, "log": str(self._log), **behaviour}

    def __enter__(self) -> FakeQemu:
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(self._behaviour)], stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"listening\n"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """End QEMU."""
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def commands(self) -> list[str]:
        """The commands so far."""
        return self._log.read_text().split() if self._log.exists() else []

    def cpu_commands(self) -> list[str]:
        """The commands so far that concern the CPUs."""
        return [command for command in self.commands() if command in ("stop", "cont")]

    def wait_for(self, command: str, seconds: float = 10.0) -> bool:
        """Whether a command comes soon, which another process may still be sending."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if command in self.commands():
                return True
            time.sleep(0.02)
        return False


class _Server:
    def __init__(self, behaviour: dict[str, Any]) -> None:
        self.behaviour = behaviour
        self.arch = behaviour.get("arch", "x86_64")
        self.running = behaviour.get("running", True)
        with_note = behaviour.get("note", True)
        if self.arch == "s390x":
            memory = target_files.s390x_memory(with_pointer=with_note)
        else:
            memory = target_files.x86_memory(with_note=with_note)
        self.memory = ctypes.create_string_buffer(bytes(memory), len(memory))
        self.fds: list[int] = []

    def serve(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.behaviour["socket"])
            listener.listen(1)
            print("listening", flush=True)
            while True:
                client, _ = listener.accept()
                with client:
                    self.serve_client(client)

    def serve_client(self, client: socket.socket) -> None:
        greeting = self.behaviour.get("greeting")
        if greeting == "close":
            return
        if greeting == "garbage":
            client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        elif greeting == "flood":
            client.sendall(b"x" * 200000)
        elif greeting != "none":
            # In two parts, as a slow QEMU might.
            text = json.dumps(GREETING).encode() + b"\r\n"
            client.sendall(text[:20])
            time.sleep(0.05)
            client.sendall(text[20:])
        buffer = b""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(client, 65536, 4)
            except OSError:
                return
            if not data:
                return
            self.fds += fds
            # What QEMU's parser does at such a byte, when it comes between two commands.
            buffer += data.replace(b"\xff", b"")
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                if line.strip():
                    try:
                        self.answer(client, json.loads(line))
                    except OSError:
                        return

    def answer(self, client: socket.socket, request: dict[str, Any]) -> None:
        command = request["execute"]
        with open(self.behaviour["log"], "a") as log:
            log.write(command + "\n")
        if command == self.behaviour.get("end_on"):
            os._exit(0)
        if command in self.behaviour.get("mute", ()):
            return
        if command in self.behaviour.get("refuse", ()):
            reply: dict[str, Any] = {"error": {"class": "GenericError", "desc": "not now"}}
        else:
            reply = {"return": self.execute(command, request.get("arguments", {}))}
        if "id" in request:
            reply["id"] = request["id"]
        if self.behaviour.get("events"):
            event = json.dumps({"event": "RTC_CHANGE", "data": {"offset": 1}})
            client.sendall(event.encode() + b"\r\n" + b"not JSON at all\r\n" * ("id" in request))
        client.sendall(json.dumps(reply).encode() + b"\r\n")

    def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        if command == "query-target":
            return {"arch": self.arch}
        if command == "query-status":
            return {"running": self.running, "status": "running" if self.running else "paused"}
        if command in ("stop", "cont"):
            self.running = command == "cont"
        if command == "human-monitor-command":
            return self.monitor(arguments["command-line"])
        if command == "dump-guest-memory":
            self.dump(self.fds.pop())
        return {}

    def monitor(self, line: str) -> str:
        if line == "info mtree -f":
            return (
                'FlatView #0\r\n AS "I/O", root: io\r\n Root memory region: io\r\n'
                "  0000000000000000-000000000000ffff (prio 0, i/o): io\r\n\r\n"
                'FlatView #1\r\n AS "memory", root: system\r\n AS "cpu-memory-0", root: system\r\n'
                " Root memory region: system\r\n"
                f"  0000000000000000-{len(self.memory) - 1:016x} (prio 0, ram): pc.ram\r\n"
                "  00000000fffc0000-00000000ffffffff (prio 0, i/o): bios\r\n\r\n"
            )
        if line.startswith("gpa2hva "):
            address = int(line.split()[1], 16)
            if self.behaviour.get("hidden"):
                return "Memory at address 0x0 is not RAM\r\n"
            base = ctypes.addressof(self.memory)
            return f"Host virtual address for {address:#x} (pc.ram) is {base + address:#x}\r\n"
        if line.startswith("xp "):
            return self.examine(line)
        return f"unknown command: '{line.split()[0]}'\r\n"

    def examine(self, line: str) -> str:
        """``xp /COUNTxb ADDRESS``, rather slowly."""
        _, form, where = line.split()
        address, count = int(where, 16), int(form[1:-2])
        time.sleep(0.002)
        if address + count > len(self.memory):
            return f"{address:016x}: Cannot access memory\r\n"
        data = self.memory.raw[address : address + count]
        return "".join(
            f"{address + at:016x}: " + " ".join(f"0x{b:02x}" for b in data[at : at + 8]) + "\r\n"
            for at in range(0, count, 8)
        )

    def dump(self, fd: int) -> None:
        notes = b""
        if self.behaviour.get("device"):
            notes = target_files.note(b"VMCOREINFO", 0, target_files.x86_text())
        with os.fdopen(fd, "wb") as file:
            file.write(target_files.elf_core([], notes))


if __name__ == "__main__":
    _Server(json.loads(sys.argv[1])).serve()
