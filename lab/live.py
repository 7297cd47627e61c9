# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
A guest that looks into its own kernel, as root through /proc/kcore, with a distribution's programs.

Its system is Debian's Python, drgn and NumPy, unpacked into a disk image together with the kernel's
vmlinux, where the debug package puts it. ptinspect comes as a wheel, on a second disk.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import archive
from lab.arches import Arch, find_arch
from lab.errors import GuestError, LabError
from lab.guest import Guest, booted
from lab.initramfs import pack
from lab.kernels import Kernel, debian_modules
from lab.modules import build_module
from lab.rootfs import unpack
from lab.run import HERE, REPOSITORY, cache, made_whole, run, say, tool

#: Where a drgn of the version that ptinspect needs is.
SUITE = "forky"

PACKAGES = (
    *("python3", "python3-drgn", "python3-numpy", "python3-click", "python3-tabulate"),
    *("kexec-tools", "makedumpfile", "coreutils", "dash"),
)
#: What these are said to depend on, but not to do what is done here.
LEFT_OUT = (
    *("debconf", "dpkg", "perl", "perl-base", "media-types", "tzdata", "install-info"),
    *("libc-gconv-modules-extra", "python3-numpy-dev", "netbase", "readline-common"),
    *("libdb5.3t64", "libsqlite3-0", "libssl3t64"),
)

#: In load order. Some are built in, or gone, in some kernels.
DISK_MODULES = (
    *("virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"),
    *("virtio_blk", "crc16", "crc32c_generic", "crc32c-intel", "libcrc32c"),
    *("mbcache", "jbd2", "ext4"),
)


@dataclass(frozen=True)
class LiveAnswers:
    """What a guest found out about itself."""

    #: answers.json of lab/inside/look.py.
    document: dict[str, Any]
    #: Standard output and error of each command.
    outputs: tuple[tuple[str, str], ...]

    def session(self, number: int) -> list[tuple[str, dict[str, Any]]]:
        """
        Get what a session of drgn's shell answered in JSON: each line, and its answer.

        :raises LabError: if the session did not get to its end
        """
        out, err = self.outputs[number]
        if self.document["answers"][number]["status"]:
            raise LabError(f"drgn's shell failed: {err.strip().splitlines()[-1:]}")
        parts = re.split(r"^@@ (pt.*)\n", out, flags=re.M)[1:]
        return [(line, json.loads(text)) for line, text in zip(parts[::2], parts[1::2])]


def system_tree(arch: Arch) -> Path:
    """
    Unpack the programs of a guest.

    :return: the folder, in the cache
    """
    packages = archive.Index(SUITE, arch.debian).closure(PACKAGES, LEFT_OUT)
    words = sorted(f"{package.name} {package.version}" for package in packages)
    key = hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
    folder = cache("live") / f"system-{arch.name}-{key}"
    if not folder.exists():
        say(f"unpacking {len(packages)} packages of {SUITE} for {arch.name}")
        with made_whole(folder) as unfinished:
            unpack(packages, unfinished)
            for name in ("proc", "sys", "dev", "tmp", "data"):
                (unfinished / name).mkdir(exist_ok=True)
            if not (unfinished / "usr/bin/sh").exists():
                (unfinished / "usr/bin/sh").symlink_to("dash")
    return folder


def system_image(kernel: Kernel) -> Path:
    """
    Make the system disk of a guest: programs, and the kernel's debug file.

    :return: an ext4 image, in the cache
    :raises LabError: if it is not known where the debug file belongs
    """
    if kernel.packaged is None:
        raise LabError(f"{kernel.image.parent} is of an older lab: delete it, to get it again")
    tree = system_tree(kernel.arch)
    image = cache("live") / f"{kernel.image.parent.name}-{tree.name.rpartition('-')[2]}.img"
    if not image.exists():
        say(f"making the system disk for {kernel.release}")
        with made_whole(image) as unfinished, tempfile.TemporaryDirectory(dir=cache("live")) as tmp:
            staged = Path(tmp) / "root"
            run(["cp", "-a", "--reflink=auto", tree, staged])
            (staged / kernel.packaged).parent.mkdir(parents=True)
            shutil.copy(kernel.vmlinux, staged / kernel.packaged)
            used = sum(path.lstat().st_size + 4096 for path in staged.rglob("*"))
            _ext4(unfinished, staged, used // 10 * 12 + (64 << 20))
    return image


def _ext4(image: Path, tree: Path, size: int) -> None:
    options = ["-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0"]
    run([tool("mke2fs", "e2fsprogs"), *options, "-d", str(tree), image, f"{size >> 10}k"])


def wheel(into: Path) -> Path:
    """Build a wheel of the tree."""
    with tempfile.TemporaryDirectory() as tmp:
        # Beside a copy, since setuptools leaves its work behind.
        copy = Path(tmp)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPOSITORY / name, copy)
        shutil.copytree(REPOSITORY / "ptinspect", copy / "ptinspect")
        code = f"from setuptools.build_meta import build_wheel; build_wheel({str(into)!r})"
        run([sys.executable, "-c", code], cwd=copy)
    (built,) = into.glob("*.whl")
    return built


