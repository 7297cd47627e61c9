# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What a ``struct ptdesc`` is on this kernel, and how it relates to a ``struct page``.

Kernels since 6.6 have the type in their DWARF (include/linux/mm_types.h). For older ones an overlay
with the same member names is built from the members of ``struct page``. Only this module knows
which of the two it is, and that a descriptor lies over a page at all.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from drgn import (
    IntegerLike,
    Object,
    PlatformFlags,
    Program,
    Type,
    TypeKind,
    TypeMember,
    cast,
    offsetof,
    sizeof,
)
from drgn.helpers.common.prog import takes_program_or_default
from drgn.helpers.linux.mm import (
    page_flags,
    page_to_pfn,
    page_to_phys,
    pfn_to_page,
    virt_to_page,
)

from ptinspect.errors import TargetError
from ptinspect.kernel.direct_map import physical_to_virtual, virtual_to_physical

__all__ = (
    "page_is_pgtable",
    "page_ptdesc",
    "pfn_to_ptdesc",
    "ptdesc_address",
    "ptdesc_flags",
    "ptdesc_folio",
    "ptdesc_has_member",
    "ptdesc_member",
    "ptdesc_page",
    "ptdesc_pfn",
    "ptdesc_test_kernel",
    "ptdesc_type",
    "virt_to_ptdesc",
)


class _Member(NamedTuple):
    """One member of the descriptor under the name that scripts use on every kernel."""

    name: str
    #: Names in ``struct ptdesc``, newest first.
    ptdesc_names: tuple[str, ...]
    #: Names in ``struct page`` of kernels without ``struct ptdesc``, newest first.
    page_names: tuple[str, ...]


# __page_flags of 6.6 is pt_flags in 7.x (include/linux/mm_types.h). DWARF calls the rcu_head member
# of struct page "callback_head", because rcu_head is a macro (include/linux/types.h).
# _pt_s390_gaddr, and no pt_index, is the naming of the June 2023 patch series.
_MEMBERS = (
    _Member("pt_flags", ("pt_flags", "__page_flags"), ("flags",)),
    _Member("pt_rcu_head", ("pt_rcu_head",), ("rcu_head", "callback_head")),
    _Member("pt_list", ("pt_list",), ("lru",)),
    _Member("_pt_pad_1", ("_pt_pad_1",), ("_pt_pad_1",)),
    _Member("pmd_huge_pte", ("pmd_huge_pte",), ("pmd_huge_pte",)),
    _Member("__page_mapping", ("__page_mapping",), ("mapping",)),
    _Member("_pt_s390_gaddr", ("_pt_s390_gaddr",), ()),
    _Member("pt_index", ("pt_index",), ("index", "__folio_index")),
    _Member("pt_mm", ("pt_mm",), ("pt_mm",)),
    _Member("pt_frag_refcount", ("pt_frag_refcount",), ("pt_frag_refcount",)),
    _Member("pt_share_count", ("pt_share_count",), ("pt_share_count",)),
    _Member("ptl", ("ptl",), ("ptl",)),
    _Member("__page_type", ("__page_type",), ("page_type",)),
    _Member("__page_refcount", ("__page_refcount",), ("_refcount",)),
    _Member("pt_memcg_data", ("pt_memcg_data",), ("memcg_data",)),
)

#: Every member name that scripts may use, in the order of the newest ``struct ptdesc``.
MEMBER_NAMES: tuple[str, ...] = tuple(member.name for member in _MEMBERS)

_ALIASES = {
    alias: member.name
    for member in _MEMBERS
    for alias in (member.name, *member.ptdesc_names, *member.page_names)
}
# The word at offset 8 of a page is also compound_info (compound_head before 7.1): for a descriptor
# that is the padding in front of pmd_huge_pte.
_ALIASES.update(compound_info="_pt_pad_1", compound_head="_pt_pad_1", page_type="__page_type")


@takes_program_or_default
def ptdesc_type(prog: Program) -> Type:
    """
    Get the type of a page-table descriptor: the kernel's own ``struct ptdesc``, or the overlay.

    :return: Its members bear this kernel's names; :data:`MEMBER_NAMES` has all of them.
    :raises LookupError: if the program has no debug information for ``struct page``
    """
    return _model(prog).type


