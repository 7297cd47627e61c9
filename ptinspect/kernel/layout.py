# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
``struct ptdesc`` against ``struct page``: members, offsets, and the TABLE_MATCH promises.

It needs types only, so it works on a vmlinux without a target.
"""

from __future__ import annotations

from collections.abc import Iterator

from drgn import Program, Type, TypeKind, sizeof
from drgn.helpers.common.prog import takes_program_or_default

from ptinspect.kernel.descriptor import ptdesc_is_native, ptdesc_type
from ptinspect.records import Layout, LayoutMember, TableMatch

# Each pair is (names in struct page, names in struct ptdesc), newest first. Sources: the asserts
# below struct ptdesc in include/linux/mm_types.h of 7.3 and of 6.12, and the patch "mm: create
# struct ptdesc" of 12 June 2023.
_KERNEL_PAIRS = (
    (("flags",), ("pt_flags", "__page_flags")),
    (("compound_info", "compound_head"), ("pt_list",)),
    (("compound_info", "compound_head"), ("_pt_pad_1",)),
    (("mapping",), ("__page_mapping",)),
    (("__folio_index", "index"), ("pt_index",)),
    (("rcu_head", "callback_head"), ("pt_rcu_head",)),
    (("page_type",), ("__page_type",)),
    (("_refcount",), ("__page_refcount",)),
    (("memcg_data",), ("pt_memcg_data",)),
)
_JUNE_2023_PAIRS = (
    (("flags",), ("__page_flags", "pt_flags")),
    (("compound_head", "compound_info"), ("pt_list",)),
    (("compound_head", "compound_info"), ("_pt_pad_1",)),
    (("pmd_huge_pte",), ("pmd_huge_pte",)),
    (("mapping",), ("_pt_s390_gaddr",)),
    (("pt_mm",), ("pt_mm",)),
    (("ptl",), ("ptl",)),
)


@takes_program_or_default
def ptdesc_layout(prog: Program) -> Layout:
    """
    Compare the two structures of a kernel.

    :return: The members of ``struct ptdesc`` and ``struct page``, and each pair that must match.
    :raises LookupError: if the debug information has no ``struct page``
    """
    page = prog.type("struct page")
    ptdesc = ptdesc_type(prog)
    return Layout(
        native=ptdesc_is_native(prog),
        ptdesc_size=sizeof(ptdesc),
        page_size=sizeof(page),
        ptdesc_members=tuple(_members(ptdesc)),
        page_members=tuple(_members(page)),
        matches=tuple(
            _match(page, ptdesc, page_names, ptdesc_names, source)
            for source, pairs in (("kernel", _KERNEL_PAIRS), ("June 2023", _JUNE_2023_PAIRS))
            for page_names, ptdesc_names in pairs
        ),
        ptl=describe_ptl(ptdesc),
    )


def _members(type_: Type, base: int = 0) -> Iterator[LayoutMember]:
    """Named members in order of offset, those of anonymous structures and unions in place."""
    for member in type_.members or ():
        offset = base + member.offset
        if member.name is None:
            yield from _members(member.type, offset)
        else:
            yield LayoutMember(
                name=member.name,
                type_name=member.type.type_name(),
                offset=offset,
                size=sizeof(member.type),
            )


def _match(
    page: Type,
    ptdesc: Type,
    page_names: tuple[str, ...],
    ptdesc_names: tuple[str, ...],
    source: str,
) -> TableMatch:
    page_name, page_offset = _first_member(page, page_names)
    ptdesc_name, ptdesc_offset = _first_member(ptdesc, ptdesc_names)
    return TableMatch(source, page_name, ptdesc_name, page_offset, ptdesc_offset)


def _first_member(type_: Type, names: tuple[str, ...]) -> tuple[str, int | None]:
    """The first of the names that a type has, and its offset; the newest name, if it has none."""
    for name in names:
        if type_.has_member(name):
            return name, type_.member(name).offset
    return names[0], None


def describe_ptl(ptdesc: Type) -> str:
    """
    Say what the ``ptl`` slot of a descriptor holds.

    A lock larger than the slot (lockdep, PREEMPT_RT) is allocated and the slot points to it:
    ALLOC_SPLIT_PTLOCKS in include/linux/mm_types_task.h.
    """
    if not ptdesc.has_member("ptl"):
        return "absent (no split page-table locks)"
    type_ = ptdesc.member("ptl").type
    name = type_.type_name()
    if type_.unaliased_kind() == TypeKind.POINTER:
        return (
            f"pointer to an allocated lock ({name}, lock of {sizeof(type_.unaliased().type)} bytes)"
        )
    return f"embedded lock ({name}, {sizeof(type_)} bytes)"
