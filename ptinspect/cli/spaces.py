# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a person names an address space or an address in it."""

from __future__ import annotations

from dataclasses import replace

from drgn import Program

from ptinspect.errors import TargetError, UsageError
from ptinspect.kernel.paging import paging_of
from ptinspect.kernel.paging.s390x import S390Paging
from ptinspect.state.gmap import read_gmaps
from ptinspect.tables.spaces import Space, SpaceKind, SpaceList, find_spaces

SPACE_HELP = (
    "SPACE is a process ID, `kernel`, `efi`, or mm:ADDRESS; PID:kpti is the user half; on s390 "
    "also gmap:ADDRESS or asce:VALUE."
)


def choose_space(prog: Program, text: str) -> Space:
    """
    Find the address space that a person named.

    :raises UsageError: if there is no such space
    :raises TargetError: if it is the kernel's and its root cannot be found
    """
    name, _, half = text.partition(":kpti")
    if half:
        raise UsageError(f"{text!r} is no address space; {SPACE_HELP}")
    if text.startswith("asce:"):
        return _space_of_asce(prog, text)
    isolated = text.endswith(":kpti")
    by_slab = name.startswith("mm:")
    spaces = find_spaces(prog, slab=by_slab, isolated=isolated)
    if name.startswith("gmap:"):
        guests = read_gmaps(prog, spaces.spaces)
        spaces = replace(spaces, spaces=(*spaces.spaces, *guests.spaces))
    space = find_space(spaces, name)
    if isolated:
        wanted = space.mm.address if space.mm is not None else None
        for candidate in spaces.spaces:
            mm = candidate.mm
            if candidate.kind is SpaceKind.ISOLATED and mm is not None and mm.address == wanted:
                return candidate
        raise UsageError(f"{name} has no user half: page-table isolation is off")
    return space


def _space_of_asce(prog: Program, text: str) -> Space:
    """
    Get what an address-space-control element names: any tables of s390, whoever keeps them.

    :raises UsageError: if it names none
    """
    paging = paging_of(prog)
    try:
        value = int(text[5:], 16)
        if not isinstance(paging, S390Paging) or not 0 <= value < 1 << 64:
            raise ValueError("only s390 has address-space-control elements, words of 64 bits")
        return Space(SpaceKind.ASCE, paging.root_of_asce(value), symbol=f"asce:{value:#x}")
    except ValueError as error:
        raise UsageError(f"{text!r} is no address space: {error}") from None


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
    kind, colon, address = name.rpartition(":")
    try:
        number = int(address, 16 if colon else 10)
        finder = {"mm": spaces.of_mm, "gmap": spaces.of_gmap, "": spaces.of_pid}[kind]
    except (ValueError, LookupError):
        raise UsageError(f"{name!r} is no address space; {SPACE_HELP}") from None
    found = finder(number)
    if found is None:
        missing = "; ".join(f"{note.source}: {note.message}" for note in spaces.notes)
        what = f"there is no {kind} at {number:#x}" if kind else f"no process {number} has an mm"
        what += "; the command ps lists all spaces"
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
            raise UsageError(
                f"{text!r} is neither an address (hexadecimal digits) nor a kernel symbol"
            ) from None
    if not 0 <= value < 1 << 64:
        raise UsageError(f"{text!r} does not fit in 64 bits")
    return value
