# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keep drgn from logging what ptinspect tells in its own words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*phrases: str) -> Iterator[None]:
    """Drop drgn's log records that contain one of *phrases*."""

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(phrase in message for phrase in phrases)

    logger = logging.getLogger("drgn")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
