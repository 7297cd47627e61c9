# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a story says of one descriptor."""

from __future__ import annotations

from typing import NamedTuple


class Told(NamedTuple):
    """A sentence about a descriptor."""

    text: str
    #: The member whose value it explains; empty if it is about the table itself.
    member: str = ""
    #: Whether the member has no meaning in this table, and the sentence says why.
    stale: bool = False
