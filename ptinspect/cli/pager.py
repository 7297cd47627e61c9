# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Long answers on a terminal go through a pager, as git's do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys


def show(text: str) -> None:
    """
    Write to standard output: through ``$PAGER`` (``less``) if that is a terminal and too small.

    An empty ``$PAGER``, or ``cat``, turns it off. less is told to leave alone what fits and the
    terminal as it is, and to cut long rows, which its arrow keys scroll (``LESS=FRSX``), unless
    ``$LESS`` says otherwise.
    """
    pager = os.environ.get("PAGER", "less")
    if (
        pager in ("", "cat")
        or os.environ.get("TERM") == "dumb"
        or not sys.stdout.isatty()
        or text.count("\n") < shutil.get_terminal_size().lines
        or not _through(pager, text)
    ):
        sys.stdout.write(text)


def _through(pager: str, text: str) -> bool:
    """
    Show a text in a pager until its reader has seen enough.

    :return: False if the pager could not be started.
    """
    sys.stdout.flush()
    environment = {"LESS": "FRSX", "LV": "-c", **os.environ}
    process = subprocess.Popen(
        ["sh", "-c", f"exec {pager}"],
        stdin=subprocess.PIPE,
        stdout=sys.stdout,
        env=environment,
        text=True,
        errors="backslashreplace",
    )
    try:
        process.communicate(text)
    except KeyboardInterrupt:
        # The pager got it too, and decides itself what that means.
        process.wait()
    return process.returncode not in (126, 127)  # the shell's: not executable, not found
