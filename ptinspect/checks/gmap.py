# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""s390's guest address spaces."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ptinspect.checks.context import Context
from ptinspect.checks.model import Finding, NotApplicableError, Severity, Tally
from ptinspect.checks.registry import invariant, not_verified
from ptinspect.state.gmap import Gmap, Relation
from ptinspect.tables.spaces import SpaceKind

#: What a disagreement without a gmap can be about: a list of an mm, a cache.
_OF_NO_GMAP = frozenset({Relation.LIST, Relation.OWNER, Relation.CACHE})

#: Those that compare with the memory slots.
_BY_SLOT = frozenset({Relation.SLOT, Relation.HOST_PAGE})


def _gmaps(context: Context, *, kvm_owned: bool | None) -> list[Gmap]:
    """
    Get the guest address spaces of one generation.

    :param kvm_owned: Whether KVM owns the tables (since 7.0); ``None`` for both.
    """
    story = context.census.stories.gmaps
    if story.gmaps.absent is not None:
        raise NotApplicableError(story.gmaps.absent)
    found = [g for g in story.gmaps.gmaps if kvm_owned is None or g.kvm_owned is kvm_owned]
    if not found:
        raise NotApplicableError("no guest address space of this generation")
    return found


def _owner(context: Context, gmap: Gmap | None) -> str:
    if gmap is None:
        return ""
    for space in context.tables.spaces:
        if space.kind is SpaceKind.USER and space.mm and space.mm.address == gmap.mm:
            return space.name
    return gmap.name


def _disagreements(
    context: Context, tally: Tally, gmaps: list[Gmap], relations: frozenset[Relation]
) -> Iterator[Finding]:
    story = context.census.stories.gmaps
    for what in story.missing:
        tally.miss(what)
    by_address = {gmap.address: gmap for gmap in gmaps}
    for wrong in story.disagreements:
        if wrong.relation not in relations:
            continue
        gmap = by_address.get(wrong.gmap)
        if gmap is None and wrong.relation not in _OF_NO_GMAP:
            continue
        if wrong.relation in _BY_SLOT and gmap is not None and gmap.vm and gmap.vm.changing:
            tally.leave("memory slots of the machine are being changed")
            continue
        if not context.whole or story.missing:
            # What cannot be seen looks like what is not there.
            tally.miss(wrong.text)
            continue
        yield Finding(
            "gmap",
            wrong.address,
            wrong.text,
            (("gmap", wrong.gmap), ("relation", wrong.relation.value)),
            _owner(context, gmap),
            "gmap",
        )


