# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
One descriptor, every member: its raw value, whether it means anything here, and what it says.

The members of a descriptor lie over each other, so bytes that are somebody else's (or nobody's) are
common. A member is decoded only where the table's role gives it a meaning; all else is marked stale
or undecided and shown raw. Which role has which member: include/linux/mm_types.h and the
architectures' pgalloc.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from drgn import Architecture, FaultError, Object, Program, offsetof
from drgn.helpers.linux.mm import decode_page_flags_value, page_to_phys

from ptinspect.kernel.descriptor import (
    MEMBER_NAMES,
    byte_order,
    descriptors_are_typed,
    flags_bit,
    native_member_name,
    page_is_pgtable,
    page_type_test,
    ptdesc_dtype,
    ptdesc_has_member,
    ptdesc_is_native,
    ptdesc_page,
    ptdesc_pfn,
    ptdesc_test_kernel,
    ptdesc_type,
)
from ptinspect.kernel.direct_map import direct_map_offset, physical_to_virtual
from ptinspect.kernel.layout import describe_ptl
from ptinspect.kernel.spinlock import lock_type, word_text
from ptinspect.memory import AddressArray, BoolArray, read_blocks
from ptinspect.records import Descriptor, Field, FieldState
from ptinspect.state.halves import halves_text, has_halves
from ptinspect.state.locks import LockHome, lock_home
from ptinspect.state.memcg import memcg_path
from ptinspect.state.told import Told
from ptinspect.tables.nodes import page_nodes
from ptinspect.tables.scan import MemmapScan, compound_orders

#: Functions that free a table after a grace period, given through ``pt_rcu_head``: pte_free_now
#: (mm/pgtable-generic.c, powerpc's and s390's own), __tlb_remove_table_one_rcu (mm/mmu_gather.c).
RCU_FREE_FUNCTIONS = ("pte_free_now", "__tlb_remove_table_one_rcu")

#: MEMCG_DATA_KMEM and the mask of all flag bits, include/linux/memcontrol.h.
_MEMCG_DATA_KMEM = 2
_MEMCG_DATA_FLAGS = 7

# Offsets of the poison values from CONFIG_ILLEGAL_POINTER_VALUE (include/linux/poison.h).
_POISON_OFFSETS = {0x100: "LIST_POISON1", 0x122: "LIST_POISON2"}
_POISON_BASES = (0xDEAD000000000000, 0x5DEADBEEF0000000, 0)


def list_poison_name(value: int) -> str | None:
    """Get the name of a list poison value of any architecture, or ``None``."""
    for base in _POISON_BASES:
        name = _POISON_OFFSETS.get(value - base)
        if name is not None:
            return name
    return None


def architecture(prog: Program) -> Architecture:
    """Get the architecture of a program that has one."""
    assert prog.platform is not None
    return prog.platform.arch


def describe_ptdesc(
    pt: Object,
    level: str | None = None,
    *,
    of_kernel: bool = False,
    told: Sequence[Told] = (),
) -> Descriptor:
    """
    Decode one descriptor, as far as it and its neighbours in lists tell.

    :param pt: ``struct ptdesc *``
    :param level: The table's level where it is known from a walk; else it is told from the
        descriptor if that is possible.
    :param of_kernel: Whether a walk found it in the kernel's address space.
    :param told: What the stories of a census say of it (:meth:`Stories.told`), which goes before
        what the descriptor tells by itself.
    :return: Every member that any kernel has, with its state here.
    :raises FaultError: if the descriptor itself cannot be read
    """
    prog = pt.prog_
    page = ptdesc_page(pt)
    raw = np.frombuffer(prog.read(pt.value_(), ptdesc_dtype(prog).itemsize), ptdesc_dtype(prog))
    pfn = int(ptdesc_pfn(pt).value_())
    order, order_known = compound_orders(prog, np.array([pt.value_()], np.uint64), raw)
    if level is None:
        level = str(descriptor_levels(prog, np.array([pfn], np.uint64), raw, order)[0]) or None
    typed = page_is_pgtable(page)
    # Since PT_kernel exists, constructors leave lock and deposits of init_mm's tables alone
    # (include/linux/mm.h); architectures that do not set the flag skip them all the same.
    marked = ptdesc_test_kernel(pt)
    facts = _Facts(prog, pt, raw[0], typed, level, marked is not None and (marked or of_kernel))
    try:
        address = physical_to_virtual(prog, int(page_to_phys(page).value_()))
    except (LookupError, ValueError, FaultError):
        address = None
    return Descriptor(
        pfn=pfn,
        ptdesc=int(pt.value_()),
        address=address,
        physical=int(page_to_phys(page).value_()),
        typed=facts.typed,
        order=int(order[0]) if order_known[0] else 0,
        node=int(page_nodes(prog, raw["pt_flags"])[0]),
        level=level,
        fields=tuple(_told_field(_field(facts, name), told) for name in MEMBER_NAMES),
    )


