# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The samples: small dumps of real kernels with their debug files.

A sample is a folder with ``vmcore.xz`` and ``vmlinux.debug.xz``. They are unpacked once into the
cache, under the SHA-256 of the packed file, so that another version of a sample never meets an old
copy.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ptinspect.errors import TargetError
from ptinspect.target.wording import reason

DUMP = "vmcore"
SYMBOLS = "vmlinux.debug"


@dataclass(frozen=True)
class Sample:
    """An unpacked sample."""

    name: str
    folder: Path
    core: Path
    symbols: Path


def cache_folder() -> Path:
    """Where ptinspect keeps what can be made again."""
    override = os.environ.get("PTINSPECT_CACHE")
    return Path(override) if override else Path.home() / ".cache" / "ptinspect"


def sample_folders() -> list[Path]:
    """The folders in which samples are looked for: $PTINSPECT_SAMPLES, then beside the package."""
    folders = []
    override = os.environ.get("PTINSPECT_SAMPLES")
    if override:
        folders.append(Path(override))
    folders.append(Path(__file__).resolve().parents[2] / "vmcores")
    return [folder for folder in folders if folder.is_dir()]


def sample_names() -> list[str]:
    """The names of the samples at hand, sorted."""
    names = {
        entry.name for folder in sample_folders() for entry in folder.iterdir() if _is_sample(entry)
    }
    return sorted(names)


def open_sample(name: str) -> Sample:
    """
    Find a sample by its name or by the path of its folder, and unpack it if that is not done yet.

    :raises TargetError: if there is no such sample, or it cannot be unpacked
    """
    folder = _find(name)
    core, symbols = (_unpacked(_packed(folder, file)) for file in (DUMP, SYMBOLS))
    return Sample(folder.name, folder, core, symbols)


def _is_sample(folder: Path) -> bool:
    return (folder / f"{DUMP}.xz").is_file()


def _find(name: str) -> Path:
    candidates = [folder / name for folder in sample_folders()] if os.sep not in name else []
    candidates.append(Path(name))
    for folder in candidates:
        if _is_sample(folder):
            return folder.resolve()
    known = ", ".join(sample_names())
    if known:
        raise TargetError(f"no sample named {name!r} (there are: {known})")
    raise TargetError(
        f"no sample named {name!r}, and no samples at all: they come with the source repository "
        "in vmcores/; set PTINSPECT_SAMPLES to that folder"
    )


def _packed(folder: Path, file: str) -> Path:
    path = folder / f"{file}.xz"
    if not path.is_file():
        raise TargetError(f"sample {folder.name}: {path.name} is missing in {folder}")
    return path


def _unpacked(packed: Path) -> Path:
    """The unpacked copy of an .xz file, made now if it is not in the cache."""
    try:
        digest = _sha256(packed)
        target = cache_folder() / "samples" / f"{packed.parent.name}-{digest[:16]}" / packed.stem
        if not target.is_file():
            _unpack(packed, target)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise TargetError(f"cannot unpack {packed}: {reason(error)}") from None
    return target


def _unpack(packed: Path, target: Path) -> None:
    """
    Unpack atomically: another process sees the whole file or none.

    Pages of zeros become holes, since a dump has many of them.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, name = tempfile.mkstemp(dir=target.parent, prefix=".partial-")
    try:
        with os.fdopen(partial, "wb") as out, lzma.open(packed) as data:
            shutil.copyfileobj(data, out, 1 << 20)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
