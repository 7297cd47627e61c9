# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another structure than the debug information has: for a program from then on."""

from __future__ import annotations

from drgn import Program, Type, TypeKind, TypeKindSet, TypeMember


def move_member(prog: Program, struct: str, name: str, by: int) -> int:
    """
    Move a member of a structure, also one in an anonymous union, by some bytes.

    To be called before anything has looked the structure up.

    :return: the offset that it has now
    """
    moved = _moved(prog, prog.type(f"struct {struct}"), name, by)

    def find(prog: Program, kinds: TypeKindSet, asked: str, filename: str | None) -> Type | None:
        return moved if asked == struct and TypeKind.STRUCT in kinds else None

    prog.register_type_finder(f"moved {name}", find, enable_index=0)
    return int(prog.type(f"struct {struct}").member(name).offset)


def _moved(prog: Program, type_: Type, name: str, by: int) -> Type:
    """Make a copy of a type in which a member lies elsewhere."""
    members = []
    for member in type_.members or ():
        if member.name == name:
            where = member.bit_offset + 8 * by
            members.append(TypeMember(member.object, member.name, where))
        elif member.name is None and member.type.has_member(name):
            inner = _moved(prog, member.type, name, by)
            members.append(TypeMember(inner, None, member.bit_offset))
        else:
            members.append(TypeMember(member.object, member.name, member.bit_offset))
    make = prog.struct_type if type_.kind is TypeKind.STRUCT else prog.union_type
    return make(type_.tag, type_.size, tuple(members))