def descriptor_levels(
    prog: Program,
    pfns: npt.NDArray[np.uint64],
    descriptors: npt.NDArray[np.void],
    orders: npt.NDArray[np.uint8],
) -> npt.NDArray[np.str_]:
    """
    Tell the levels of tables from their descriptors alone.

    x86: a descriptor whose ``pt_mm`` names an mm with just this table as its ``pgd`` is a PGD
    (pgd_set_mm in arch/x86/mm/pgtable.c). s390 with ``struct ptdesc``: tables of one page are page
    tables, since segment and region tables are four pages (arch/s390/mm/pgalloc.c).

    :return: str, shape (n,); empty where the descriptor does not tell.
    """
    levels = np.full(len(descriptors), "", "U8")
    arch = architecture(prog)
    if arch == Architecture.X86_64 and "pt_mm" in (descriptors.dtype.names or ()):
        levels[_names_its_mm(prog, pfns, descriptors["pt_mm"])] = "PGD"
    elif arch == Architecture.S390X and ptdesc_is_native(prog):
        typed = descriptors_are_typed(prog, descriptors)
        levels[typed & (orders == 0)] = "PTE"
    return levels


def _names_its_mm(
    prog: Program, pfns: npt.NDArray[np.uint64], pt_mm: npt.NDArray[np.uint64]
) -> BoolArray:
    """Whether each ``pt_mm`` is the address of an mm whose ``pgd`` is this very table."""
    result = np.zeros(len(pfns), np.bool_)
    # Stale bytes there are small numbers or zero; pointers of a 64-bit kernel have the top bit set.
    likely = np.flatnonzero(pt_mm >> np.uint64(63))
    if not len(likely):
        return result
    offset = offsetof(prog.type("struct mm_struct"), "pgd")
    pgds = read_blocks(prog, pt_mm[likely] + np.uint64(offset), 8, physical=False)
    named = pgds.data.reshape(-1).view(f"{byte_order(prog)}u8")
    result[likely] = pgds.readable & (named == direct_map_addresses(prog, pfns[likely]))
    return result


def direct_map_addresses(prog: Program, pfns: npt.NDArray[np.uint64]) -> AddressArray:
    """Get the direct-map address of each page frame."""
    shift = np.uint64(prog["PAGE_SHIFT"].value_())
    addresses: AddressArray = (pfns << shift) + np.uint64(direct_map_offset(prog))
    return addresses


@dataclass(frozen=True)
class _Facts:
    prog: Program
    pt: Object
    raw: np.void
    typed: bool
    level: str | None
    #: A kernel table on a kernel that does not initialise lock and deposits of such tables.
    bare: bool

    def word(self, name: str) -> int:
        return int(self.raw[name])

    @property
    def arch(self) -> Architecture:
        return architecture(self.prog)


#: What a rule answers: the state, and the decoded value or the reason why there is none.
_Answer = tuple[FieldState, str]


