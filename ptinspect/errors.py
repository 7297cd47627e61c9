# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong, each kind with the exit status that the command line gives it."""

from __future__ import annotations

from enum import IntEnum

from drgn import FaultError, ObjectNotFoundError


class ExitStatus(IntEnum):
    """Exit statuses of the command line."""

    OK = 0
    FINDINGS = 1
    USAGE = 2
    TARGET = 3
    INCOMPLETE = 4


class PtinspectError(Exception):
    """An error that is told to the user in one clear line, without a traceback."""

    exit_status = ExitStatus.TARGET


class TargetError(PtinspectError):
    """The target cannot be opened, or it is not a Linux kernel that ptinspect understands."""


class DebugInfoError(TargetError):
    """The kernel's DWARF is missing, unreadable, or belongs to another build."""


class UsageError(PtinspectError):
    """The question itself is wrong: an unknown column, a malformed address."""

    exit_status = ExitStatus.USAGE


class IncompleteError(PtinspectError):
    """The target lacks the memory that the answer depends on, so there is no answer at all."""

    exit_status = ExitStatus.INCOMPLETE


def explain(error: PtinspectError | FaultError | ObjectNotFoundError) -> tuple[str, ExitStatus]:
    """Say in one line what went wrong, and with which status a command ends for it."""
    if isinstance(error, FaultError):
        return f"memory that the answer needs cannot be read: {error}", ExitStatus.INCOMPLETE
    if isinstance(error, ObjectNotFoundError):
        return f"this kernel lacks what the answer needs: {error}", ExitStatus.TARGET
    return str(error), error.exit_status
