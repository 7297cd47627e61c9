# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guest address spaces that are damaged at random: always an answer, never an exception."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest
from drgn import Object, sizeof
from opened import Sample
from overlay import Overlay
from test_gmap import census_of, gmaps, made

from ptinspect.state import gmap as gmap_story
from ptinspect.state.gmap import Disagreement, Gmap, Gmaps, Relation, read_gmaps
from ptinspect.state.gmap_relations import GmapStory, read_gmap_story
from ptinspect.tables.physical import physical_ranges
from ptinspect.tables.spaces import SpaceKind, find_spaces
from ptinspect.tables.walk import walk_spaces

#: Damages done to each sample.
ROUNDS = 40


def places(sample: Sample, found: tuple[Gmap, ...]) -> list[tuple[int, int, bool]]:
    """Get where it hurts: address, size, and whether the address is physical."""
    prog = sample.prog
    result = []
    for gmap in found:
        result.append((gmap.address, sizeof(prog.type("struct gmap")), False))
        result.append((gmap.mm, sizeof(prog.type("struct mm_struct")), False))
        if gmap.vm is not None:
            result.append((gmap.vm.address, 2048, False))
        if gmap.space is not None:
            result.append((gmap.space.root.address, 16384, True))
        head = int(Object(prog, "struct gmap *", gmap.address).host_to_rmap.xa_head.value_())
        if head & 3 == 2:
            result.append((head - 2, sizeof(prog.type("struct xa_node")), False))
        for table in (*gmap.crst_list, *gmap.pt_list):
            result.append((table.ptdesc, 64, False))
            result.append((table.pfn * 4096, 16384, True))
    return result


def test_random_damage(sample: Sample) -> None:
    if not made(sample, "gmap-page"):
        pytest.skip("the sample has no guest address spaces")
    prog, census = sample.prog, census_of(sample)
    chance = random.Random(sample.name)
    found = gmaps(census)
    mms = {gmap.mm for gmap in found}
    hosts = [
        space
        for space in find_spaces(prog, slab=False).spaces
        if space.kind is SpaceKind.USER and space.mm and space.mm.address in mms
    ]
    targets = places(sample, found)
    words = [0, 1, 2, 0x20, (1 << 64) - 1, 1 << 63, 0x123456789ABCDEF0]
    words += [address | low for address, _, _ in targets for low in (0, 2)]
    overlay, memory = Overlay(prog), physical_ranges(prog)
    told = 0
    for _ in range(ROUNDS):
        with ExitStack() as stack:
            for _ in range(chance.choice((1, 1, 2, 4))):
                address, size, physical = chance.choice(targets)
                place = address + chance.randrange(size // 8) * 8
                stack.enter_context(overlay.word_at(place, chance.choice(words), physical=physical))
            guests = read_gmaps(prog, hosts).spaces
            tables = walk_spaces(prog, census.paging, [*hosts, *guests], memory=memory)
            told += bool(read_gmap_story(prog, tables).disagreements)
    assert told
    guests = read_gmaps(prog, hosts).spaces
    tables = walk_spaces(prog, census.paging, [*hosts, *guests], memory=memory)
    assert read_gmap_story(prog, tables).disagreements == ()


def test_a_module_without_types_is_asked_for(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not made(sample, "gmap-page"):
        pytest.skip("the sample has no guest address spaces")
    monkeypatch.setattr(gmap_story, "type_or_none", lambda prog, name: None)
    assert read_gmaps(sample.prog, ()) == Gmaps((), "KVM is neither in the kernel nor loaded")
    monkeypatch.setattr(gmap_story, "kvm_module_lacks_types", lambda prog: True)
    asked = []
    monkeypatch.setattr(gmap_story, "load_kvm_types", lambda prog: asked.append(prog))
    found = read_gmaps(sample.prog, ())
    assert asked == [sample.prog]
    assert (found.gmaps, found.absent) == ((), None)
    (what,) = found.missing
    assert "give its file with -s kvm.ko" in what
    assert f"linux-image-{sample.prog['UTS_RELEASE'].string_().decode()}-dbg" in what


def test_what_vanishes_is_not_told() -> None:
    one = Disagreement(Relation.INDEX, 1, 2, "an index")
    other = Disagreement(Relation.LIST, 1, 3, "a list")
    first = GmapStory(Gmaps((), None), (one, other), (), {})
    again = GmapStory(Gmaps((), None), (other,), (), {})
    kept = first.persisting(again)
    assert (kept.disagreements, kept.vanished) == ((other,), 1)