def _field(facts: _Facts, name: str) -> Field:
    prog = facts.prog
    if not ptdesc_has_member(prog, name):
        return Field(name, "", None, (), FieldState.ABSENT, "this kernel's descriptor lacks it")
    member = ptdesc_type(prog).member(native_member_name(prog, name))
    columns = [c for c in facts.raw.dtype.names or () if c == name or c.startswith(name + ".")]
    raw = tuple(_as_int(facts.raw[column]) for column in columns)
    if not facts.typed and facts.level is None and name in _SHARED_WORDS:
        state, text = FieldState.UNDECIDED, "the page is not typed as a page table"
    else:
        state, text = _RULES[name](facts)
    return Field(name, member.type.type_name(), member.offset, raw, state, text)


def _told_field(field: Field, told: Sequence[Told]) -> Field:
    of_it = [what for what in told if what.member == field.name]
    if not of_it or field.state is FieldState.ABSENT:
        return field
    values = [what for what in of_it if not what.stale]
    state = FieldState.VALUE if values else FieldState.STALE
    return replace(field, state=state, text="; ".join(what.text for what in values or of_it))


def _as_int(value: np.generic) -> int:
    if isinstance(value, np.void):
        return int.from_bytes(value.tobytes(), "little")
    return int(value)


def ptdesc_flag_names(prog: Program, value: int) -> str:
    """Name the flags that are set in the flags word of a descriptor, ``none`` if there are none."""
    names = str(decode_page_flags_value(prog, value)).split("|")
    # 7.x gives bits of page flags names of their own (enum pt_flags, include/linux/mm.h).
    for page_name, name in (("PG_referenced", "PT_kernel"), ("PG_reserved", "PT_reserved")):
        if flags_bit(prog, name) is not None:
            names = [name if each == page_name else each for each in names]
    return "none" if names == ["0"] else "|".join(names)


#: What flags say of a table. The others have no meaning here and should not be set.
_FLAG_MEANINGS = {
    "PT_kernel": "a table of the kernel",
    "PT_reserved": "made while booting",
    "PG_reserved": "made while booting",
    "PG_head": "the first of several pages",
    # Set by pte_free_defer() in arch/powerpc/mm/pgtable-frag.c.
    "PG_active": "to be freed by RCU when its last fragment is",
}


def _flags(facts: _Facts) -> _Answer:
    text = ptdesc_flag_names(facts.prog, facts.word("pt_flags"))
    said = [
        f"{name}: {_FLAG_MEANINGS[name]}"
        for name in text.split("|")
        if facts.typed and name in _FLAG_MEANINGS
        if name != "PG_active" or facts.arch == Architecture.PPC64
    ]
    return FieldState.VALUE, f"{text} ({'; '.join(said)})" if said else text


def _rcu_head(facts: _Facts) -> _Answer:
    name = _symbol_name(facts.prog, facts.word("pt_rcu_head.func"))
    if name in RCU_FREE_FUNCTIONS:
        return FieldState.VALUE, f"waits for a grace period, then {name}()"
    return FieldState.STALE, "func is no function that frees a table: not queued"


def _symbol_name(prog: Program, address: int) -> str | None:
    try:
        symbol = prog.symbol(address)
    except LookupError:
        return None
    return symbol.name if symbol.address == address else None


def _list(facts: _Facts) -> _Answer:
    following, previous = facts.word("pt_list.next"), facts.word("pt_list.prev")
    node = facts.pt.value_() + facts.raw.dtype.fields["pt_list.next"][1]  # type: ignore[index]
    poison = {list_poison_name(following), list_poison_name(previous)} - {None}
    if following == previous == node:
        return FieldState.VALUE, "self-linked: an empty list or a list of one"
    if poison:
        return FieldState.STALE, f"on no list ({', '.join(sorted(filter(None, poison)))})"
    if _points_to(facts.prog, following + 8, node) and _points_to(facts.prog, previous, node):
        role = "pgd_list" if facts.level == "PGD" else "a list"
        return FieldState.VALUE, f"node of {role}: both neighbours point back"
    return FieldState.STALE, "the neighbours do not point back: not a list node"


