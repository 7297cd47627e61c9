# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open the running kernel through /proc/kcore."""

from __future__ import annotations

import os
from pathlib import Path

from drgn import Program

from ptinspect.errors import TargetError
from ptinspect.target import architecture as architectures
from ptinspect.target.architecture import TargetArchitecture
from ptinspect.target.elf import ElfError, read_elf
from ptinspect.target.options import Target, TargetKind
from ptinspect.target.wording import reason

KCORE = Path("/proc/kcore")
_LOCKDOWN = Path("/sys/kernel/security/lockdown")


def open_live(architecture: TargetArchitecture | None, note: bytes | None) -> Target:
    """
    Open the running kernel, without debugging information.

    :param note: VMCOREINFO to use instead of the kernel's own.
    :raises TargetError: if that cannot be done, with the reason
    """
    _check_kcore(KCORE, architecture)
    prog = Program(vmcoreinfo=note)
    try:
        prog.set_kernel()
    except Exception as error:
        raise TargetError(f"{KCORE}: {reason(error)}") from None
    return Target(prog, TargetKind.LIVE, str(KCORE), racing=True)


def _check_kcore(path: Path, wanted: TargetArchitecture | None) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise TargetError(
            f"no {path}: the running kernel has no CONFIG_PROC_KCORE, or /proc is not mounted"
        ) from None
    except PermissionError:
        raise TargetError(_permission_problem(path)) from None
    except OSError as error:
        raise TargetError(f"{path}: {reason(error)}") from None
    try:
        elf = read_elf(fd)
    except (ElfError, OSError) as error:
        raise TargetError(
            f"{path}: it does not give the kernel's memory ({reason(error)}); "
            "a container may hide it: run on the host"
        ) from None
    finally:
        os.close(fd)
    found = architectures.by_elf(str(path), elf.machine, elf.bits, elf.little_endian)
    if wanted is not None and wanted != found:
        raise TargetError(f"--architecture {wanted.name}, but the running kernel is {found.name}")


def _permission_problem(path: Path) -> str:
    if os.geteuid() != 0:
        return f"{path}: permission denied: reading the running kernel needs root (use sudo)"
    try:
        lockdown = _LOCKDOWN.read_text()
    except OSError:
        lockdown = ""
    if "[confidentiality]" in lockdown:
        return f"{path}: permission denied: kernel lockdown is in confidentiality mode"
    return f"{path}: permission denied even to root: CAP_SYS_RAWIO is missing (a container?)"
