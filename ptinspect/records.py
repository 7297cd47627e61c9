# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The frozen records that the core yields and the faces print: plain values, no drgn objects."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class LayoutMember:
    """One named member of ``struct ptdesc`` or ``struct page``; offset and size in bytes."""

    name: str
    type_name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TableMatch:
    """One TABLE_MATCH pair; an offset is ``None`` where this kernel lacks the member."""

    #: Whose assert it is: "kernel", or "June 2023" for the patch that proposed the type.
    source: str
    page_member: str
    ptdesc_member: str
    page_offset: int | None
    ptdesc_offset: int | None

    @property
    def verdict(self) -> str:
        """``match``, ``MISMATCH``, or which side is absent on this kernel."""
        if self.page_offset is None and self.ptdesc_offset is None:
            return "absent in both"
        if self.page_offset is None:
            return "absent in struct page"
        if self.ptdesc_offset is None:
            return "absent in struct ptdesc"
        return "match" if self.page_offset == self.ptdesc_offset else "MISMATCH"


@dataclass(frozen=True)
class Layout:
    """``struct ptdesc`` (or the overlay, if not *native*) and ``struct page`` of one kernel."""

    native: bool
    ptdesc_size: int
    page_size: int
    ptdesc_members: tuple[LayoutMember, ...]
    page_members: tuple[LayoutMember, ...]
    matches: tuple[TableMatch, ...]
    #: What the ptl slot holds, in words.
    ptl: str

    @property
    def size_fits(self) -> bool:
        """``sizeof(struct ptdesc) <= sizeof(struct page)``."""
        return self.ptdesc_size <= self.page_size


class FieldState(Enum):
    """What can be said of a member's value in one descriptor."""

    #: The member has its meaning in this descriptor.
    VALUE = "value"
    #: Another member of the union, or nobody, owns these bytes: not a value of this member.
    STALE = "stale"
    #: Whether it has its meaning depends on the table's level or holder, which is not known yet.
    UNDECIDED = "undecided"
    #: This kernel's descriptor has no such member.
    ABSENT = "absent"


@dataclass(frozen=True)
class Field:
    """One member of one descriptor."""

    name: str
    type_name: str
    #: Offset in bytes; ``None`` if absent.
    offset: int | None
    #: The raw integer, or one for each word of a list head; empty if absent.
    raw: tuple[int, ...]
    state: FieldState
    #: The decoded value, or why there is none. Not yet escaped.
    text: str


@dataclass(frozen=True)
class Descriptor:
    """One page-table descriptor, as far as the descriptor itself tells."""

    pfn: int
    #: Address of the ``struct page``, which is that of the ``struct ptdesc``.
    ptdesc: int
    #: Direct-map address of the table memory; ``None`` if the target has no translation for it.
    address: int | None
    physical: int
    typed: bool
    order: int
    node: int | None
    #: Level, where the descriptor alone tells it.
    level: str | None
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class CounterReading:
    """NR_PAGETABLE as the kernel keeps it: a global sum and what CPUs have not added yet."""

    #: ``vm_node_stat[NR_PAGETABLE]``, pages.
    global_pages: int
    #: CPU number -> the sum of its ``vm_node_stat_diff[NR_PAGETABLE]`` over all nodes; 0 left out.
    cpu_remainders: dict[int, int]
    #: Node -> ``pgdat->vm_stat[NR_PAGETABLE]`` with the CPUs' remainders added, pages.
    node_pages: dict[int, int]

    @property
    def exact_pages(self) -> int:
        return self.global_pages + sum(self.cpu_remainders.values())


@dataclass(frozen=True)
class TypedCount:
    """Typed descriptors of one node and one allocation order."""

    node: int | None
    order: int
    descriptors: int
    #: Pages of memory that these descriptors describe.
    pages: int
    #: Pages by which they were counted in NR_PAGETABLE.
    counted_pages: int


@dataclass(frozen=True)
class LevelSummary:
    """The tables of one level that user, kernel or guest spaces reach, each table once."""

    level: str
    kernel: bool
    #: Tables in pages that are typed as page tables.
    typed: int
    #: Tables in pages that are not: this kernel does not type that level, or they are boot tables.
    untyped: int
    table_bytes: int
    #: Entries in use and in all, of the tables whose entries were read.
    used_entries: int
    all_entries: int
    #: Tables without any entry, roots left out, and their bytes, which could be given back.
    empty_tables: int
    empty_bytes: int
    #: Whether they are a guest's (s390), who shares the page tables of its process up to 6.x.
    guest: bool = False

    @property
    def owner(self) -> str:
        """Whose they are, in a word."""
        return "guest" if self.guest else "kernel" if self.kernel else "user"


@dataclass(frozen=True)
class NodePlacement:
    """Leaf entries of the lowest level, by the node of their table and of the page they map."""

    table_node: int
    page_node: int
    entries: int


@dataclass(frozen=True)
class HolderSummary:
    """The typed descriptors that one kind of holder accounts for."""

    #: As the column ``holder`` of ``list`` names it; ``unexplained`` are the orphans.
    holder: str
    descriptors: int
    #: Pages of memory that they describe, and their bytes.
    pages: int
    bytes: int


@dataclass(frozen=True)
class ReachedSummary:
    """What the address spaces reach, beside what is typed."""

    spaces: int
    levels: tuple[LevelSummary, ...]
    #: Typed descriptors that no address space reaches, whatever else holds them.
    unreached: int
    holders: tuple[HolderSummary, ...]
    #: Empty on a machine with one node.
    placement: tuple[NodePlacement, ...]
    #: What the walk could not see, in sentences; empty if it saw all.
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """Page-table memory of one target."""

    page_bytes: int
    scanned_pages: int
    unreadable_pages: int
    #: Descriptors whose allocation order could not be read; counted as one page.
    unknown_orders: int
    typed: tuple[TypedCount, ...]
    #: ``None`` if the counters cannot be read from this target; *counter_problem* says why.
    counter: CounterReading | None
    counter_problem: str | None

    @property
    def counted_pages(self) -> int:
        return sum(count.counted_pages for count in self.typed)

    @property
    def complete(self) -> bool:
        return not (self.unreadable_pages or self.unknown_orders) and self.counter is not None

    @property
    def difference(self) -> int | None:
        """Typed pages, weighted as the kernel counts them, minus NR_PAGETABLE."""
        if self.counter is None:
            return None
        return self.counted_pages - self.counter.exact_pages