@invariant(
    "gmap-h2g-g2h",
    severity=Severity.CORRUPTION,
    applies="guest address spaces of s390 before 7.0",
    source="gmap_map_segment(), __gmap_link(), __gmap_unlink_by_vmaddr() (arch/s390/mm/gmap.c)",
    false_positives="a fault of the guest in progress (guest_table_lock held); memory slots that "
    "are being changed (slots_lock held) are left out",
    breaks="a segment linked or unlinked on one side only",
)
def gmap_h2g_g2h(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    host_to_guest and guest_to_host are inverse to each other and to the segment entries in use.

    By host_to_guest the kernel finds what to take from the guest when a page of the host goes.
    """
    gmaps = _gmaps(context, kvm_owned=False)
    for gmap in gmaps:
        tally.examine(1 + len(gmap.host_to_guest.entries) + len(gmap.guest_to_host.entries))
    relations = frozenset(
        {Relation.HOST_TO_GUEST, Relation.GUEST_TO_HOST, Relation.SLOT, Relation.RADIX}
    )
    yield from _disagreements(context, tally, gmaps, relations)


@invariant(
    "gmap-crst-index",
    severity=Severity.CORRUPTION,
    applies="guest address spaces of s390 before 7.0, shadows too",
    source="gmap_alloc_table(), gmap_shadow_r2t() and its like (arch/s390/mm/gmap.c)",
    false_positives="a table that is being added (guest_table_lock held)",
    breaks="a table lost from crst_list or pt_list, a write over pt_index",
)
def gmap_crst_index(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The tables of a guest are those on its lists, and each descriptor has its guest address.

    The lists free the tables; the address is how the kernel gets from an entry to the guest.
    """
    gmaps = _gmaps(context, kvm_owned=False)
    for gmap in gmaps:
        tally.examine(1 + len(gmap.crst_list) + len(gmap.pt_list))
    relations = frozenset(
        {Relation.INDEX, Relation.CRST_LIST, Relation.PT_LIST, Relation.ASCE, Relation.SHADOWED}
    )
    yield from _disagreements(context, tally, gmaps, relations)


@invariant(
    "gmap-mirrors-host",
    severity=Severity.CORRUPTION,
    applies="guest address spaces of s390 that are no shadows",
    source="__gmap_link() (arch/s390/mm/gmap.c) copies the host's segment entry; since 7.0 the "
    "guest has pages of its own tables, which MMU notifiers take away (arch/s390/kvm/gmap)",
    false_positives="the host unmaps the memory just now",
    breaks="a page or a page table freed in the host while the guest still had it",
)
def gmap_mirrors_host(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The guest has the memory that the host has there: the very page tables, or since 7.0 the pages.

    Otherwise the guest goes on using pages that the host took away.
    """
    gmaps = [gmap for gmap in _gmaps(context, kvm_owned=None) if not gmap.shadow]
    for gmap in gmaps:
        rows = _rows(context, gmap)
        tally.examine(np.count_nonzero(context.tables.level[rows] == 0))
    relations = frozenset({Relation.HOST_TABLE, Relation.HOST_PAGE})
    yield from _disagreements(context, tally, gmaps, relations)
    owned = [gmap for gmap in gmaps if gmap.kvm_owned]
    yield from _disagreements(context, tally, owned, frozenset({Relation.SLOT}))


def _rows(context: Context, gmap: Gmap) -> npt.NDArray[np.intp]:
    """Get the rows of a guest's tables."""
    for number, space in enumerate(context.tables.spaces):
        if space.gmap == gmap.address:
            return context.tables.rows_of_space(number)
    return np.empty(0, np.intp)


@invariant(
    "gmap-tables",
    severity=Severity.CORRUPTION,
    applies="guest address spaces of s390",
    source="gmap_alloc_crst() (arch/s390/mm/gmap.c); dat_alloc_crst_sleepable() and "
    "struct kvm_s390_mmu_cache (arch/s390/kvm/gmap, 7.x)",
    false_positives="none known",
    breaks="a table of a guest freed, or linked in two guests; a broken list of gmaps",
)
def gmap_tables(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The tables of a guest are nobody else's: untyped, with one reference, on whole lists.

    The kernel's own counters do not know them, so nothing else would notice.
    """
    gmaps = _gmaps(context, kvm_owned=None)
    tally.examine(len(context.census.stories.gmaps.gmaps.caches))
    for gmap in gmaps:
        tally.examine(len(_rows(context, gmap)))
    relations = {
        *(Relation.DESCRIPTOR, Relation.LIST, Relation.OWNER),
        *(Relation.CACHE, Relation.SINGLE, Relation.UCONTROL),
    }
    yield from _disagreements(context, tally, gmaps, frozenset(relations))
    # On older kernels gmap-crst-index has these.
    owned = [gmap for gmap in gmaps if gmap.kvm_owned]
    yield from _disagreements(context, tally, owned, frozenset({Relation.ASCE, Relation.SHADOWED}))


not_verified(
    "pgste-unlocked",
    "No PGSTE is locked (PCL) while no CPU runs code of KVM.",
    "memory does not tell whether a CPU is in that code: the lock is held for a few instructions, "
    "also by the host's own faults; the gmap command shows locked entries",
)
