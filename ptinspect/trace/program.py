# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""bpftrace as a program: where it is, how old it is, and whether this machine lets it run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from ptinspect.errors import TargetError
from ptinspect.trace.script import MINIMUM_VERSION

_LOCKDOWN = Path("/sys/kernel/security/lockdown")
_NEEDED = ".".join(map(str, MINIMUM_VERSION))


def check_machine(root: Path = Path("/")) -> None:
    """
    Check that this machine lets its kernel be traced.

    :raises TargetError: not root, or the kernel is locked down
    """
    if os.geteuid() != 0:
        raise TargetError("trace needs root: it loads programs into the kernel")
    lockdown = root / _LOCKDOWN.relative_to("/")
    try:
        said = lockdown.read_text()
    except OSError:
        return  # no securityfs, so no way to know; bpftrace would say it
    if "[confidentiality]" in said:
        raise TargetError(
            "the kernel is locked down (confidentiality): programs may not read its memory, "
            "so nothing can be traced"
        )


def find_bpftrace(name: str | None = None) -> str:
    """
    Find bpftrace and check its version.

    :param name: its name or path; by default ``bpftrace``
    :raises TargetError: if it is not there, does not run, or is too old
    """
    path = shutil.which(name or "bpftrace")
    if path is None:
        raise TargetError(
            f"trace needs bpftrace {_NEEDED} or newer, and there is no {name or 'bpftrace'}: "
            "install your distribution's package of that name (Debian 13 or newer: "
            "apt install bpftrace)"
        )
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", timeout=120
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise TargetError(f"{path} does not run: {error}") from error
    version = parse_version(done.stdout + done.stderr)
    if version is None:
        raise TargetError(f"{path} does not tell its version")
    if version < MINIMUM_VERSION:
        raise TargetError(
            f"bpftrace {'.'.join(map(str, version))} is too old: trace needs {_NEEDED} or newer"
        )
    return path


def kprobe_options(path: str) -> tuple[str, ...]:
    """
    Get the options that a script of kprobes needs.

    Newer ones join a function's entry and return in a session, which needs a BPF compiler in the
    kernel (the kernel answers with -524, ENOTSUPP); older ones know no such option.
    """
    option = ("--no-feature", "kprobe_session")
    done = subprocess.run([path, *option, "--version"], capture_output=True, timeout=120)
    return option if done.returncode == 0 else ()


def parse_version(text: str) -> tuple[int, int] | None:
    """Find a version in what ``bpftrace --version`` says: ``bpftrace v0.23.2``."""
    found = re.search(r"\bv?(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None
