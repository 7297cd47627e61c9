# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Other people's exceptions in our messages."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """What an exception says, in one line; the file that it concerns is named by the caller."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
