# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a contradiction is worth on a target that was running while it was read."""

from __future__ import annotations

from collections.abc import Sequence

RACING_NOTE = "The target was running while it was read: small differences are no finding."


def doubtful(findings: Sequence[str], *, racing: bool) -> tuple[Sequence[str], Sequence[str]]:
    """
    Keep findings apart from what may only be the target's own changes.

    :return: Findings, notes.
    """
    if not racing:
        return findings, ()
    return (), (*(f"seen once, while running: {finding}" for finding in findings), RACING_NOTE)
