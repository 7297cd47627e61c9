# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shared PMD tables of each sample against its workload and /proc/PID/maps; damaged counts."""

from __future__ import annotations

from collections import defaultdict

import pytest
from corrupt import Answer, ask
from drgn import Object, offsetof
from drgn.helpers.linux.mm import pfn_to_page, vma_find
from opened import Sample
from overlay import Overlay
from test_walk import made, walked

import ptinspect.state.sharing as state_sharing
from ptinspect.faces.sharing import sharing_report
from ptinspect.state.sharing import SharedTable, Sharing


def story(sample: Sample) -> Sharing:
    return walked(sample).census.stories.sharing


def test_shared_by_whom_and_which_file(sample: Sample) -> None:
    """The processes that mapped the file, and the file's inode and path by /proc/PID/maps."""
    found = story(sample)
    assert found.missing == found.findings == ()
    by_file = defaultdict(set)
    for process in sample.truth["processes"]:
        for mapping in process["maps"]:
            if mapping["path"].startswith("/huge/"):
                key = (int(mapping["inode"]), mapping["path"])
                by_file[key].add((process["pid"], int(mapping["start"], 16)))
    if walked(sample).paging.architecture in ("s390x", "ppc64"):
        assert found.tables == ()
        assert found.counted_by == ""
        return
    assert found.counted_by == "pt_share_count"
    assert len(found.tables) == len(by_file)
    spaces = walked(sample).spaces.spaces
    for table in found.tables:
        (file,) = table.files
        expected = by_file[file.inode, file.path or ""]
        assert {(spaces[s.space].tasks[0].pid, s.va) for s in table.sharers} == expected
        assert table.count == len(expected) - 1
        assert table.hugetlb is True


def test_no_other_table_has_two_parents(sample: Sample) -> None:
    """Each entry above the shared tables, read through plain drgn."""
    paging, _, tables, _ = walked(sample)
    for table in story(sample).tables:
        for sharer in table.sharers:
            value = sample.prog.read_u64(sharer.entry, True)
            assert value & 0x000FFFFFFFFFF000 == table.table
        page = pfn_to_page(sample.prog, table.table // paging.page_bytes)
        assert page.value_() == table.ptdesc
    made_by = {
        space.name for what in ("hugetlb", "hugetlb-third") for space, _ in made(sample, what)
    }
    names = {tables.spaces[s.space].name for t in story(sample).tables for s in t.sharers}
    assert names == (made_by if story(sample).counted_by else set())


# Damage


@pytest.fixture
def shared(sample: Sample) -> SharedTable:
    if not story(sample).tables:
        pytest.skip("the sample shares no tables")
    return story(sample).tables[0]


def answer(sample: Sample) -> Answer:
    return ask(sample.prog, lambda census: sharing_report(census, "x", racing=False))


def count_of(sample: Sample, ptdesc: int) -> Object:
    try:
        pt = Object(sample.prog, "struct ptdesc *", ptdesc)
    except LookupError:
        pt = Object(sample.prog, "struct page *", ptdesc)
    return pt.pt_share_count.counter


@pytest.mark.parametrize("count", [0, 7, -1])
def test_wrong_count(sample: Sample, shared: SharedTable, count: int) -> None:
    with Overlay(sample.prog).value_of(count_of(sample, shared.ptdesc), count):
        found = answer(sample)
    assert found.status == 1
    line = found.line_with("FINDING", f"{shared.table:#x}")
    assert f"counts {count} sharers beyond the first, 2 entries" in line
    assert "wrong count" in found.line_with(f"{shared.ptdesc:#x}")
    assert answer(sample).status == 0


def test_count_of_a_table_that_is_not_shared(sample: Sample, shared: SharedTable) -> None:
    """A leaked reference: the others have exited, the count has not gone down."""
    pmds = walked(sample).census.stories.pmd_tables
    alone = next(int(pt) for pt in pmds.ptdescs if int(pt) != shared.ptdesc)
    with Overlay(sample.prog).value_of(count_of(sample, alone), 1):
        found = answer(sample)
    assert found.status == 1
    assert "counts 1 sharers beyond the first, 1 entries" in found.line_with("FINDING")


def test_kernels_that_count_references(
    sample: Sample, shared: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before pt_share_count each sharer beyond the first took a reference to the page."""
    monkeypatch.setattr(state_sharing, "ptdesc_has_member", lambda prog, name: False)
    references = pfn_to_page(sample.prog, shared.table // 4096)._refcount.counter
    assert references == 1
    with Overlay(sample.prog).value_of(references, 2):
        found = answer(sample)
    assert found.status == 0
    assert found.census.stories.sharing.counted_by == "refcount"
    (same,) = found.census.stories.sharing.tables
    assert (same.count, len(same.sharers)) == (1, 2)
    assert "refcount counts 0 sharers beyond the first, 2" in answer(sample).line_with("FINDING")


def test_a_parent_is_gone(sample: Sample, shared: SharedTable) -> None:
    with Overlay(sample.prog).word_at(shared.sharers[0].entry, 0, physical=True):
        found = answer(sample)
    assert found.status == 1
    assert "counts 1 sharers beyond the first, 1 entries" in found.line_with("FINDING")


def test_mapping_of_no_file(sample: Sample, shared: SharedTable) -> None:
    """Without its file the table is still shown, but the answer says what it lacks."""
    space = walked(sample).tables.spaces[shared.sharers[0].space]
    assert space.mm is not None
    file = vma_find(space.mm.object(sample.prog), shared.sharers[0].va).vm_file
    with Overlay(sample.prog).value_of(file, 0x1234):
        found = answer(sample)
    assert found.status == 4
    assert f"{shared.sharers[0].va:#x} of {space.name}" in found.line_with("INCOMPLETE")
    with Overlay(sample.prog).value_of(file.f_path.dentry.d_parent, 0x1234):
        found = answer(sample)
    assert found.status == 0
    assert found.report.tables[0].rows[0][-1] is None  # type: ignore[index]


def test_a_tree_of_areas_that_leads_to_itself(sample: Sample) -> None:
    """The file cannot be told, and that is said; nobody goes round and round."""
    if not story(sample).tables:
        pytest.skip("nothing is shared")
    (shared, *_) = story(sample).tables
    space = walked(sample).tables.spaces[shared.sharers[0].space]
    assert space.mm is not None
    mm = space.mm.object(sample.prog)
    tree = mm.mm_mt
    node = tree.ma_root.value_() & ~0xFF
    # maple_range_64, as mte_mk_root() marks it: its slots are nodes, the first one is itself.
    root = node | 2 << 3 | 2
    slots = node + offsetof(sample.prog.type("struct maple_node"), "mr64.slot")
    overlay = Overlay(sample.prog)
    with overlay.value_of(tree.ma_root, root), overlay.word_at(slots, root):
        found = answer(sample)
    assert found.status == 4
    va = f"{shared.sharers[0].va:#x} of {space.name}"
    assert found.line_with("INCOMPLETE", "no mapping of a file can be read at", va)
    (same,) = (t for t in found.census.stories.sharing.tables if t.table == shared.table)
    assert same.sharers == shared.sharers
