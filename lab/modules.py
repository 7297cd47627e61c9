# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Kernel modules for Debian's kernels, compiled as Debian does it.

A stock kernel's headers want the compiler and the C library of their own suite, which this machine
may not have. So the suite's headers, compiler and make are unpacked into a folder of the cache, and
make runs in there (chroot; in a user namespace where this is not root).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
from pathlib import Path

from lab import archive
from lab.errors import LabError
from lab.kernels import Kernel
from lab.run import HERE, cache, made_whole, run, say

#: Modules of ours, a C file each.
SOURCES = HERE / "provoke"

_TOOLS = ("make", "bash", "dash", "coreutils", "sed", "grep", "mawk", "findutils")
#: What headers are said to need, and a build does not.
_LEFT_OUT = (
    *("linux-image-{release}", "linux-base", "perl", "perl-base", "debconf", "dpkg", "pahole"),
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
    tree = _toolchain(suite, kernel)
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
            headers = f"/usr/src/linux-headers-{kernel.release}"
            # Without BTF, for which there would have to be a vmlinux.
            options = [f"M=/build/{work.name}", "CONFIG_DEBUG_INFO_BTF_MODULES="]
            inside = ["/usr/bin/make", "-s", "-C", headers, *options, "modules"]
            enter = [] if os.geteuid() == 0 else ["unshare", "--map-root-user"]
            run([*enter, "chroot", tree, *inside], env={"PATH": "/usr/bin:/usr/sbin"})
            shutil.copy(work / f"{name}.ko", unfinished)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path


def _toolchain(suite: str, kernel: Kernel) -> Path:
    """Unpack a kernel's headers with all that compiles modules, ready to be entered."""
    if kernel.arch.name != platform.machine():
        raise LabError(f"modules are only compiled for {platform.machine()}")
    wanted = (f"linux-headers-{kernel.release}", *_TOOLS)
    without = [name.format(release=kernel.release) for name in _LEFT_OUT]
    packages = archive.Index(suite, kernel.arch.debian).closure(wanted, without)
    words = sorted(f"{package.name} {package.version}" for package in packages)
    key = hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
    folder = cache("toolchains") / f"{suite}-{kernel.release}-{key}"
    if not folder.exists():
        say(f"unpacking {len(packages)} packages of {suite} to compile modules")
        with made_whole(folder) as unfinished:
            for name in ("bin", "sbin", "lib", "lib64"):
                (unfinished / "usr" / name).mkdir(parents=True, exist_ok=True)
                (unfinished / name).symlink_to(f"usr/{name}")
            for package in packages:
                archive.extract(archive.download(package), ["./*"], unfinished / "package")
                for name in ("bin", "sbin", "lib", "lib64"):
                    old = unfinished / "package" / name
                    if old.is_dir() and not old.is_symlink():
                        run(["cp", "-a", f"{old}/.", unfinished / "usr" / name])
                        shutil.rmtree(old)
                run(["cp", "-a", f"{unfinished / 'package'}/.", unfinished])
                shutil.rmtree(unfinished / "package")
                archive.forget(package)
            for name, program in (("sh", "dash"), ("awk", "mawk")):
                if not (unfinished / "usr/bin" / name).exists():
                    (unfinished / "usr/bin" / name).symlink_to(program)
            for name in ("dev", "tmp", "build"):
                (unfinished / name).mkdir(exist_ok=True)
            _make_null(unfinished / "dev" / "null")
            shutil.rmtree(unfinished / "usr/share/doc", ignore_errors=True)
    return folder


def _make_null(path: Path) -> None:
    """Make what stands for /dev/null: the device, or where that is forbidden an empty file."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        path.touch()