def _busybox(arch: Arch) -> bytes:
    package = archive.Index(SUITE, arch.debian).find("busybox-static")
    folder = cache("live") / f"busybox-{arch.name}-{package.version.replace(':', '_')}"
    if not folder.exists():
        with made_whole(folder) as unfinished:
            archive.extract(archive.download(package), ["./*bin/busybox"], unfinished)
        archive.forget(package)
    (program,) = (path for path in folder.rglob("busybox") if path.is_file())
    return program.read_bytes()


def initramfs(suite: str, kernel: Kernel, path: Path) -> Path:
    """Write the initramfs that mounts the disks."""
    files = {
        "init": (HERE / "inside" / "init").read_bytes(),
        "bin/busybox": _busybox(kernel.arch),
    }
    for module in debian_modules(suite, kernel, DISK_MODULES):
        files[f"modules/{module.name}"] = module.read_bytes()
    path.write_bytes(pack(files, programs=["init", "bin/busybox"]))
    return path


def drive(path: Path, name: str, *, read_only: bool = False) -> list[str]:
    """QEMU's options for a disk, which the guest sees in the order of these options."""
    return [
        "-drive",
        f"file={path},format=raw,if=none,id={name},readonly={'on' if read_only else 'off'}",
        "-device",
        f"virtio-blk,drive={name}",
    ]


def look_inside(
    suite: str,
    kernel: Kernel,
    questions: Sequence[Sequence[str]],
    *,
    memory: int = 1536,
    append: str = "",
    timeout: float = 1800,
) -> LiveAnswers:
    """
    Boot a kernel of Debian's and have it answer questions about itself.

    :param suite: where the kernel is from
    :param questions: commands, or ``drgn`` and lines for its shell; ``{sparse.pid}``,
        ``{sparse.start}``, ``{dense.pid}`` and ``{dense.start}`` are the processes that rest and
        where their memory begins
    :raises LabError: if the guest does not get to its end
    """
    system = system_image(kernel)
    with tempfile.TemporaryDirectory(dir=cache("live")) as tmp:
        folder = Path(tmp)
        data = folder / "data"
        data.mkdir()
        wheel(data)
        shutil.copy(HERE / "inside" / "look.py", data)
        (data / "questions.json").write_text(json.dumps(questions))
        disk = folder / "data.img"
        _ext4(disk, data, 256 << 20)
        initrd = initramfs(suite, kernel, folder / "initramfs")

        def make() -> Guest:
            return Guest(
                kernel.arch,
                kernel.image,
                initrd,
                memory=memory,
                smp="2",
                append=append,
                extra=[*drive(system, "system", read_only=True), *drive(disk, "data")],
            )

        with booted(make, "@@live:", timeout=timeout) as guest:
            said = guest.wait_for("@@live-done", timeout=timeout, failed=_FAILED)
        _check_console(said)
        read_back(disk, "/results", folder)
        return _answers(folder / "results")


def crash(
    suite: str,
    kernel: Kernel,
    dumps: Mapping[str, Sequence[str]],
    into: Path,
    *,
    how: str = "crash",
    module: str = "",
    memory: int = 1024,
    timeout: float = 1800,
) -> dict[str, Any]:
    """
    Boot a kernel of Debian's, crash it, and have the kernel that takes over save its memory.

    :param dumps: names of files, and makedumpfile's options for each
    :param into: a folder for the dumps, and for what makedumpfile said of each (.log)
    :param how: the script of lab/inside that crashes it
    :param module: of lab/provoke, which the script loads
    :return: what the kernel said of itself right before (truth.json of lab/inside/crash.py)
    :raises LabError: if the guest does not get to its end
    """
    for attempt in range(1, _CRASH_ATTEMPTS + 1):
        try:
            _crash_once(suite, kernel, dumps, into, how, module, memory, timeout)
            break
        except GuestError as error:
            if attempt == _CRASH_ATTEMPTS:
                raise
            say(f"the guest did not save its dump, trying again: {error}")
    truth: dict[str, Any] = json.loads((into / "truth.json").read_text())
    return truth


#: Under emulation, a kernel that is started by a crash does not always come up.
_CRASH_ATTEMPTS = 3


