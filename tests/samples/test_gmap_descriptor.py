# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Where the guest address of a gmap's table stands: by member presence, whatever the version.

A real dump gets the ``struct ptdesc`` that was first proposed (12 June 2023), which has
``_pt_s390_gaddr`` and neither ``pt_index`` nor page type nor reference count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from drgn import Object, Program, Type, TypeKind, TypeKindSet, TypeMember
from overlay import Overlay

from ptinspect.census import take_census, untyped_census
from ptinspect.faces.descriptors import list_report
from ptinspect.kernel.descriptor import nest_overlapping, pfn_to_ptdesc, ptdesc_has_member
from ptinspect.listing import DEFAULT_COLUMNS, SCAN_COLUMNS, Listing
from ptinspect.reach import reach_of
from ptinspect.records import Field, FieldState
from ptinspect.state.fields import describe_ptdesc
from ptinspect.state.gmap import Gmap, Relation
from ptinspect.state.gmap_relations import read_gmap_story
from ptinspect.target import TargetOptions, open_target

SAMPLE = "s390x-6.1"

#: Members of the proposed type, and those of struct page that they lay over.
NAMES = {
    "__page_flags": "flags",
    "pt_list": "lru",
    "_pt_pad_1": "_pt_pad_1",
    "pmd_huge_pte": "pmd_huge_pte",
    "_pt_s390_gaddr": "mapping",
    "pt_mm": "pt_mm",
    "pt_frag_refcount": "pt_frag_refcount",
    "ptl": "ptl",
}


def proposed(prog: Program) -> Type:
    page = prog.type("struct page")
    members = [
        TypeMember(
            prog.type("unsigned long") if ours == "_pt_s390_gaddr" else page.member(theirs).type,
            ours,
            page.member(theirs).bit_offset,
        )
        for ours, theirs in NAMES.items()
    ]
    return prog.struct_type("ptdesc", 48, nest_overlapping(prog, members))


@pytest.fixture(scope="module")
def prog() -> Iterator[Program]:
    with open_target(TargetOptions(sample=SAMPLE)) as target:
        prog = target.prog

        def find(prog: Program, kinds: TypeKindSet, name: str, file: str | None) -> Type | None:
            return proposed(prog) if name == "ptdesc" and TypeKind.STRUCT in kinds else None

        prog.register_type_finder("proposed", find, enable_index=0)
        yield prog


@contextmanager
def moved_addresses(prog: Program, gmaps: tuple[Gmap, ...]) -> Iterator[None]:
    """Put the guest addresses of all tables on lists where such a kernel keeps them."""
    overlay = Overlay(prog)
    offset = prog.type("struct ptdesc").member("_pt_s390_gaddr").offset
    with ExitStack() as stack:
        for gmap in gmaps:
            for table in (*gmap.crst_list, *gmap.pt_list):
                page = Object(prog, "struct page *", table.ptdesc)
                stack.enter_context(
                    overlay.word_at(table.ptdesc + offset, int(page.index.value_()))
                )
                stack.enter_context(overlay.value_of(page.index, 0xBAD))
        yield


def test_guest_addresses_are_found_by_their_member(prog: Program) -> None:
    assert ptdesc_has_member(prog, "_pt_s390_gaddr")
    assert not ptdesc_has_member(prog, "pt_index")
    assert not ptdesc_has_member(prog, "__page_refcount")
    assert not ptdesc_has_member(prog, "__page_type")
    census = take_census(prog)
    gmaps = census.stories.gmaps.gmaps.gmaps
    # mapping is zero in all of them: no table but the first of each is where it says it is.
    wrong = {found.relation for found in census.stories.gmaps.disagreements}
    assert wrong == {Relation.INDEX, Relation.SHADOWED}
    with moved_addresses(prog, gmaps):
        story = read_gmap_story(prog, census.tables)
        assert story.disagreements == ()
        check_field(prog, story.gmaps.gmaps)


def check_field(prog: Program, gmaps: tuple[Gmap, ...]) -> None:
    tables = [table for gmap in gmaps for table in gmap.crst_list if table.index]
    table = next(table for table in tables if table.index == 0x140000000000)
    pt = pfn_to_ptdesc(prog, table.pfn)
    census = take_census(prog)
    reach = reach_of(prog, census, table.pfn, table.ptdesc, 0)
    record = describe_ptdesc(pt, reach.level, told=reach.told)
    fields: dict[str, Field] = {field.name: field for field in record.fields}
    gaddr = fields["_pt_s390_gaddr"]
    assert (gaddr.state, gaddr.text) == (FieldState.VALUE, "guest address 0x140000000000")
    assert fields["pt_index"].state is FieldState.ABSENT
    assert fields["__page_type"].state is FieldState.ABSENT
    assert fields["ptl"].state is FieldState.STALE
    others = untyped_census(prog, census)
    listing = Listing(prog, others.scan, others)
    column = listing.column("_pt_s390_gaddr")
    said = dict(zip(others.scan.pfns[column.present].tolist(), column.values[column.present]))
    assert int(said[table.pfn]) == 0x140000000000
    owned = {table.pfn for gmap in gmaps for table in (*gmap.crst_list, *gmap.pt_list)}
    assert set(said) == owned


def test_default_columns_of_a_descriptor_without_page_members(prog: Program) -> None:
    """The page itself has its type and its references."""
    census = take_census(prog)
    whole = Listing(prog, census.scan, census)
    for listing, names in (
        (whole, DEFAULT_COLUMNS),
        (Listing(prog, census.scan), SCAN_COLUMNS),
    ):
        report = list_report(listing, names, listing.select(), (), SAMPLE)
        rows = list(report.tables[0].rows)
        assert len(rows) == len(census.scan.pfns)
        place = list(names).index("refcount")
        first = Object(prog, "struct page *", int(census.scan.addresses[0]))
        assert rows[0][place] == first._refcount.counter.value_()