def _points_to(prog: Program, address: int, target: int) -> bool:
    try:
        return bool(prog.read_u64(address) == target)
    except FaultError:
        return False


def _pmd_huge_pte(facts: _Facts) -> _Answer:
    value = facts.word("pmd_huge_pte")
    if facts.bare:
        return FieldState.STALE, "a kernel table: never initialised"
    if facts.level == "PMD":
        return FieldState.VALUE, "no deposited tables" if not value else "first deposited table"
    if facts.level is not None:
        return FieldState.STALE, f"only a PMD table has deposits, this is a {facts.level} table"
    poison = list_poison_name(value)
    if poison is not None:
        return FieldState.STALE, f"{poison}, left by the page allocator"
    if _list(facts)[0] is FieldState.VALUE:
        return FieldState.STALE, "pt_list lies over it and is in use"
    return FieldState.UNDECIDED, "a value only in a PMD table"


def _padding(facts: _Facts) -> _Answer:
    return FieldState.STALE, "padding"


def _mapping(facts: _Facts) -> _Answer:
    value = facts.word("__page_mapping")
    return FieldState.VALUE, "none" if not value else "not zero, as it must be in a table"


def _gaddr(facts: _Facts) -> _Answer:
    if facts.arch == Architecture.S390X and not facts.typed:
        return FieldState.UNDECIDED, "a guest address if this is a gmap table"
    return FieldState.STALE, "used by s390's gmap tables only"


def _index(facts: _Facts) -> _Answer:
    if facts.arch == Architecture.S390X and not facts.typed:
        return FieldState.UNDECIDED, "a guest address if this is a gmap table"
    return FieldState.STALE, "never cleared; used by s390's gmap tables only"


def _mm(facts: _Facts) -> _Answer:
    if facts.arch != Architecture.X86_64:
        return FieldState.STALE, "used by x86 PGDs only"
    if facts.level == "PGD":
        return FieldState.VALUE, _describe_mm(facts.prog, facts.word("pt_mm"))
    if facts.level is not None:
        return FieldState.STALE, f"only a PGD names its mm, this is a {facts.level} table"
    return FieldState.UNDECIDED, "a value only in a PGD, and no mm there has this table as its pgd"


def _describe_mm(prog: Program, address: int) -> str:
    mm = Object(prog, "struct mm_struct *", value=address)
    try:
        users = mm.mm_users.counter.value_()
        owner = mm.owner.read_() if prog.type("struct mm_struct").has_member("owner") else None
        if owner:
            comm = owner.comm.string_().decode("utf-8", "backslashreplace")
            return f"mm of {comm} (pid {owner.pid.value_()}), mm_users {users}"
    except FaultError as error:
        return f"mm cannot be read: {error}"
    return f"mm without an owner, mm_users {users}"


def _frag_refcount(facts: _Facts) -> _Answer:
    if facts.arch == Architecture.PPC64 and facts.typed:
        value = facts.word("pt_frag_refcount")
        return FieldState.VALUE, f"{value} fragments in use or still to be handed out"
    return FieldState.STALE, "used by powerpc's PTE and PMD fragments only"


def _share_count(facts: _Facts) -> _Answer:
    if facts.level == "PMD":
        value = facts.word("pt_share_count")
        return FieldState.VALUE, "not shared" if not value else f"{value} more mms share this table"
    if facts.level is not None:
        return FieldState.STALE, f"only PMD tables are shared, this is a {facts.level} table"
    return FieldState.UNDECIDED, "a value only in a PMD table"


