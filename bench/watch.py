# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run a measurement in a process of its own and watch that process's memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click


def watched(module: str, *arguments: str) -> tuple[dict[str, Any], int]:
    """
    Run ``python -m MODULE ARGUMENTS``, which prints one JSON object.

    :return: The object, and the largest anonymous memory of the process in bytes.
    :raises click.ClickException: if it fails
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True
    )
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            break
        peak = max([peak, *(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))])
        time.sleep(0.005)
    answer, _ = process.communicate()
    if process.returncode:
        raise click.ClickException(f"{module} {' '.join(arguments)} failed")
    result: dict[str, Any] = json.loads(answer)
    return result, peak
