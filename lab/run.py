# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs, the cache folder and what a step says about itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lab.errors import LabError, MissingToolError

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent


def say(text: str) -> None:
    """Tell on stderr what is being done."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def cache(*parts: str) -> Path:
    """
    Get a folder of the cache, made if need be.

    The cache is ``$PTINSPECT_CACHE``, else ``ptinspect`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    Everything in it can be deleted: each step makes again what is missing.
    """
    root = os.environ.get("PTINSPECT_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ptinspect")
    folder = Path(root).expanduser().joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def tool(name: str, package: str) -> str:
    """
    Find a program.

    :raises MissingToolError: naming the Debian package that has it
    """
    path = shutil.which(name)
    if path is None:
        raise MissingToolError(f"{name} is not installed (Debian package {package})")
    return path


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> None:
    """
    Run a program to its end.

    :param log: file for its output; without one the output is kept for the error message
    :raises LabError: if it fails, with the end of its output
    """
    arguments = [str(word) for word in command]
    environment = {**os.environ, **env} if env else None
    if log is None:
        done = subprocess.run(
            arguments, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output = done.stdout
    else:
        with log.open("wb") as stream:
            done = subprocess.run(
                arguments, cwd=cwd, env=environment, stdout=stream, stderr=subprocess.STDOUT
            )
        output = log.read_bytes() if done.returncode else b""
    if done.returncode:
        tail = "\n".join(output.decode(errors="replace").splitlines()[-20:])
        where = f" (all of it: {log})" if log else ""
        raise LabError(f"{' '.join(arguments[:4])} ... failed{where}:\n{tail}")


@contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """Yield a name beside path; what is written there becomes path only if nothing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        if unfinished.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(unfinished, path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        elif unfinished.exists():
            unfinished.unlink()
