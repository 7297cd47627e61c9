# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a person names an address space or an address in it."""

from __future__ import annotations

from drgn import Program

from ptinspect.errors import TargetError, UsageError
from ptinspect.tables.spaces import Space, SpaceKind, SpaceList, find_spaces

SPACE_HELP = "SPACE is a process ID, `kernel`, `efi`, or mm:ADDRESS; PID:kpti is the user half."


def choose_space(prog: Program, text: str) -> Space:
    """
    Find the address space that a person named.

    :raises UsageError: if there is no such space
    :raises TargetError: if it is the kernel's and its root cannot be found
    """
    name, _, half = text.partition(":kpti")
    if half:
        raise UsageError(f"{text!r} is no address space; {SPACE_HELP}")
    isolated = text.endswith(":kpti")
    by_slab = name.startswith("mm:")
    spaces = find_spaces(prog, slab=by_slab, isolated=isolated)
    space = find_space(spaces, name)
    if isolated:
        wanted = space.mm.address if space.mm is not None else None
        for candidate in spaces.spaces:
            mm = candidate.mm
            if candidate.kind is SpaceKind.ISOLATED and mm is not None and mm.address == wanted:
                return candidate
        raise UsageError(f"{name} has no user half: page-table isolation is off")
    return space


def find_space(spaces: SpaceList, name: str) -> Space:
    """
    Find the space that a person named among those that were found, user halves left out.

    :raises UsageError: if there is no such space
    :raises TargetError: if it is the kernel's and its root cannot be found
    """
    if name == "kernel":
        if spaces.kernel is None:
            notes = "; ".join(note.message for note in spaces.notes)
            raise TargetError(f"the kernel's root table cannot be found: {notes or 'no init_mm'}")
        return spaces.kernel
    if name == "efi":
        for space in spaces.spaces:
            if space.kind is SpaceKind.EFI:
                return space
        raise UsageError("this kernel has no efi_mm, or firmware without run-time services")
    is_mm = name.startswith("mm:")
    try:
        number = int(name[3:] if is_mm else name, 16 if is_mm else 10)
    except ValueError:
        raise UsageError(f"{name!r} is no address space; {SPACE_HELP}") from None
    found = spaces.of_mm(number) if is_mm else spaces.of_pid(number)
    if found is None:
        missing = "; ".join(f"{note.source}: {note.message}" for note in spaces.notes)
        what = f"there is no mm at {number:#x}" if is_mm else f"no process {number} has an mm"
        raise UsageError(what + (f" (not all could be seen: {missing})" if missing else ""))
    return found


def parse_virtual_address(prog: Program, text: str) -> int:
    """
    Get a virtual address from hexadecimal digits (``0x`` is optional) or a kernel symbol.

    :raises UsageError: if it is neither
    """
    try:
        value = int(text, 16)
    except ValueError:
        try:
            return int(prog.symbol(text).address)
        except LookupError:
            raise UsageError(f"{text!r} is neither an address nor a kernel symbol") from None
    if not 0 <= value < 1 << 64:
        raise UsageError(f"{text!r} does not fit in 64 bits")
    return value
