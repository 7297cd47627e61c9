# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run measurements in processes of their own, and watch the memory of each."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

_SAMPLE_SECONDS = 0.005


def in_own_process(module: str, *arguments: str) -> dict[str, Any]:
    """
    Run ``python -m MODULE ARGUMENTS``, which prints one JSON object.

    :raises click.ClickException: if it fails
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise click.ClickException(f"{module} {' '.join(arguments)} failed")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


class Peak:
    """The largest anonymous memory that this process was seen to have, in bytes."""

    def __init__(self) -> None:
        self.bytes = 0

    def sample(self) -> None:
        """Look at it now."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                self.bytes = max(self.bytes, int(line.split()[1]) * 1024)


@contextmanager
def watching_memory() -> Iterator[Peak]:
    """Watch this process's memory, all that it had before included, as long as the block runs."""
    peak = Peak()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            peak.sample()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.sample()
