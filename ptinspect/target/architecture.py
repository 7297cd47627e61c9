# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The architectures that a target may have, and the many names that others give them."""

from __future__ import annotations

from dataclasses import dataclass

from drgn import Architecture, Platform, PlatformFlags

from ptinspect.errors import TargetError


@dataclass(frozen=True)
class TargetArchitecture:
    """One architecture whose page tables ptinspect understands."""

    name: str
    #: e_machine of its ELF files (include/uapi/linux/elf-em.h).
    machine: int
    drgn: Architecture
    little_endian: bool
    #: Other names that users know it by.
    aliases: tuple[str, ...] = ()

    @property
    def platform(self) -> Platform:
        """What drgn calls the platform of a 64-bit kernel of this architecture."""
        flags = PlatformFlags.IS_64_BIT
        if self.little_endian:
            flags |= PlatformFlags.IS_LITTLE_ENDIAN
        return Platform(self.drgn, flags)


SUPPORTED = (
    TargetArchitecture("x86_64", 62, Architecture.X86_64, True, ("amd64",)),
    TargetArchitecture("s390x", 22, Architecture.S390X, False),
    TargetArchitecture("ppc64le", 21, Architecture.PPC64, True, ("ppc64el",)),
    TargetArchitecture("aarch64", 183, Architecture.AARCH64, True, ("arm64",)),
    TargetArchitecture("riscv64", 243, Architecture.RISCV64, True),
)

#: Names of machines that are refused, by e_machine, so that the refusal can name them.
_OTHER_MACHINES = {
    3: "i386",
    8: "mips",
    20: "ppc (32-bit)",
    40: "arm (32-bit)",
    43: "sparc64",
    15: "parisc",
    258: "loongarch64",
}


def supported_names() -> str:
    """The supported architectures for a message: ``x86_64, s390x, ...``."""
    return ", ".join(architecture.name for architecture in SUPPORTED)


def by_name(name: str, what: str = "--architecture") -> TargetArchitecture:
    """
    Find an architecture by what a user or a kernel calls it.

    :param what: Where the name is from, for the message.
    :raises TargetError: if it is not supported
    """
    for architecture in SUPPORTED:
        if name.lower() == architecture.name or name.lower() in architecture.aliases:
            return architecture
    supported = supported_names()
    raise TargetError(f"{what}: unsupported architecture {name!r} (supported: {supported})")


def by_platform(what: str, platform: Platform) -> TargetArchitecture:
    """
    Find an architecture by drgn's platform.

    :param what: The target, for the message.
    :raises TargetError: if it is not supported, among them any 32-bit or wrongly ordered one
    """
    for architecture in SUPPORTED:
        if platform == architecture.platform:
            return architecture
    little = "little" if platform.flags & PlatformFlags.IS_LITTLE_ENDIAN else "big"
    bits = 64 if platform.flags & PlatformFlags.IS_64_BIT else 32
    name = platform.arch.name.lower()
    raise TargetError(
        f"{what}: unsupported architecture: {bits}-bit {little}-endian {name} "
        f"(supported: {supported_names()})"
    )


def by_elf(what: str, machine: int, bits: int, little_endian: bool) -> TargetArchitecture:
    """
    Find an architecture by the header of an ELF file.

    :param what: The file, for the message.
    :raises TargetError: if it is not supported
    """
    for architecture in SUPPORTED:
        if machine == architecture.machine:
            break
    else:
        name = _OTHER_MACHINES.get(machine, f"ELF machine {machine}")
        raise TargetError(
            f"{what}: unsupported architecture {name} (supported: {supported_names()})"
        )
    if bits != 64 or little_endian != architecture.little_endian:
        order = "little" if little_endian else "big"
        raise TargetError(
            f"{what}: unsupported architecture: {bits}-bit {order}-endian "
            f"{architecture.drgn.name.lower()} (supported: {supported_names()})"
        )
    return architecture
