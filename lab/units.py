# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The debug information of some compilation units: what a sample of a distribution's kernel can keep.

A unit of the kernel's C code is whole in itself: outside of itself it refers to abbreviations and
strings. So units can be left out, and the others stay as they are but for these offsets.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

from lab.errors import LabError

_DW_AT_NAME = 0x03

# Forms (DWARF 5, 7.5.6), by how long their values are.
_FIXED = {
    **{0x01: 8, 0x0B: 1, 0x05: 2, 0x06: 4, 0x07: 8, 0x1E: 16, 0x0C: 1},  # addr data* flag
    **{0x11: 1, 0x12: 2, 0x13: 4, 0x14: 8},  # ref*
    **{0x0E: 4, 0x1F: 4, 0x17: 4, 0x19: 0, 0x21: 0},  # strp line_strp sec_offset, in no bytes
}
_STRP, _LINE_STRP, _STRING, _IMPLICIT_CONST = 0x0E, 0x1F, 0x08, 0x21
_BLOCK1, _BLOCK2, _BLOCK4, _EXPRLOC = 0x0A, 0x03, 0x04, 0x18
_LEB128 = (0x0D, 0x0F)  # sdata udata

#: For each code: whether there are children, and (attribute, form) pairs.
_Abbreviations = dict[int, tuple[bool, tuple[tuple[int, int], ...]]]


class Sections(NamedTuple):
    """Sections of debug information (little-endian, DWARF 5)."""

    info: bytes
    abbrev: bytes
    str: bytes
    line_str: bytes


class _Unit(NamedTuple):
    start: int
    end: int
    abbreviations: int  #: their offset


def _units(info: bytes) -> Iterator[_Unit]:
    at = 0
    while at < len(info):
        length, version, kind, address_bytes, abbreviations = struct.unpack_from("<IHBBI", info, at)
        if (version, kind, address_bytes) != (5, 1, 8):
            raise LabError(f"unit at {at:#x}: not a compilation unit of 64-bit DWARF 5")
        yield _Unit(at, at + 4 + length, abbreviations)
        at += 4 + length


_HEADER_BYTES = 12


def _uleb128(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _abbreviations(data: bytes, at: int) -> tuple[_Abbreviations, int]:
    """Read a table of abbreviations, and where it ends."""
    table: _Abbreviations = {}
    while True:
        code, at = _uleb128(data, at)
        if not code:
            return table, at
        _, at = _uleb128(data, at)
        children = bool(data[at])
        at += 1
        attributes = []
        while True:
            attribute, at = _uleb128(data, at)
            form, at = _uleb128(data, at)
            if form == _IMPLICIT_CONST:
                _, at = _uleb128(data, at)
            if not attribute and not form:
                break
            attributes.append((attribute, form))
        table[code] = (children, tuple(attributes))


def _after(data: bytes, at: int, form: int) -> int:
    """Get where the value of an attribute ends."""
    if form in _FIXED:
        return at + _FIXED[form]
    if form in _LEB128:
        return _uleb128(data, at)[1]
    if form == _EXPRLOC:
        length, at = _uleb128(data, at)
        return at + length
    if form == _BLOCK1:
        return at + 1 + data[at]
    if form in (_BLOCK2, _BLOCK4):
        size = 2 if form == _BLOCK2 else 4
        return at + size + int.from_bytes(data[at : at + size], "little")
    if form == _STRING:
        return data.index(b"\0", at) + 1
    raise LabError(f"unknown form {form:#x} of an attribute")


def _name(sections: Sections, unit: _Unit) -> str:
    table, _ = _abbreviations(sections.abbrev, unit.abbreviations)
    code, at = _uleb128(sections.info, unit.start + _HEADER_BYTES)
    for attribute, form in table[code][1]:
        if attribute == _DW_AT_NAME:
            if form == _STRING:
                start, strings = at, sections.info
            else:
                (start,) = struct.unpack_from("<I", sections.info, at)
                strings = sections.str if form == _STRP else sections.line_str
            return strings[start : strings.index(b"\0", start)].decode()
        at = _after(sections.info, at, form)
    return ""


def names(sections: Sections) -> list[str]:
    """Get the source files of all units."""
    return [_name(sections, unit) for unit in _units(sections.info)]


def keep_units(sections: Sections, wanted: Collection[str]) -> Sections:
    """
    Keep some units.

    :param wanted: ends of the names of source files, from the kernel's root on
    :raises LabError: if there is none of a name
    """
    info, abbrev, strings = bytearray(), bytearray(), bytearray()
    placed: dict[int, int] = {}
    tables: dict[int, int] = {}
    missing = set(wanted)
    for unit in _units(sections.info):
        name = _name(sections, unit)
        found = {ending for ending in wanted if name == ending or name.endswith(f"/{ending}")}
        if not found:
            continue
        missing -= found
        table, end = _abbreviations(sections.abbrev, unit.abbreviations)
        if unit.abbreviations not in tables:
            tables[unit.abbreviations] = len(abbrev)
            abbrev += sections.abbrev[unit.abbreviations : end]
        data = bytearray(sections.info[unit.start : unit.end])
        struct.pack_into("<I", data, 8, tables[unit.abbreviations])
        for at in _strings(data, table):
            (old,) = struct.unpack_from("<I", data, at)
            if old not in placed:
                placed[old] = len(strings)
                strings += sections.str[old : sections.str.index(b"\0", old) + 1]
            struct.pack_into("<I", data, at, placed[old])
        info += data
    if missing:
        raise LabError(f"the debug information has no unit {', '.join(sorted(missing))}")
    return Sections(bytes(info), bytes(abbrev), bytes(strings), sections.line_str)


def _strings(unit: bytes | bytearray, table: _Abbreviations) -> list[int]:
    """Get where a unit refers to .debug_str."""
    found = []
    data = bytes(unit)
    at = _HEADER_BYTES
    while at < len(data):
        code, at = _uleb128(data, at)
        if not code:
            continue
        for _, form in table[code][1]:
            if form == _STRP:
                found.append(at)
            fixed = _FIXED.get(form)
            at = at + fixed if fixed is not None else _after(data, at, form)
    return found
