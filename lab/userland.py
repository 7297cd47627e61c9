# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A Debian userland as an initramfs: Python, drgn, bpftrace and this project inside a guest.

The archive is in two parts, which the kernel unpacks one after the other: the packages, kept in the
cache, and what one boot adds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lab import archive
from lab.arches import Arch
from lab.initramfs import entry, pack
from lab.rootfs import unpack
from lab.run import REPOSITORY, cache, made_whole, say

#: What the command line needs, and a shell.
PYTHON = (
    "busybox-static",
    "python3-minimal",
    "python3",
    "python3-click",
    "python3-drgn",
    "python3-numpy",
    "python3-tabulate",
)

#: Mounts what programs expect; then /session runs, and the guest ends.
_INIT = """#!/usr/bin/busybox sh
/usr/bin/busybox mkdir -p /usr/busybox
/usr/bin/busybox --install -s /usr/busybox
export PATH=/usr/bin:/usr/sbin:/usr/busybox HOME=/root TERM=dumb PYTHONDONTWRITEBYTECODE=1
for part in blas lapack; do
  for folder in /usr/lib/*/$part; do export LD_LIBRARY_PATH=$folder:$LD_LIBRARY_PATH; done
done
ln -sf /usr/bin/busybox /usr/bin/sh
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
mount -t tmpfs none /tmp
mount -t tracefs none /sys/kernel/tracing
mount -t securityfs none /sys/kernel/security
mount -t cgroup2 none /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
echo 1 >/proc/sys/kernel/printk
echo 1 >/proc/sys/vm/overcommit_memory
cd /project
sh /session
poweroff -f
"""


def userland(suite: str, arch: Arch, packages: Sequence[str]) -> Path:
    """
    Get an initramfs part with packages and all that they need.

    :return: an uncompressed archive, in the cache
    :raises LabError: if a package cannot be had
    """
    closure = archive.Index(suite, arch.debian).closure(packages)
    digest = hashlib.sha256(repr((closure, 3)).encode()).hexdigest()[:16]
    path = cache("userland") / f"{suite}-{arch.name}-{digest}.cpio"
    if path.exists():
        return path
    size = sum(package.size for package in closure) >> 20
    say(f"unpacking {len(closure)} packages of {suite} for {arch.name} ({size} MiB)")
    with made_whole(path) as unfinished:
        tree = unfinished.with_suffix(".tree")
        try:
            unpack(closure, tree)
            with unfinished.open("wb") as out:
                for part in _archive(tree):
                    out.write(part)
        finally:
            shutil.rmtree(tree, ignore_errors=True)
    return path


def _archive(tree: Path) -> Iterator[bytes]:
    number = 1
    for folder in ("dev", "proc", "sys", "tmp", "root", "run", "project"):
        yield entry(folder, stat.S_IFDIR | 0o755, b"", number, (0, 0))
        number += 1
    for folder, folders, files in os.walk(tree):
        relative = os.path.relpath(folder, tree)
        folders.sort()
        for name in sorted(folders + files):
            path = Path(folder) / name
            inside = os.path.normpath(os.path.join(relative, name))
            if path.is_symlink():
                data, mode = os.readlink(path).encode(), stat.S_IFLNK | 0o777
            elif path.is_dir():
                data, mode = b"", stat.S_IFDIR | 0o755
            elif path.is_file():
                data, mode = path.read_bytes(), stat.S_IFREG | stat.S_IMODE(path.stat().st_mode)
            else:
                continue
            yield entry(inside, mode, data, number, (0, 0))
            number += 1
    yield entry("TRAILER!!!", 0, b"", number, (0, 0))


def live_initramfs(
    parts: Sequence[Path], session: str, files: Mapping[str, bytes], into: Path
) -> Path:
    """
    Make an initramfs that runs a shell script over a userland and this project, then ends.

    :param parts: what :func:`userland` made
    :param session: the script; the project is in /project, which is the working folder
    :param files: more files, by path without a leading slash
    """
    added = {
        f"project/{path.relative_to(REPOSITORY)}": path.read_bytes()
        for path in sorted((REPOSITORY / "ptinspect").rglob("*.py"))
    }
    added.update(files)
    added["init"], added["session"] = _INIT.encode(), session.encode()
    with made_whole(into) as unfinished, unfinished.open("wb") as out:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, out, 1 << 20)
            out.write(bytes(-out.tell() % 512))
        out.write(pack(added, programs=["init"]))
    return into
