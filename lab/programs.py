# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Programs of other suites of Debian's than this machine's, run here.

Packages are unpacked into a folder of the cache, without their maintainer scripts; a program runs
with that folder as its root (chroot; in a user namespace where this is not root).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from lab import archive
from lab.arches import Arch
from lab.run import cache, made_whole, run, say

#: Folders of the root that are links in Debian; packages only have what they point to.
_LINKS = ("bin", "sbin", "lib", "lib64")


def program_tree(
    suite: str, arch: Arch, name: str, packages: Sequence[str], without: Sequence[str] = ()
) -> Path:
    """
    Unpack packages and all that they need.

    :param name: what the folder is called
    :param without: packages that are said to be needed, and are not
    :return: the folder, in the cache
    :raises LabError: if a package cannot be had
    """
    closure = archive.Index(suite, arch.debian).closure(packages, without)
    words = sorted(f"{package.name} {package.version}" for package in closure)
    key = hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
    folder = cache("programs") / f"{suite}-{name}-{key}"
    if folder.exists():
        return folder
    size = sum(package.size for package in closure) >> 20
    say(f"unpacking {name} of {suite} and what it needs ({size} MiB)")
    with made_whole(folder) as unfinished:
        for link in _LINKS:
            (unfinished / "usr" / link).mkdir(parents=True, exist_ok=True)
            (unfinished / link).symlink_to(f"usr/{link}")
        for package in closure:
            archive.extract(archive.download(package), ["./*"], unfinished / "package")
            archive.forget(package)
            _merge(unfinished / "package", unfinished)
        for link, program in (("sh", "dash"), ("awk", "mawk")):
            if not os.path.lexists(unfinished / "usr/bin" / link):
                (unfinished / "usr/bin" / link).symlink_to(program)
        for made in ("dev", "tmp", "build"):
            (unfinished / made).mkdir(exist_ok=True)
        _make_null(unfinished / "dev" / "null")
        for unused in ("doc", "man", "locale"):
            shutil.rmtree(unfinished / "usr/share" / unused, ignore_errors=True)
    return folder


def _merge(package: Path, tree: Path) -> None:
    for link in _LINKS:
        old = package / link
        if old.is_dir() and not old.is_symlink():
            run(["cp", "-a", f"{old}/.", tree / "usr" / link])
            shutil.rmtree(old)
    run(["cp", "-a", f"{package}/.", tree])
    shutil.rmtree(package)


def _make_null(path: Path) -> None:
    """Make what stands for /dev/null: the device, or where that is forbidden an empty file."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        path.touch()


def inside(tree: Path, *command: str) -> list[str]:
    """Get the words that run a command with a folder as its root."""
    enter = [] if os.geteuid() == 0 else ["unshare", "--map-root-user"]
    return [*enter, "chroot", str(tree), *command]
