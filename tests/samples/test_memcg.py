# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory cgroups, flags and reference counts of tables, against memory.stat and plain drgn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from drgn import Object
from drgn.helpers.linux.cgroup import cgroup_path
from drgn.helpers.linux.mm import pfn_to_page
from opened import Sample
from overlay import Overlay
from test_commands import answer, run

from ptinspect import describe_ptdesc, page_ptdesc, scan_memmap
from ptinspect.listing import Listing
from ptinspect.state.memcg import NOT_CHARGED, UNKNOWN, Memcgs, MemcgUsage, memcg_usage, read_memcgs
from ptinspect.tables.scan import MemmapScan


def usage(sample: Sample) -> dict[str | None, MemcgUsage]:
    found = memcg_usage(sample.scan, read_memcgs(sample.prog, sample.scan))
    return {each.path: each for each in found}


def test_pages_are_those_of_memory_stat(sample: Sample) -> None:
    """What the guest's kernel said of its two groups, in bytes."""
    found = usage(sample)
    page_size = sample.truth["page_size"]
    for path, stat in sample.truth["cgroups"].items():
        ours = found[path].pages_with_below if path in found else 0
        assert ours * page_size == stat["pagetables"]
    if sample.name == "s390x-6.1":
        # Its tables are allocated without __GFP_ACCOUNT.
        assert set(found) == {None}
    else:
        assert found["/lab"].pages > 5
    everything = sum(each.pages for each in found.values())
    assert everything == int(np.left_shift(1, sample.scan.orders.astype(int)).sum())


def test_paths_are_those_of_plain_drgn(sample: Sample) -> None:
    memcgs = read_memcgs(sample.prog, sample.scan)
    assert memcgs.missing == ()
    charged = 0
    for pfn, place in zip(sample.scan.pfns.tolist(), memcgs.index.tolist()):
        data = pfn_to_page(sample.prog, pfn).memcg_data.value_()
        if not data:
            assert place == NOT_CHARGED
            continue
        charged += 1
        objcg = Object(sample.prog, "struct obj_cgroup *", data & ~7)
        assert cgroup_path(objcg.memcg.css.cgroup).decode() == memcgs.paths[place]
    assert charged or sample.name == "s390x-6.1"


def test_commands(sample: Sample) -> None:
    if sample.name == "s390x-6.1":
        pytest.skip("no table is charged")
    found = usage(sample)
    rows = answer("--sample", sample.name, "summary", "--by", "memcg")["tables"]["memcgs"]
    assert [row["cgroup"] for row in rows] == ["/", "/lab", None]
    assert rows[1]["KiB"] * 1024 == sample.truth["cgroups"]["/lab"]["pagetables"]
    listed = answer(
        "--sample", sample.name, "list", "--no-walk", "--where", "cgroup = /lab", "--columns", "pfn"
    )["tables"]["descriptors"]
    assert len(listed) == found["/lab"].descriptors
    shown = answer("--sample", sample.name, "show", "--no-walk", f"pfn:{listed[0]['pfn']}")
    (member,) = (m for m in shown["tables"]["members"] if m["member"] == "pt_memcg_data")
    assert member["meaning"].startswith("charged to /lab as kernel memory")


def test_cgroups_below_others() -> None:
    """memory.stat counts what is charged below, too."""
    pages = 6
    scan = MemmapScan(
        pfns=np.arange(pages, dtype=np.uint64),
        addresses=np.zeros(pages, np.uint64),
        descriptors=np.zeros(pages, np.dtype([("pt_memcg_data", "<u8")])),
        orders=np.array([0, 0, 2, 0, 0, 0], np.uint8),
        order_known=np.ones(pages, np.bool_),
        scanned_pages=100,
        unreadable_pages=0,
    )
    index = np.array([0, 1, 1, 2, NOT_CHARGED, UNKNOWN], np.int32)
    memcgs = Memcgs(("/", "/a/b", "/a/bc"), index, ())
    assert memcg_usage(scan, memcgs) == [
        MemcgUsage("/", 1, 1, 7),
        MemcgUsage("/a", 0, 0, 6),
        MemcgUsage("/a/b", 2, 5, 5),
        MemcgUsage("/a/bc", 1, 1, 1),
        MemcgUsage(None, 1, 1, 1),
    ]


