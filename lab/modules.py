# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Kernel modules for Debian's kernels, compiled as Debian does it.

A stock kernel's headers want the compiler and the C library of their own suite, which this machine
may not have: they come from that suite too.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from pathlib import Path

from lab.errors import LabError
from lab.kernels import Kernel
from lab.programs import inside, program_tree
from lab.run import HERE, cache, made_whole, run, say

#: Modules of ours, a C file each.
SOURCES = HERE / "provoke"

_TOOLS = ("make", "bash", "dash", "coreutils", "sed", "grep", "mawk", "findutils")
#: What headers are said to need, and a build does not.
_LEFT_OUT = (
    *("linux-base", "perl", "perl-base", "debconf", "dpkg", "pahole"),
    *("systemd", "udev", "initramfs-tools"),
)


def build_module(suite: str, kernel: Kernel, name: str) -> Path:
    """
    Compile a module of ours for one of Debian's kernels.

    :param kernel: what :func:`lab.kernels.debian_kernel` gave for this suite
    :param name: of a C file in ``lab/provoke/``
    :return: the ``.ko`` file, in the cache
    :raises LabError: if the kernel is of another architecture than this machine, or it fails
    """
    text = (SOURCES / f"{name}.c").read_bytes()
    digest = hashlib.sha256(text).hexdigest()[:12]
    path = cache("modules") / f"{name}-{kernel.image.parent.name}-{digest}.ko"
    if path.exists():
        return path
    if kernel.arch.name != platform.machine():
        raise LabError(f"modules are only compiled for {platform.machine()}")
    headers = f"linux-headers-{kernel.release}"
    without = (*_LEFT_OUT, f"linux-image-{kernel.release}")
    tree = program_tree(suite, kernel.arch, headers, (headers, *_TOOLS), without)
    say(f"compiling {name} for {kernel.release}")
    with made_whole(path) as unfinished:
        work = tree / "build" / f"{name}-{os.getpid()}"
        work.mkdir(parents=True)
        try:
            (work / f"{name}.c").write_bytes(text)
            (work / "Makefile").write_text(f"obj-m := {name}.o\n")
            # objtool asks where its stack is, to explain a fault of its own.
            (tree / "proc/self").mkdir(parents=True, exist_ok=True)
            for file in ("limits", "maps"):
                (tree / "proc/self" / file).write_text(Path("/proc/self", file).read_text())
            # Without BTF, for which there would have to be a vmlinux.
            options = [f"M=/build/{work.name}", "CONFIG_DEBUG_INFO_BTF_MODULES="]
            make = ["/usr/bin/make", "-s", "-C", f"/usr/src/{headers}", *options, "modules"]
            run(inside(tree, *make), env={"PATH": "/usr/bin:/usr/sbin"})
            shutil.copy(work / f"{name}.ko", unfinished)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path
