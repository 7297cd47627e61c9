# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Architectures as data: what each is called, how it is built for and how it is booted."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from lab.errors import LabError


@dataclass(frozen=True)
class Arch:
    """One architecture; names differ between the kernel, Debian, the compiler and QEMU."""

    name: str  #: as ``uname -m`` says
    debian: str
    kernel: str  #: ``make ARCH=``
    triplet: str  #: of its compiler and binutils
    image: str  #: the make target of the bootable image
    image_path: str  #: where the build leaves it
    qemu: str
    machine: tuple[str, ...]  #: QEMU options that a guest always has
    console: str
    #: Modules, in load order, that a Debian kernel needs to tell QEMU where its vmcoreinfo is.
    vmcoreinfo_modules: tuple[str, ...] = ()
    #: Whether init's console is fast enough for megabytes; all of QEMU's are.
    byte_order: str = "little"

    @property
    def cross(self) -> str:
        """``make CROSS_COMPILE=``: empty on the architecture itself."""
        return "" if self.name == platform.machine() else f"{self.triplet}-"


_X86_64 = Arch(
    name="x86_64",
    debian="amd64",
    kernel="x86_64",
    triplet="x86_64-linux-gnu",
    image="bzImage",
    image_path="arch/x86/boot/bzImage",
    qemu="qemu-system-x86_64",
    machine=("-M", "q35", "-accel", "tcg", "-cpu", "max", "-device", "vmcoreinfo", "-vga", "none"),
    console="ttyS0",
    vmcoreinfo_modules=("qemu_fw_cfg",),
)
_S390X = Arch(
    name="s390x",
    debian="s390x",
    kernel="s390",
    triplet="s390x-linux-gnu",
    image="bzImage",
    image_path="arch/s390/boot/bzImage",
    qemu="qemu-system-s390x",
    machine=("-M", "s390-ccw-virtio", "-accel", "tcg"),
    console="ttysclp0",
    byte_order="big",
)
_AARCH64 = Arch(
    name="aarch64",
    debian="arm64",
    kernel="arm64",
    triplet="aarch64-linux-gnu",
    image="Image",
    image_path="arch/arm64/boot/Image",
    qemu="qemu-system-aarch64",
    machine=("-M", "virt", "-accel", "tcg", "-cpu", "max", "-device", "vmcoreinfo"),
    console="ttyAMA0",
    vmcoreinfo_modules=("qemu_fw_cfg",),
)
_PPC64LE = Arch(
    name="ppc64le",
    debian="ppc64el",
    kernel="powerpc",
    triplet="powerpc64le-linux-gnu",
    image="vmlinux",
    image_path="vmlinux",
    qemu="qemu-system-ppc64",
    machine=(
        "-M",
        "pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
        "-accel",
        "tcg",
        "-cpu",
        "power9",
        "-vga",
        "none",
    ),
    console="hvc0",
)
_RISCV64 = Arch(
    name="riscv64",
    debian="riscv64",
    kernel="riscv",
    triplet="riscv64-linux-gnu",
    image="Image",
    image_path="arch/riscv/boot/Image",
    qemu="qemu-system-riscv64",
    machine=("-M", "virt", "-accel", "tcg"),
    console="ttyS0",
    vmcoreinfo_modules=("qemu_fw_cfg",),
)

ARCHES = {arch.name: arch for arch in (_X86_64, _S390X, _AARCH64, _PPC64LE, _RISCV64)}


def find_arch(name: str) -> Arch:
    """
    Find an architecture by any of its names (``aarch64`` or ``arm64``, ``x86_64`` or ``amd64``).

    :raises LabError: if there is none
    """
    for arch in ARCHES.values():
        if name in (arch.name, arch.debian, arch.kernel):
            return arch
    raise LabError(f"no architecture {name!r}: there are {', '.join(ARCHES)}")