@takes_program_or_default
def ptdesc_is_native(prog: Program) -> bool:
    """
    Whether the kernel itself has ``struct ptdesc`` (6.6 and later).

    :return: If not, :func:`ptdesc_type` is an overlay made of the members of ``struct page``.
    """
    return _model(prog).native


class _Model(NamedTuple):
    type: Type
    native: bool
    #: Name that scripts use -> name in ``type``; members that this kernel lacks are absent.
    names: dict[str, str]


def _model(prog: Program) -> _Model:
    try:
        model = prog.cache["ptinspect_descriptor"]
    except KeyError:
        model = prog.cache["ptinspect_descriptor"] = _find_model(prog)
    assert isinstance(model, _Model)
    return model


def _find_model(prog: Program) -> _Model:
    try:
        # Since 6.6 (include/linux/mm_types.h).
        native = prog.type("struct ptdesc")
    except LookupError:
        return _overlay_model(prog)
    names = {}
    for member in _MEMBERS:
        for name in member.ptdesc_names:
            if native.has_member(name):
                names[member.name] = name
                break
    return _Model(native, True, names)


def _overlay_model(prog: Program) -> _Model:
    page = prog.type("struct page")
    found = []
    for member in _MEMBERS:
        for name in member.page_names:
            if page.has_member(name):
                source = page.member(name)
                found.append(TypeMember(source.type, member.name, source.bit_offset))
                break
    overlay = prog.struct_type("ptdesc", sizeof(page), nest_overlapping(prog, found))
    return _Model(overlay, False, {str(m.name): str(m.name) for m in found})


