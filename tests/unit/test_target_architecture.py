# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names and platforms of the supported architectures."""

from __future__ import annotations

import pytest
from drgn import Architecture, Platform, PlatformFlags

from ptinspect.errors import TargetError
from ptinspect.target import architecture


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x86_64", "x86_64"),
        ("amd64", "x86_64"),
        ("S390X", "s390x"),
        ("ppc64le", "ppc64le"),
        ("ppc64el", "ppc64le"),
        ("aarch64", "aarch64"),
        ("arm64", "aarch64"),
        ("riscv64", "riscv64"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert architecture.by_name(name).name == expected


@pytest.mark.parametrize("name", ["", "ppc64", "i386", "riscv32", "s390", "sparc64"])
def test_unsupported_names(name: str) -> None:
    with pytest.raises(TargetError, match=r"unsupported architecture .*supported: x86_64, s390x"):
        architecture.by_name(name)


@pytest.mark.parametrize("supported", architecture.SUPPORTED, ids=lambda a: str(a.name))
def test_platforms(supported: architecture.TargetArchitecture) -> None:
    assert architecture.by_platform("x", supported.platform) == supported
    # Each is the one that drgn itself takes for the architecture.
    assert supported.platform == Platform(supported.drgn)
    assert architecture.by_elf("x", supported.machine, 64, supported.little_endian) == supported


@pytest.mark.parametrize(
    ("platform", "message"),
    [
        (Platform(Architecture.I386), "32-bit little-endian i386"),
        (Platform(Architecture.ARM), "32-bit little-endian arm"),
        (Platform(Architecture.PPC64, PlatformFlags.IS_64_BIT), "64-bit big-endian ppc64"),
        (Platform(Architecture.UNKNOWN, PlatformFlags.IS_64_BIT), "unknown"),
    ],
)
def test_unsupported_platforms(platform: Platform, message: str) -> None:
    with pytest.raises(TargetError, match=f"guest: unsupported architecture.*{message}"):
        architecture.by_platform("guest", platform)
