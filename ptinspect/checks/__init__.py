# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The invariants of page tables and their descriptors, one module a family."""

from __future__ import annotations

from ptinspect.checks.model import Finding, Invariant, Result, Severity, Unverified, Verdict
from ptinspect.checks.registry import invariants, load_families, unverified
from ptinspect.checks.run import CheckResults, run_checks

load_families()

__all__ = (
    "CheckResults",
    "Finding",
    "Invariant",
    "Result",
    "Severity",
    "Unverified",
    "Verdict",
    "invariants",
    "run_checks",
    "unverified",
)
