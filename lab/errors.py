# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a step of the lab raises when it cannot do its work."""

from __future__ import annotations


class LabError(Exception):
    """A step failed; the message says why and, where it is known, what would help."""


class MissingToolError(LabError):
    """A program that a step needs is not installed."""


class GuestError(LabError):
    """A guest ended, or did not do in time what was waited for."""


class ReportError(LabError):
    """A report is incomplete or garbled."""
