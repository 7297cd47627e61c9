# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The numbers that a kernel leaves for dump tools in its vmcoreinfo note."""

from __future__ import annotations

from typing import cast

from drgn import Program

_CACHE_KEY = "ptinspect.vmcoreinfo"


def fields(prog: Program) -> dict[str, str]:
    """Get the lines of the note as name and value."""
    if _CACHE_KEY not in prog.cache:
        text = prog["VMCOREINFO"].string_().decode(errors="replace")
        pairs = (line.partition("=") for line in text.splitlines())
        prog.cache[_CACHE_KEY] = {name: value for name, _, value in pairs}
    return cast("dict[str, str]", prog.cache[_CACHE_KEY])


def number(prog: Program, name: str, default: int) -> int:
    """Get ``NUMBER(name)``, which kernels write in decimal or in hexadecimal with 0x."""
    value = fields(prog).get(f"NUMBER({name})")
    return default if value is None else int(value, 0)


def hexadecimal(prog: Program, name: str, default: int) -> int:
    """Get a line that has a hexadecimal number without prefix, such as ``KERNELOFFSET``."""
    value = fields(prog).get(name)
    return default if value is None else int(value, 16)