def _crash_once(
    suite: str,
    kernel: Kernel,
    dumps: Mapping[str, Sequence[str]],
    into: Path,
    how: str,
    module: str,
    memory: int,
    timeout: float,
) -> None:
    words = f"crashkernel=320M lab_script={how}"
    with _crash_disks(suite, kernel, dumps, how, module) as (extra, disk, initrd):

        def make() -> Guest:
            return Guest(
                *(kernel.arch, kernel.image, initrd),
                memory=memory,
                smp="2",
                append=words,
                extra=extra,
            )

        with booted(make, "@@live", timeout=timeout) as guest:
            said = guest.wait_for("@@live-done", timeout=timeout, panics=True, failed=_FAILED)
        _check_console(said)
        read_back(disk, "/results", disk.parent)
        for path in (disk.parent / "results").iterdir():
            shutil.move(path, into / path.name)


@contextmanager
def _crash_disks(
    suite: str, kernel: Kernel, dumps: Mapping[str, Sequence[str]], how: str, module: str
) -> Iterator[tuple[list[str], Path, Path]]:
    """
    Make what a guest that is to crash needs: QEMU's options for its disks, the second disk, and
    its initramfs.
    """
    system = system_image(kernel)
    with tempfile.TemporaryDirectory(dir=cache("live")) as tmp:
        folder = Path(tmp)
        data = folder / "data"
        data.mkdir()
        for name in {"look", "crash", "capture", how}:
            shutil.copy(HERE / "inside" / f"{name}.py", data)
        if module:
            shutil.copy(build_module(suite, kernel, module), data / f"{module}.ko")
        initrd = initramfs(suite, kernel, data / "initramfs")
        shutil.copy(kernel.image, data / "image")
        (data / "questions.json").write_text(json.dumps(dumps))
        disk = folder / "data.img"
        _ext4(disk, data, 4 << 30)
        yield [*drive(system, "system", read_only=True), *drive(disk, "data")], disk, initrd


def dump_crashed(
    suite: str, kernel: Kernel, into: Path, *, memory: int = 1024, timeout: float = 1800
) -> dict[str, Any]:
    """
    Boot a kernel of Debian's, crash it, and have QEMU dump it where it stopped (``into/vmcore``).

    For kernels without kdump, as Debian's are for s390x: no CONFIG_CRASH_DUMP in 6.1, and no
    CONFIG_KEXEC either since.

    :return: what the kernel said of itself right before (truth.json of lab/inside/crash.py)
    :raises LabError: if the guest does not crash, or is not dumped
    """
    with _crash_disks(suite, kernel, {}, "crash", "") as (extra, disk, initrd):

        def make() -> Guest:
            return Guest(
                *(kernel.arch, kernel.image, initrd),
                memory=memory,
                smp="2",
                append="panic=0 lab_script=crash",
                extra=[*extra, "-action", "panic=pause"],
            )

        with booted(make, "@@live", timeout=timeout) as guest:
            guest.wait_for("Kernel panic", timeout=timeout, panics=True, failed=_FAILED)
            guest.stop()
            guest.dump(into / "vmcore")
        read_back(disk, "/results", disk.parent)
        truth: dict[str, Any] = json.loads((disk.parent / "results/truth.json").read_text())
        return truth


#: What a guest says that cannot do its work.
_FAILED = "@@live: failed: "


def _check_console(said: str) -> None:
    problem = re.search(r"@@live: failed: (.*)", said)
    if problem:
        tail = "\n".join(said.splitlines()[-20:])
        raise GuestError(f"{problem[1]}; the console's end:\n{tail}")


def makedumpfile(arguments: Sequence[str | Path]) -> bytes:
    """
    Run the guests' makedumpfile (an x86_64 one) on this machine.

    :return: its standard output
    :raises LabError: if it fails
    """
    tree = system_tree(find_arch("x86_64"))
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    program = [libraries / "ld-linux-x86-64.so.2", "--library-path", libraries]
    command = [*program, tree / "usr/bin/makedumpfile", *arguments]
    done = subprocess.run([str(word) for word in command], capture_output=True)
    if done.returncode:
        tail = (done.stdout[-500:] + done.stderr[-500:]).decode(errors="replace")
        raise LabError(f"makedumpfile ended with status {done.returncode}: {tail}")
    return done.stdout


def read_back(image: Path, what: str, into: Path) -> None:
    """
    Copy a folder out of an ext4 image.

    :raises LabError: if it is not there
    """
    command = [tool("debugfs", "e2fsprogs"), "-R", f"rdump {what} {into}", str(image)]
    subprocess.run(command, capture_output=True, check=True)
    if not (into / Path(what).name).is_dir():
        raise LabError(f"{image.name} has no {what}")


def _answers(folder: Path) -> LiveAnswers:
    document = json.loads((folder / "answers.json").read_text())
    outputs = tuple(
        (
            (folder / f"{number:02}.out").read_text(errors="replace"),
            (folder / f"{number:02}.err").read_text(errors="replace"),
        )
        for number in range(len(document["answers"]))
    )
    return LiveAnswers(document, outputs)
