# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What the kernel's BTF says about a few names.

The format is in the kernel's Documentation/bpf/btf.rst: a header, records of types, strings.
Only names that are asked for are looked at, so that it is quick without any library.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from ptinspect.errors import TargetError

_MAGIC = 0xEB9F

_ARRAY, _STRUCT, _UNION, _ENUM, _FUNC, _PROTO = 3, 4, 5, 6, 12, 13
_VAR, _DATASEC, _DECL_TAG, _ENUM64 = 14, 15, 17, 19

#: Bytes after a record's head: always, and for each of its elements.
_TAIL = {
    1: (4, 0),
    _ARRAY: (12, 0),
    _STRUCT: (0, 12),
    _UNION: (0, 12),
    _ENUM: (0, 8),
    _PROTO: (0, 8),
    _VAR: (4, 0),
    _DATASEC: (0, 12),
    _DECL_TAG: (4, 0),
    _ENUM64: (0, 12),
}


@dataclass(frozen=True)
class BtfNames:
    """What BTF has under the names that were asked for."""

    #: The names of a function's parameters.
    functions: dict[str, tuple[str, ...]]
    #: The names of a structure's members.
    structs: dict[str, tuple[str, ...]]
    enumerators: dict[str, int]


def read_btf(
    data: bytes, functions: Iterable[str], structs: Iterable[str], enumerators: Iterable[str]
) -> BtfNames:
    """
    Look names up in BTF.

    :param data: the section's bytes, as /sys/kernel/btf/vmlinux gives them
    :raises TargetError: if this is not BTF
    """
    try:
        return _read(data, functions, structs, enumerators)
    except (struct.error, IndexError, ValueError) as error:
        raise TargetError(f"the kernel's BTF is malformed: {error}") from error


def _read(
    data: bytes, functions: Iterable[str], structs: Iterable[str], enumerators: Iterable[str]
) -> BtfNames:
    order = "<" if data[:2] == b"\x9f\xeb" else ">"
    magic, _version, _flags, head = struct.unpack_from(f"{order}HBBI", data)
    if magic != _MAGIC:
        raise ValueError("no BTF magic")
    types_at, types_size, strings_at, strings_size = struct.unpack_from(f"{order}4I", data, 8)
    strings = data[head + strings_at : head + strings_at + strings_size]

    def offsets(names: Iterable[str]) -> dict[int, str]:
        found = {}
        for name in names:
            at = strings.find(b"\0" + name.encode() + b"\0")
            if at >= 0:
                found[at + 1] = name
        return found

    def text(offset: int) -> str:
        return strings[offset : strings.index(b"\0", offset)].decode(errors="replace")

    wanted_functions, wanted_structs = offsets(functions), offsets(structs)
    wanted_enumerators = offsets(enumerators)
    record = struct.Struct(f"{order}3I")
    prototype_of: dict[str, int] = {}
    prototypes: dict[int, tuple[int, int]] = {}  # type id -> position, how many parameters
    members: dict[str, tuple[str, ...]] = {}
    values: dict[str, int] = {}
    at, end, number = head + types_at, head + types_at + types_size, 1
    while at < end:
        name, info, ref = record.unpack_from(data, at)
        at += 12
        kind, count = info >> 24 & 0x1F, info & 0xFFFF
        fixed, each = _TAIL.get(kind, (0, 0))
        if kind == _FUNC:
            if name in wanted_functions:
                prototype_of[wanted_functions[name]] = ref
        elif kind == _PROTO:
            prototypes[number] = (at, count)
        elif kind == _STRUCT:
            if name in wanted_structs:
                members[wanted_structs[name]] = tuple(
                    text(struct.unpack_from(f"{order}I", data, at + 12 * i)[0])
                    for i in range(count)
                )
        elif kind == _ENUM and wanted_enumerators:
            for i in range(count):
                member, value = struct.unpack_from(f"{order}Ii", data, at + 8 * i)
                if member in wanted_enumerators:
                    values[wanted_enumerators[member]] = value
        at += fixed + each * count
        number += 1
    parameters = {}
    for function, ref in prototype_of.items():
        position, count = prototypes[ref]
        parameters[function] = tuple(
            text(struct.unpack_from(f"{order}I", data, position + 8 * i)[0]) for i in range(count)
        )
    return BtfNames(parameters, members, values)
