# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
All leaf entries, looked at once for every invariant that asks about them.

Tables of the lowest level are nearly all there are: where the census has left them unread, reading
them for it is the look too. Each question is asked of whole batches of entries, and only what
answers yes is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Callable

import numpy as np
import numpy.typing as npt

from ptinspect.checks.model import Finding, Tally
from ptinspect.kernel.paging.model import EntryClass
from ptinspect.memory import BoolArray
from ptinspect.tables.entries import Entries
from ptinspect.tables.walk import RowArray, read_leaf_tables

if TYPE_CHECKING:
    from ptinspect.checks.context import Context


@dataclass(frozen=True)
class Batch:
    """Filled entries of some tables of one level; arrays of the same length."""

    context: Context
    level: int
    #: int64, rows of the census.
    row: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]
    #: uint64, values.
    value: npt.NDArray[np.uint64]
    #: uint8, :class:`EntryClass`, corrected for kernel spaces.
    kind: npt.NDArray[np.uint8]

    @cached_property
    def space(self) -> npt.NDArray[np.uint32]:
        """Space of each entry."""
        return self.context.tables.space[self.row]

    @cached_property
    def va(self) -> npt.NDArray[np.uint64]:
        """Virtual address of each entry."""
        shift = np.uint64(self.context.paging.levels[self.level].shift)
        base = self.context.tables.va[self.row]
        return self.context.paging.canonical(base + (self.slot.astype(np.uint64) << shift))

    def take(self, where: BoolArray) -> Batch:
        """Get some of the entries."""
        return Batch(
            self.context,
            self.level,
            self.row[where],
            self.slot[where],
            self.value[where],
            self.kind[where],
        )


#: Tells of a batch how many entries the question is about, and which are suspect.
Question = Callable[[Batch], "tuple[int, BoolArray]"]

#: Suspects of one question that are kept.
_MOST = 10_000

QUESTIONS: dict[str, Question] = {}


def question(name: str) -> Callable[[Question], Question]:
    """Enter a question that is asked of every filled entry above and at the lowest level."""

    def enter(function: Question) -> Question:
        QUESTIONS[name] = function
        return function

    return enter


@dataclass
class Answer:
    """The suspects of one question."""

    asked: int = 0
    suspects: list[Batch] | None = None
    count: int = 0
    #: Why there is no answer.
    error: Exception | None = None


class LeafPass:
    """
    One pass over all entries.

    A question that fails spoils its own answer only; whoever asks for it gets the error.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._kernel = np.array([space.kernel for space in context.tables.spaces], np.bool_)
        self._answers: dict[str, Answer] = {}
        self._done = False

    def suspects(self, name: str) -> tuple[int, list[Batch]]:
        """
        Get how many entries were looked at, and which are suspect.

        :raises Exception: what the question raised
        """
        self.run()
        answer = self._answers[name]
        if answer.error is not None:
            raise answer.error
        return answer.asked, answer.suspects or []

    def run(self) -> None:
        """Look at all entries, if that is not done yet."""
        if self._done:
            return
        self._done = True
        self._answers = {name: Answer(suspects=[]) for name in QUESTIONS}
        context = self._context
        for level in range(len(context.paging.levels) - 1, 0, -1):
            self._ask(level, context.upper[level])
        tables = context.tables
        if not tables.leaves_unread:
            # Whoever took the census has read them: then this is a second look.
            tables = tables.unread()
        read_leaf_tables(context.prog, tables, visitor=self._look)

    def _look(self, rows: RowArray, found: Entries) -> None:
        row = rows[found.row].astype(np.int64)
        self._ask(0, Entries(row, found.slot, found.value, found.kind))

    def _batch(self, level: int, entries: Entries) -> Batch:
        context = self._context
        row, slot, value, kind = entries
        of_kernel = self._kernel[context.tables.space[row]]
        if of_kernel.any():
            corrected = context.paging.kernel_kinds(kind, value, level)
            kind = np.where(of_kernel, corrected, kind)
        of_kvm = context.kvm_space[context.tables.space[row]]
        if of_kvm.any():
            kind = np.where(of_kvm, context.paging.kvm_kinds(kind), kind)
        # An erratum of x86 sets bits in empty entries.
        batch = Batch(context, level, row, slot, value, kind)
        return batch.take(kind != EntryClass.NONE)

    def _ask(self, level: int, entries: Entries) -> None:
        batch = self._batch(level, entries)
        if not len(batch.row):
            return
        for name, ask in QUESTIONS.items():
            answer = self._answers[name]
            if answer.error is not None or answer.count >= _MOST:
                continue
            try:
                asked, hit = ask(batch)
            except Exception as error:  # kept for whoever asked
                answer.error = error
                continue
            answer.asked += asked
            if hit.any():
                assert answer.suspects is not None
                answer.suspects.append(batch.take(hit))
                answer.count += int(np.count_nonzero(hit))


def suspects(context: Context, tally: Tally, name: str) -> list[Batch]:
    """
    Get the suspects of a question; note what was not looked at.

    :raises Exception: what the question raised
    """
    asked, batches = context.leaves.suspects(name)
    tally.examine(asked)
    context.miss_unread(tally)
    return batches


def leaf_findings(context: Context, batches: list[Batch], message: str) -> Iterator[Finding]:
    """Report entries that map something, with what they map."""
    for batch in batches:
        targets = context.paging.leaf_targets(batch.value, batch.level, batch.slot)
        for n in range(len(batch.row)):
            yield context.slot_finding(
                int(batch.row[n]),
                int(batch.slot[n]),
                int(batch.value[n]),
                message,
                maps=int(targets[n]),
            )
