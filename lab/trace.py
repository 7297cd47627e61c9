# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests with bpftrace, in which ``ptinspect trace`` runs beside what the kernel says itself."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.guest import Guest
from lab.kernels import Kernel
from lab.run import HERE
from lab.userland import PYTHON, live_initramfs, userland

#: Of the userland; its bpftrace is the one that is used.
SUITE = "forky"


def run_session(
    kernel: Kernel,
    session: Path,
    arguments: Sequence[str],
    *,
    files: Mapping[str, bytes] | None = None,
    debug: bool = False,
    suite: str = SUITE,
    memory: int = 4096,
    timeout: float = 1500,
    console_log: Path | None = None,
) -> dict[str, Any]:
    """
    Boot a kernel, run a Python program in it, and get the JSON that it says.

    :param session: the program; it prints its JSON in pieces, each on a line after ``@@said``
    :param files: more files for the guest, by path without a leading slash
    :param debug: whether the guest gets the kernel's debug file, for drgn
    :raises LabError: if the guest does not get to its end
    """
    part = userland(suite, kernel.arch, (*PYTHON, "bpftrace"))
    added = {"project/session.py": session.read_bytes(), **(files or {})}
    if debug:
        added[f"usr/lib/debug/boot/vmlinux-{kernel.release}"] = kernel.vmlinux.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        initrd = live_initramfs(
            [part],
            f"python3 session.py {' '.join(arguments)}\necho @@end\n",
            added,
            Path(folder, "initrd"),
        )
        with Guest(
            kernel.arch,
            kernel.image,
            initrd,
            memory=memory,
            smp="2",
            append="quiet",
            console_log=console_log,
        ) as guest:
            console = guest.wait_for("@@end", timeout=timeout)
    parts = [line[7:] for line in console.splitlines() if line.startswith("@@said ")]
    said: dict[str, Any] = json.loads("".join(parts) or "{}")
    return said


#: Many small loads under one trace.
LOADS = HERE / "inside" / "trace.py"
