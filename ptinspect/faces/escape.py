# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Text from the kernel (names of processes and files) made safe for a terminal."""

from __future__ import annotations


def escape(text: str) -> str:
    r"""
    Replace what a terminal would act on (control characters, bidirectional marks) by escapes.

    >>> escape("a\x1b[31m\n")
    'a\\x1b[31m\\n'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
