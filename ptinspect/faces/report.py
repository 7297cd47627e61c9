# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a command answers, before anybody decides how it looks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Union

#: A value of a cell. ``None`` is "there is no such value here", which is not zero and not empty.
Cell = Union[int, str, bool, None]


class Kind(Enum):
    """How a column's values are written."""

    TEXT = "text"
    COUNT = "count"
    #: A number that is an address, a mask or raw bytes: hexadecimal in every format.
    HEX = "hex"


@dataclass(frozen=True)
class Column:
    """A name and how its values are written."""

    name: str
    kind: Kind = Kind.TEXT


@dataclass(frozen=True)
class Table:
    """Rows under named columns."""

    #: The key in JSON.
    name: str
    columns: Sequence[Column]
    #: May be a generator: rendered once.
    rows: Iterable[Sequence[Cell]]
    #: The heading in text; none if empty.
    title: str = ""
    #: There is exactly one row: a name and a value on each line in text, one object in JSON.
    single: bool = False


@dataclass(frozen=True)
class Report:
    """The answer of one command."""

    command: str
    #: What the answer is about: the target's name, how it was opened.
    target: str
    tables: Sequence[Table]
    #: Sentences that belong to the answer: printed below the tables.
    notes: Sequence[str] = ()
    #: What could not be seen; not empty means that the answer is incomplete (exit status 4, unless
    #: something was found).
    missing: Sequence[str] = field(default=())
    #: What contradicts itself in the target, a sentence each (exit status 1).
    findings: Sequence[str] = ()
