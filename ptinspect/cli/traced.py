# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A record of ``ptinspect trace`` beside a target: ``--trace FILE`` of other commands."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, TypeVar

import click
from drgn import FaultError, Object, Program

from ptinspect.census import Census
from ptinspect.checks import Finding, Severity
from ptinspect.errors import UsageError
from ptinspect.faces.report import Table
from ptinspect.faces.trace import explained_table
from ptinspect.kernel.descriptor import page_is_pgtable
from ptinspect.target import Target, TargetKind
from ptinspect.trace.explain import ExplainedTable, Explanation, explain_page, explain_tables
from ptinspect.trace.recorded import Recorded, read_record
from ptinspect.trace.totals import LiveTable, PendingTable

_F = TypeVar("_F", bound=Callable[..., Any])

#: Rows that are shown.
_MOST = 1000

#: What waits longer than this for its release is no longer a matter of course: RCU calls a grace
#: period of 21 s a stall (CONFIG_RCU_CPU_STALL_TIMEOUT), and a batch may wait for two.
_LONGEST_WAIT_NS = 60 * 1_000_000_000


def trace_option(function: _F) -> _F:
    """Give a command ``--trace``; its value arrives as *trace*."""
    return click.option(
        "--trace",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="What `trace --format jsonl` wrote about this boot: with --leaks AGE, or with "
        "--events, which may still run.",
    )(function)


@dataclass(frozen=True)
class Traced:
    """A record that belongs to a target."""

    recorded: Recorded
    #: Whether its tables have the ages of this moment, or those of its last line.
    now: bool

    @property
    def unknown(self) -> Explanation:
        """What a table is that the record does not know."""
        whole = not self.recorded.ended and not self.recorded.filtered
        return Explanation.OLDER if whole else Explanation.UNKNOWN

    def explain(self, prog: Program, census: Census) -> list[ExplainedTable]:
        """Explain the orphans of a census, and what outlived its mm."""
        return explain_tables(
            census,
            self.recorded.live,
            self.recorded.pending,
            self.recorded.young_ns,
            lambda page: _is_table(prog, page),
            unknown=self.unknown,
        )

    @cached_property
    def _by_page(self) -> tuple[dict[int, LiveTable], dict[int, PendingTable]]:
        """The record's tables that live and that wait."""
        return (
            {table.page: table for table in self.recorded.live},
            {table.page: table for table in self.recorded.pending},
        )

    def _explain_page(self, page: int, census: Census | None) -> ExplainedTable:
        live, pending = self._by_page
        young = self.recorded.young_ns
        return explain_page(page, census, live, pending, young, unknown=self.unknown)

    def orphans_table(self, prog: Program, census: Census) -> Table:
        """Lay that out."""
        return explained_table(self.explain(prog, census), _MOST)

    def page_table(self, prog: Program, page: int, census: Census | None) -> Table:
        """Lay out what the record says of one page."""
        return explained_table([self._explain_page(page, census)], 1)

    def excuse(self, finding: Finding) -> str | None:
        """
        Say why a leak is none, if the record knows.

        Whatever else is wrong with a table is wrong also while it waits.
        """
        if finding.kind != "ptdesc" or finding.severity is not Severity.LEAK:
            return None
        row = self._explain_page(finding.address, None)
        waits = row.explanation is Explanation.WAITING and (row.age_ns or 0) <= _LONGEST_WAIT_NS
        if waits or row.explanation is Explanation.JUST_MADE:
            return f"the trace says: {row.explanation.value}"
        return None

    def notes(self) -> Iterator[str]:
        """Say how old the record is."""
        recorded = self.recorded
        what = "ended" if recorded.ended else "still runs, or was cut off"
        ages = "now" if self.now else "when its last line was written"
        yield (
            f"The trace began {recorded.began_ns / 1e9:.1f} s after boot and {what}; ages are "
            f"those {ages}."
        )

    def missing(self) -> Iterator[str]:
        """Say what the trace itself missed."""
        yield from (f"the trace: {sentence}" for sentence in self.recorded.missing)


def read_trace(path: Path, target: Target) -> Traced:
    """
    Read a record and check that it is of the kernel that a target shows.

    :raises UsageError: if it is no record, or of another boot
    """
    recorded = read_record(path)
    prog = target.prog
    release = prog["init_uts_ns"].name.release.string_().decode(errors="replace")
    if release != recorded.release:
        raise UsageError(f"{path} is a trace of Linux {recorded.release}, not of {release}")
    boot_id = _boot_id(prog)
    if boot_id is not None and recorded.boot_id is not None and boot_id != recorded.boot_id:
        raise UsageError(f"{path} is a trace of another boot of this kernel")
    here = target.kind is TargetKind.LIVE
    if here:
        recorded = recorded.aged(time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    return Traced(recorded, here)


def _boot_id(prog: Program) -> str | None:
    """Get what /proc/sys/kernel/random/boot_id says, once it was asked (drivers/char/random.c)."""
    try:
        raw = bytes(int(byte) & 0xFF for byte in prog["sysctl_bootid"])
    except (LookupError, FaultError, TypeError):
        return None
    return str(uuid.UUID(bytes=raw)) if len(raw) == 16 and any(raw) else None


def _is_table(prog: Program, page: int) -> bool:
    try:
        return page_is_pgtable(Object(prog, "struct page *", value=page))
    except FaultError:
        return False