@contextmanager
def charged(sample: Sample) -> Iterator[tuple[Overlay, Object, Object]]:
    """The address of a charged descriptor's word, and its memory cgroup."""
    words = sample.scan.descriptors["pt_memcg_data"]
    places = np.flatnonzero(words)
    if not len(places):
        pytest.skip("no table is charged")
    page = pfn_to_page(sample.prog, int(sample.scan.pfns[places[0]]))
    objcg = Object(sample.prog, "struct obj_cgroup *", int(words[places[0]]) & ~7)
    yield Overlay(sample.prog), page.memcg_data, objcg.memcg


@pytest.mark.parametrize("word", [0x123456789ABCDE02, 0x1003, 0x1000])
def test_word_that_names_no_cgroup(sample: Sample, word: int) -> None:
    with charged(sample) as (overlay, data, _), overlay.value_of(data, word):
        scan = scan_memmap(sample.prog)
        memcgs = read_memcgs(sample.prog, scan)
        listing = Listing(sample.prog, scan)
        rows = listing.select(["cgroup = /lab"])
    (sentence,) = memcgs.missing
    assert f"1 descriptors with pt_memcg_data {word:#x} cannot be told" in sentence
    assert (memcgs.index == UNKNOWN).sum() == 1
    assert len(rows) == usage(sample)["/lab"].descriptors - 1
    assert listing.missing == memcgs.missing


def test_path_without_an_end(sample: Sample) -> None:
    with charged(sample) as (overlay, _, memcg):
        node = memcg.css.cgroup.kn
        try:
            parent = node.member_("__parent")
        except LookupError:
            parent = node.parent
        with overlay.value_of(parent, node):
            memcgs = read_memcgs(sample.prog, sample.scan)
    assert memcgs.paths == ()
    assert any("its path has no end" in sentence for sentence in memcgs.missing)
    assert usage(sample)["/lab"].pages > 5


def meaning(sample: Sample, page: Object, name: str, level: str | None = None) -> str:
    record = describe_ptdesc(page_ptdesc(page), level)
    (field,) = (field for field in record.fields if field.name == name)
    return field.text


def test_reference_counts_are_explained(sample: Sample) -> None:
    if sample.name == "s390x-6.1":
        halves = np.flatnonzero(sample.scan.descriptors["__page_refcount"] >> 24)
        page = pfn_to_page(sample.prog, int(sample.scan.pfns[halves[0]]))
        said = meaning(sample, page, "__page_refcount")
        assert said.startswith("1; ")
        assert "half allocated" in said
    page = pfn_to_page(sample.prog, int(sample.scan.pfns[3]))
    overlay = Overlay(sample.prog)
    assert meaning(sample, page, "__page_refcount") == "1"
    with overlay.value_of(page._refcount.counter, 3):
        said = meaning(sample, page, "__page_refcount", "PTE")
        assert said.startswith("3: a table has one; somebody else")
    with overlay.value_of(page._refcount.counter, 0):
        assert meaning(sample, page, "__page_refcount").startswith("0: the page is free")


def test_flags_are_explained(sample: Sample) -> None:
    prog = sample.prog
    page = pfn_to_page(prog, int(sample.scan.pfns[3]))
    word = page.flags.f if hasattr(page.flags, "f") else page.flags
    overlay = Overlay(prog)
    plain = word.value_()
    names = {}
    for flag in ("PG_reserved", "PG_active", "PG_referenced"):
        with overlay.value_of(word, plain | 1 << int(prog.constant(flag))):
            names[flag] = meaning(sample, page, "pt_flags")
    new = ptdesc_has_own_flags(sample)
    reserved = "PT_reserved" if new else "PG_reserved"
    assert f"{reserved}: made while booting" in names["PG_reserved"]
    deferred = "PG_active: to be freed by RCU" in names["PG_active"]
    assert deferred == sample.name.startswith("ppc64le")
    assert ("PT_kernel: a table of the kernel" in names["PG_referenced"]) == new


def ptdesc_has_own_flags(sample: Sample) -> bool:
    try:
        sample.prog.constant("PT_reserved")
    except LookupError:
        return False
    return True


def test_flag_by_either_name() -> None:
    counts = [
        answer("--sample", "x86_64-7.3", "list", "--no-walk", "--flag", flag)["tables"]
        for flag in ("PT_kernel", "PG_referenced")
    ]
    assert counts[0] == counts[1]
    assert counts[0]["descriptors"]
    done = run("--sample", "x86_64-7.3", "list", "--flag", "PG_zork")
    assert done.returncode == 2
