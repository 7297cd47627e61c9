# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests with bpftrace, in which ``ptinspect trace`` runs beside what the kernel says itself."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.guest import Guest, booted
from lab.kernels import Kernel
from lab.modules import build_module
from lab.run import HERE
from lab.userland import PYTHON, live_initramfs, userland

#: Of the userland; its bpftrace is the one that is used.
SUITE = "forky"

#: A large load and many small ones under one trace.
LOADS = HERE / "inside" / "trace.py"
#: Filters, the end by itself, the live view, and what tracing costs.
MODES = HERE / "inside" / "modes.py"


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
            f"echo @@booted\npython3 session.py {' '.join(arguments)}\necho @@end\n",
            added,
            Path(folder, "initrd"),
        )

        def make() -> Guest:
            return Guest(kernel.arch, kernel.image, initrd, memory=memory, smp="2", append="quiet")

        with booted(make, "@@booted", timeout=600) as guest:
            console = guest.wait_for("@@end", timeout=timeout)
    parts = [line[7:] for line in console.splitlines() if line.startswith("@@said ")]
    said: dict[str, Any] = json.loads("".join(parts) or "{}")
    return said


def run_loads(
    suite: str,
    kernel: Kernel,
    tables: int,
    *,
    debug: bool = False,
    options: Sequence[str] = (),
    timeout: float = 3000,
) -> dict[str, Any]:
    """
    Trace a large load and many small ones in a guest.

    :param suite: where the kernel is from
    :param tables: how many PTE tables the large load holds
    :param debug: have the running kernel asked about its orphans, with drgn
    :param options: more for ``ptinspect trace``
    :return: what lab/inside/trace.py says
    """
    files = {}
    if kernel.arch.name == platform.machine():
        files["project/ptprovoke.ko"] = build_module(suite, kernel, "ptprovoke").read_bytes()
    return run_session(
        kernel,
        LOADS,
        [str(tables), *options],
        files=files,
        debug=debug,
        memory=6144 if debug else 4096,
        timeout=timeout,
    )


def trace_lines(said: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a session said, in short."""
    for answer in (*said.get("filtered", ()), *said.get("costs", ())):
        words = " ".join(answer["options"]) or "not traced"
        footer = answer.get("footer", {})
        counted = f"{footer.get('pages_made')} made, exact {footer.get('exact')}" if footer else ""
        yield f"{words}: {answer.get('times', answer.get('events'))} {counted}"
    if "large" not in said:
        return
    large, summary = said["large"], said["summary"]
    yield f"VmPTE {large['vm_pte_kib']} KiB beside {[row['live'] for row in large['rows']]}"
    for name, found in said["loads"].items():
        yield f"{name}: {found}"
    for table in ("levels", "ways"):
        for row in summary["tables"][table]:
            yield f"{table}: {row}"
    yield f"footer: {summary['tables']['footer']}"
    yield from (f"incomplete: {what}" for what in summary["missing"])
    for question in said["asked"]:
        yield f"$ ptinspect {' '.join(question['arguments'])}"
        yield f"{question['out']}{question['errors']}# status {question['status']}"