def _ptl(facts: _Facts) -> _Answer:
    kind = describe_ptl(ptdesc_type(facts.prog))
    if facts.bare:
        return FieldState.STALE, "a kernel table: never initialised"
    if facts.level in ("PTE", "PMD"):
        return FieldState.VALUE, f"{kind}: {_lock_word(facts)}"
    if facts.level is not None:
        return FieldState.STALE, f"a {facts.level} table has no lock of its own"
    return FieldState.UNDECIDED, f"{kind}; in use only in PTE and PMD tables of user mms"


def _lock_word(facts: _Facts) -> str:
    """What the slot says by itself; of an allocated lock that is only where it is."""
    raw = facts.raw["ptl"]
    try:
        shape = lock_type(facts.prog)
        if lock_home(facts.prog) is LockHome.ABSENT:
            return "not in use, mm->page_table_lock guards its entries"
        if shape.size > raw.dtype.itemsize or lock_home(facts.prog) is LockHome.ALLOCATED:
            return f"at {facts.word('ptl'):#x}"
        if shape.word is None:
            return "it has no word"
        return word_text(facts.prog, int(raw))
    except LookupError as error:
        return f"it cannot be decoded: {error}"


def _page_type(facts: _Facts) -> _Answer:
    if not facts.typed:
        return FieldState.VALUE, "not marked as a page table"
    canonical = facts.word("__page_type") == page_type_test(facts.prog).canonical
    return FieldState.VALUE, "page table" + ("" if canonical else ", with unexpected low bits")


def _refcount(facts: _Facts) -> _Answer:
    return FieldState.VALUE, _describe_refcount(facts)


def _describe_refcount(facts: _Facts) -> str:
    value = facts.word("__page_refcount")
    if value == 1 or not facts.typed:
        return str(value)
    if value >> 24 and has_halves(facts.prog):
        return halves_text(value)
    if not value:
        return "0: the page is free, or being freed, although it is typed"
    if facts.level == "PMD" and not ptdesc_has_member(facts.prog, "pt_share_count"):
        return f"{value}: one for itself, one for each further mm that shares it (hugetlb)"
    return f"{value}: a table has one; somebody else holds its page, for a moment or for good"


def _memcg(facts: _Facts) -> _Answer:
    value = facts.word("pt_memcg_data")
    if not value:
        return FieldState.VALUE, "not charged"
    pointer = value & ~_MEMCG_DATA_FLAGS
    if value & _MEMCG_DATA_KMEM:
        kind = f"kernel memory, obj_cgroup {pointer:#x}"
        try:
            return FieldState.VALUE, f"charged to {memcg_path(facts.prog, value)} as {kind}"
        except (FaultError, LookupError, ValueError) as error:
            return FieldState.VALUE, f"charged as {kind}, whose cgroup cannot be told: {error}"
    return FieldState.VALUE, f"mem_cgroup {pointer:#x} without the kernel-memory mark"


_RULES: dict[str, Callable[[_Facts], _Answer]] = {
    "pt_flags": _flags,
    "pt_rcu_head": _rcu_head,
    "pt_list": _list,
    "_pt_pad_1": _padding,
    "pmd_huge_pte": _pmd_huge_pte,
    "__page_mapping": _mapping,
    "_pt_s390_gaddr": _gaddr,
    "pt_index": _index,
    "pt_mm": _mm,
    "pt_frag_refcount": _frag_refcount,
    "pt_share_count": _share_count,
    "ptl": _ptl,
    "__page_type": _page_type,
    "__page_refcount": _refcount,
    "pt_memcg_data": _memcg,
}


def typed_levels(prog: Program, scan: MemmapScan) -> npt.NDArray[np.str_]:
    """:func:`descriptor_levels` of all descriptors that a scan found."""
    return descriptor_levels(prog, scan.pfns, scan.descriptors, scan.orders)


#: Members that lie over others: in a page that is no table, their bytes are somebody else's.
_SHARED_WORDS = frozenset(_RULES) - {
    "pt_flags",
    "__page_mapping",
    "__page_type",
    "__page_refcount",
    "pt_memcg_data",
}
