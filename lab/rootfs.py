# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian packages unpacked as the root of a guest: no maintainer script runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from lab import archive
from lab.run import run

#: Folders of the root that are links in Debian; packages only have what they point to.
_LINKS = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"}

#: Never used in a guest, and large.
_LEFT_OUT = (
    "usr/include",
    "usr/share/bug",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/zoneinfo",
)


def unpack(packages: Iterable[archive.Package], root: Path) -> None:
    """
    Fill a folder with what is in packages, as if they were installed.

    :raises LabError: if a package cannot be had
    """
    for package in packages:
        # Some packages have files under /lib: they go where the link points.
        unpacking = root / "unpacking"
        archive.extract(archive.download(package), ["./*"], unpacking)
        for name, target in _LINKS.items():
            if (unpacking / name).is_dir():
                (root / target).mkdir(parents=True, exist_ok=True)
                run(["cp", "-a", f"{unpacking / name}/.", root / target])
                shutil.rmtree(unpacking / name)
        run(["cp", "-a", f"{unpacking}/.", root])
        shutil.rmtree(unpacking)
    for name, target in _LINKS.items():
        if (root / target).is_dir():
            (root / name).symlink_to(target)
    for name in _LEFT_OUT:
        shutil.rmtree(root / name, ignore_errors=True)
