# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""crash, the other tool that walks page tables: an independent answer for tests."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lab import archive
from lab.errors import LabError
from lab.run import cache, say

#: New kernels need a crash that is newer than what stable releases have.
_SUITE = "forky"

#: crash and what it is linked with, so that it runs beside any system's own libraries.
_PACKAGES = (
    "crash",
    "libc6",
    "libgcc-s1",
    "libgmp10",
    "liblzo2-2",
    "libmpfr6",
    "libncursesw6",
    "libsnappy1v5",
    "libstdc++6",
    "libtinfo6",
    "libzstd1",
    "zlib1g",
    "liblzma5",
)


def crash_program() -> list[str]:
    """
    Get crash as a command, fetched once with its libraries.

    :raises LabError: if it cannot be fetched
    """
    index = archive.Index(_SUITE, "amd64")
    packages = [index.find(re.escape(name)) for name in _PACKAGES]
    folder = cache("crash") / packages[0].version
    if not (folder / "complete").exists():
        say(f"fetching crash {packages[0].version}")
        for package in packages:
            archive.extract(archive.download(package), ["./usr/*", "./lib*/*"], folder)
            archive.forget(package)
        (folder / "complete").touch()
    libraries = folder / "usr/lib/x86_64-linux-gnu"
    loader = libraries / "ld-linux-x86-64.so.2"
    return [str(loader), "--library-path", str(libraries), str(folder / "usr/bin/crash")]


def ask_crash(core: Path, vmlinux: Path, commands: Sequence[str], timeout: float = 300) -> str:
    """
    Run commands in crash on a dump.

    :return: All that it printed.
    :raises LabError: if crash does not open the dump
    """
    done = subprocess.run(
        [*crash_program(), "-s", str(vmlinux), str(core)],
        input="\n".join([*commands, "quit", ""]),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise LabError(f"crash ended with status {done.returncode}: {done.stdout[-500:]}")
    return done.stdout + done.stderr
