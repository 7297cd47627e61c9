# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Initial file systems: the workload as /init, and the modules that it loads.

The archive is cpio's "newc" format (kernel: Documentation/driver-api/early-userspace/
buffer-format.rst), written here so that device nodes need no root.
"""

from __future__ import annotations

import gzip
import hashlib
import stat
from collections.abc import Sequence
from pathlib import Path

from lab.arches import Arch
from lab.run import HERE, cache, made_whole, run, say, tool

WORKLOAD = HERE / "workload"


def build_workload(arch: Arch) -> Path:
    """
    Compile the workload, statically, for an architecture.

    :return: the program, in the cache
    :raises LabError: if there is no compiler or it fails
    """
    sources = sorted(WORKLOAD.glob("*.[ch]"))
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    program = cache("workload") / f"init-{arch.name}-{digest}"
    if program.exists():
        return program
    package = f"gcc-{arch.triplet} libc6-dev-{arch.debian}-cross" if arch.cross else "gcc"
    compiler = tool(f"{arch.cross}gcc", package)
    say(f"compiling the workload for {arch.name}")
    with made_whole(program) as unfinished:
        options = ["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-s"]
        run([compiler, *options, "-o", unfinished, WORKLOAD / "init.c"])
    return program


def entry(name: str, mode: int, data: bytes, number: int, device: tuple[int, int]) -> bytes:
    """Get one archive member: header, name and data, each padded to 4 bytes."""
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def pack(files: dict[str, bytes], programs: Sequence[str] = ()) -> bytes:
    """
    Pack an archive with these files, their folders and /dev/console.

    :param files: contents by path without a leading slash
    :param programs: those of them that can be executed
    """
    folders = {"dev"}
    for name in files:
        folders.update(str(parent) for parent in Path(name).parents if str(parent) != ".")
    members: list[tuple[str, int, bytes, tuple[int, int]]] = [
        (folder, stat.S_IFDIR | 0o755, b"", (0, 0)) for folder in sorted(folders)
    ]
    members.append(("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)))
    for name, data in sorted(files.items()):
        mode = 0o755 if name in programs else 0o644
        members.append((name, stat.S_IFREG | mode, data, (0, 0)))
    members.append(("TRAILER!!!", 0, b"", (0, 0)))
    packed = b"".join(
        entry(name, mode, data, number, device)
        for number, (name, mode, data, device) in enumerate(members, 1)
    )
    return packed + bytes(-len(packed) % 512)


def workload_initramfs(arch: Arch, modules: Sequence[Path] = (), into: Path | None = None) -> Path:
    """
    Make an initramfs whose /init is the workload.

    :param modules: uncompressed kernel modules, loaded in this order before anything else
    :param into: the file to write; by default one in the cache
    """
    files = {"init": build_workload(arch).read_bytes()}
    for module in modules:
        files[f"modules/{module.name}"] = module.read_bytes()
    if modules:
        files["modules/order"] = "".join(f"{module.name}\n" for module in modules).encode()
    path = into or cache("initramfs") / f"workload-{arch.name}.cpio.gz"
    with made_whole(path) as unfinished:
        unfinished.write_bytes(gzip.compress(pack(files, programs=["init"]), mtime=0))
    return path