def nest_overlapping(prog: Program, members: Iterable[TypeMember]) -> list[TypeMember]:
    """
    Arrange members with absolute offsets as C would: those that overlap in anonymous unions.

    :param members: Members whose ``bit_offset`` counts from the start of the structure.
    """
    groups: list[list[TypeMember]] = []
    group_end = 0
    for member in sorted(members, key=lambda m: m.bit_offset):
        if groups and member.bit_offset < group_end:
            groups[-1].append(member)
        else:
            groups.append([member])
        group_end = max(group_end, member.bit_offset + 8 * sizeof(member.type))
    nested = []
    for group in groups:
        if len(group) == 1:
            nested.append(group[0])
            continue
        start = group[0].bit_offset
        end = max(m.bit_offset + 8 * sizeof(m.type) for m in group)
        arms = [_union_arm(prog, member, start) for member in group]
        union = prog.union_type(None, (end - start) // 8, arms)
        nested.append(TypeMember(union, None, start))
    return nested


def _union_arm(prog: Program, member: TypeMember, union_start: int) -> TypeMember:
    offset = member.bit_offset - union_start
    if not offset:
        return TypeMember(member.type, member.name, 0)
    inner = TypeMember(member.type, member.name, offset)
    size = offset // 8 + sizeof(member.type)
    return TypeMember(prog.struct_type(None, size, [inner]), None, 0)


def canonical_member_name(name: str) -> str:
    """
    Get the one spelling of a member that works on every kernel.

    :param name: Any name that a kernel gave it, e.g. ``__page_flags`` or ``lru``.
    :raises LookupError: if no kernel's descriptor has such a member
    """
    try:
        return _ALIASES[name]
    except KeyError:
        raise LookupError(f"struct ptdesc has no member {name!r} on any kernel") from None


@takes_program_or_default
def ptdesc_has_member(prog: Program, name: str) -> bool:
    """
    Whether this kernel's descriptor has a member.

    :param name: Any of the names that any kernel gave it.
    :return: If not, the member is absent, which is not zero.
    """
    return canonical_member_name(name) in _model(prog).names


@takes_program_or_default
def native_member_name(prog: Program, name: str) -> str:
    """
    Get the name that this kernel's ``struct ptdesc`` (or the overlay) gives to a member.

    :raises LookupError: if this kernel's descriptor lacks it
    """
    canonical = canonical_member_name(name)
    try:
        return _model(prog).names[canonical]
    except KeyError:
        raise LookupError(f"this kernel's struct ptdesc has no member {canonical!r}") from None


def ptdesc_member(pt: Object, name: str) -> Object:
    """
    Get a member of a descriptor by any of the names that kernels gave it.

    >>> ptdesc_member(pt, "pt_flags")       # also where the kernel says __page_flags

    :param pt: ``struct ptdesc *``
    :param name: Any of the names that any kernel gave it.
    :return: The member, as this kernel declares it.
    :raises LookupError: if this kernel's descriptor lacks the member: it is absent, not zero
    """
    return pt.member_(native_member_name(pt.prog_, name))


def ptdesc_flags(pt: Object) -> Object:
    """
    Get the flags word of a descriptor.

    :param pt: ``struct ptdesc *``
    :return: ``unsigned long``
    """
    return page_flags(ptdesc_page(pt)).read_()


def page_ptdesc(page: Object) -> Object:
    """
    Get the descriptor that overlays a page, as the kernel's ``page_ptdesc()``.

    :param page: ``struct page *``
    :return: ``struct ptdesc *``
    """
    prog = page.prog_
    return cast(prog.pointer_type(ptdesc_type(prog)), page)


def ptdesc_page(pt: Object) -> Object:
    """
    Get the page that a descriptor overlays, as the kernel's ``ptdesc_page()``.

    :param pt: ``struct ptdesc *``
    :return: ``struct page *``
    """
    return cast("struct page *", pt)


def ptdesc_folio(pt: Object) -> Object:
    """
    Get the folio of a descriptor, as the kernel's ``ptdesc_folio()``.

    :param pt: ``struct ptdesc *``
    :return: ``struct folio *``
    :raises LookupError: if the kernel has no folios (before 5.16)
    """
    return cast("struct folio *", pt)


@takes_program_or_default
def pfn_to_ptdesc(prog: Program, pfn: IntegerLike) -> Object:
    """
    Get the descriptor of a page frame.

    :param pfn: ``unsigned long``
    :return: ``struct ptdesc *``
    """
    return page_ptdesc(pfn_to_page(prog, pfn))


@takes_program_or_default
def virt_to_ptdesc(prog: Program, addr: IntegerLike) -> Object:
    """
    Get the descriptor of the page at a direct-map address, as the kernel's ``virt_to_ptdesc()``.

    :param addr: ``void *``
    :return: ``struct ptdesc *``
    """
    try:
        page = virt_to_page(prog, addr)
    except NotImplementedError:
        # drgn 0.3 on riscv64.
        physical = virtual_to_physical(prog, operator.index(addr))
        page = pfn_to_page(prog, physical >> int(prog["PAGE_SHIFT"].value_()))
    return page_ptdesc(page)


def ptdesc_pfn(pt: Object) -> Object:
    """
    Get the page frame number of a descriptor, as the kernel's ``ptdesc_pfn()``.

    :param pt: ``struct ptdesc *``
    :return: ``unsigned long``
    """
    return page_to_pfn(ptdesc_page(pt))


def ptdesc_address(pt: Object) -> Object:
    """
    Get the direct-map address of the table memory that a descriptor describes.

    :param pt: ``struct ptdesc *``
    :return: ``void *``
    """
    physical = int(page_to_phys(ptdesc_page(pt)).value_())
    return Object(pt.prog_, "void *", physical_to_virtual(pt.prog_, physical))


def ptdesc_test_kernel(pt: Object) -> bool | None:
    """
    Whether a descriptor is marked as a kernel page table, as the kernel's ``ptdesc_test_kernel()``.

    :param pt: ``struct ptdesc *``
    :return: ``None`` if the kernel has no such mark (no enumerator ``PT_kernel``, as in 6.12)
    """
    try:
        bit = pt.prog_.constant("PT_kernel").value_()
    except LookupError:
        return None
    return bool(ptdesc_flags(pt).value_() >> bit & 1)


class PageTypeTest(NamedTuple):
    """
    How ``page_type`` marks a page table: ``page_type & mask == match``.

    Source: include/linux/page-flags.h.
    """

    mask: int
    match: int
    #: The value that the constructor writes into ``page_type`` of a page without a type.
    canonical: int
    #: Which of the three encodings it is, in words.
    encoding: str


@takes_program_or_default
def page_type_test(prog: Program) -> PageTypeTest:
    """
    Get the test for the page-table page type.

    :raises TargetError: if this kernel is too old to mark page tables
    """
    try:
        test = prog.cache["ptinspect_page_type"]
    except KeyError:
        test = prog.cache["ptinspect_page_type"] = _find_page_type_test(prog)
    assert isinstance(test, PageTypeTest)
    return test


def _find_page_type_test(prog: Program) -> PageTypeTest:
    page = prog.type("struct page")
    if not page.has_member("page_type"):
        # page_type was split out from _mapcount in 4.18 (include/linux/mm_types.h).
        raise TargetError(
            "struct page has no page_type: kernels before 4.18 do not mark their page tables"
        )
    try:
        # Since 6.12: one type a page, in the top byte (enum pagetype).
        value = prog.constant("PGTY_table").value_()
    except LookupError:
        pass
    else:
        return PageTypeTest(0xFF000000, value << 24, value << 24, f"byte {value:#x}")
    try:
        # 6.11: the macros became enum pagetype, and PAGE_TYPE_BASE shrank to one bit.
        bit = prog.constant("PG_table").value_()
        base = prog.constant("PAGE_TYPE_BASE").value_() & 0xFFFFFFFF
    except LookupError:
        # Macros, not in DWARF: PAGE_TYPE_BASE 0xf0000000 in all of these versions.
        bit = _macro_PG_table(prog, page)
        base = 0xF0000000
    return PageTypeTest(base | bit, base, 0xFFFFFFFF & ~bit, f"inverted bit {bit:#x}")


def _macro_PG_table(prog: Program, page: Type) -> int:
    # 5.11 replaced page->mem_cgroup by page->memcg_data; with it the page type PG_kmemcg went away
    # and PG_table moved from 0x400 to its value, 0x200 (include/linux/page-flags.h).
    if page.has_member("memcg_data"):
        return 0x200
    if page.has_member("mem_cgroup"):
        return 0x400
    # Without CONFIG_MEMCG neither member exists and nothing else in the types tells the two apart.
    release = prog["init_uts_ns"].name.release.string_().decode("ascii", "replace")
    major, minor = (int(part) for part in release.split("-")[0].split(".")[:2])
    return 0x200 if (major, minor) >= (5, 11) else 0x400


def page_is_pgtable(page: Object) -> bool:
    """
    Whether a page is marked as a page table, as the kernel's ``PageTable()``.

    Only the head page of a table of several pages is marked.

    :param page: ``struct page *``
    """
    test = page_type_test(page.prog_)
    return bool(page.page_type.value_() & test.mask == test.match)


@takes_program_or_default
def ptdesc_dtype(prog: Program) -> np.dtype[np.void]:
    """
    Get the NumPy type of a descriptor, from the same DWARF as :func:`ptdesc_type`.

    Fields bear the names that work on every kernel and lie over each other as in C. A list head
    gives ``pt_list.next`` and ``pt_list.prev``. Byte order is the target's. An item is as long as
    a ``struct page``, so that a slice of the memory map can be viewed as an array of it. Page type
    and reference count are always there: where the descriptor lacks them, as in its first proposal
    (June 2023), they are the page's.

    :return: A structured type; offsets and sizes are those of the kernel, in bytes.
    """
    try:
        dtype = prog.cache["ptinspect_ptdesc_dtype"]
    except KeyError:
        dtype = prog.cache["ptinspect_ptdesc_dtype"] = _make_dtype(prog)
    assert isinstance(dtype, np.dtype)
    return dtype


def _make_dtype(prog: Program) -> np.dtype[np.void]:
    model = _model(prog)
    fields: list[tuple[str, str, int]] = []
    for name in MEMBER_NAMES:
        if name in model.names:
            member = model.type.member(model.names[name])
            fields.extend(_flatten(prog, name, member.type, member.offset))
        elif name in ("__page_type", "__page_refcount"):
            page = prog.type("struct page")
            member = page.member(_page_member_name(page, name))
            fields.extend(_flatten(prog, name, member.type, member.offset))
    return np.dtype(
        {
            "names": [name for name, _, _ in fields],
            "formats": [code for _, code, _ in fields],
            "offsets": [offset for _, _, offset in fields],
            "itemsize": sizeof(prog.type("struct page")),
        }
    )


def _page_member_name(page: Type, name: str) -> str:
    """Get what this kernel's ``struct page`` calls a member."""
    (names,) = (member.page_names for member in _MEMBERS if member.name == name)
    return next(known for known in names if page.has_member(known))


_SCALAR_KINDS = frozenset({TypeKind.INT, TypeKind.BOOL, TypeKind.POINTER, TypeKind.ENUM})


def _flatten(prog: Program, name: str, type_: Type, offset: int) -> list[tuple[str, str, int]]:
    """The NumPy fields of one C member: (name, format, offset)."""
    kind = type_.unaliased_kind()
    order = byte_order(prog)
    if kind in _SCALAR_KINDS:
        signed = "i" if kind == TypeKind.INT and type_.unaliased().is_signed else "u"
        return [(name, f"{order}{signed}{sizeof(type_)}", offset)]
    if kind == TypeKind.STRUCT:
        members = type_.unaliased().members or ()
        named = [m for m in members if m.name is not None and sizeof(m.type)]
        if len(named) == 1 and len(members) == 1:
            # atomic_t, memdesc_flags_t: a word in a wrapper keeps the name of the wrapper.
            return _flatten(prog, name, named[0].type, offset)
        if len(named) == len(members) and sizeof(type_) == 16:
            # list_head, callback_head.
            fields = []
            for member in named:
                inner = f"{name}.{member.name}"
                fields.extend(_flatten(prog, inner, member.type, offset + member.offset))
            return fields
    # A lock has no scalar to show; up to 8 bytes it is read as one word.
    size = sizeof(type_)
    code = f"{order}u{size}" if size in (1, 2, 4, 8) else f"V{size}"
    return [(name, code, offset)]


def descriptors_are_typed(
    prog: Program, descriptors: np.ndarray[Any, np.dtype[np.void]]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """
    Tell which descriptors carry the page-table page type, as :func:`page_is_pgtable` for one.

    :param descriptors: Records of :func:`ptdesc_dtype`.
    """
    test = page_type_test(prog)
    types = descriptors["__page_type"]
    typed: np.ndarray[Any, np.dtype[np.bool_]] = types & np.uint32(test.mask) == np.uint32(
        test.match
    )
    return typed


def byte_order(prog: Program) -> str:
    """Get the target's byte order, as NumPy writes it."""
    platform = prog.platform
    if platform is None:
        raise TargetError("the program has no platform, so its byte order is unknown")
    return "<" if platform.flags & PlatformFlags.IS_LITTLE_ENDIAN else ">"


@takes_program_or_default
def page_type_dtype(prog: Program) -> tuple[np.dtype[np.uint32], int]:
    """Get the NumPy type of ``page_type`` and its offset in ``struct page``, in bytes."""
    order = byte_order(prog)
    return np.dtype(f"{order}u4"), offsetof(prog.type("struct page"), "page_type")


class OrderField(NamedTuple):
    """Where the allocation order of a compound page is stored, counted from its head page."""

    offset: int
    dtype: np.dtype[np.uint64]


@takes_program_or_default
def compound_order_field(prog: Program) -> OrderField:
    """
    Get the place of the order of a compound page (low byte of the value read there).

    Source: drgn's ``compound_order()``, which needs one object a page; this serves bulk reads.
    """
    page = prog.type("struct page")
    order = byte_order(prog)
    try:
        folio = prog.type("struct folio")
    except LookupError:
        folio = None
    if folio is not None:
        # 379708ffde1b ("mm: add the first tail page to struct folio", v6.1) brought _folio_order
        # beside _flags_1; ebc1baf5c9b4 ("mm: free up a word in the first tail page", v6.6) moved
        # the order from the one to the other.
        for name in ("_folio_order", "_flags_1"):
            if folio.has_member(name):
                member = folio.member(name)
                size = sizeof(member.type)
                return OrderField(member.offset, np.dtype(f"{order}u{size}"))
    # 1c5509be58f6 ("mm: remove 'First tail page' members from struct page", v6.3) ended this one.
    member = page.member("compound_order")
    return OrderField(sizeof(page) + member.offset, np.dtype(f"{order}u{sizeof(member.type)}"))


def flags_bit(prog: Program, *names: str) -> int | None:
    """Get the mask of the first page flag that this kernel has by one of these enumerators."""
    for name in names:
        try:
            return 1 << int(prog.constant(name).value_())
        except LookupError:
            continue
    return None
