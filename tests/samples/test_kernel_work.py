# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's tables that wait for their work: against plain drgn, and damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from conftest import FREEING, opened
from corruptions import CORRUPTIONS, RETYPINGS
from damage import Damage
from drgn import Object, cast
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mm import page_to_pfn, pfn_to_page
from matrix import matrix, try_corruption
from opened import Sample
from overlay import Overlay
from test_checks_matrix import documented
from test_commands import answer

from ptinspect.census import Census, Holder, take_census
from ptinspect.checks import Verdict, run_checks
from ptinspect.kernel.descriptor import page_type_test
from ptinspect.state.lists import FREE_LIST, WordList
from ptinspect.state.pending import Way
from ptinspect.target import sample_names


@pytest.fixture(scope="module", params=[n for n in sample_names() if n.endswith(FREEING)])
def freeing(request: pytest.FixtureRequest) -> Iterator[Sample]:
    with opened(request.param) as found:
        yield found


def work(sample: Sample) -> Object:
    return sample.prog["kernel_pgtable_work"]


def waiting(sample: Sample) -> list[int]:
    """Page frames of the tables on the list, as plain drgn follows it."""
    head = work(sample).list.address_of_()
    nodes = list_for_each_entry("struct ptdesc", head, "pt_list")
    return [page_to_pfn(cast("struct page *", node)).value_() for node in nodes]


def listed(census: Census) -> WordList:
    found = census.stories.lists.named(FREE_LIST)
    assert found is not None
    return found


def test_the_list_is_that_of_plain_drgn(freeing: Sample) -> None:
    census = take_census(freeing.prog)
    expected = waiting(freeing)
    assert len(expected) > 2
    said = freeing.truth["moment"]["kernel_tables"]
    assert [int(each["pfn"], 16) for each in said] == expected
    found = listed(census)
    assert list(found.pfns) == expected
    assert found.problems == ()
    assert found.before_break == len(expected)
    # WORK_STRUCT_PENDING is the lowest bit (include/linux/workqueue.h).
    pending = bool(work(freeing).work.data.counter.value_() & 1)
    assert census.stories.lists.free_work_pending is pending
    for pfn in expected:
        page = pfn_to_page(freeing.prog, pfn)
        assert page.page_type.value_() == 0xFFFFFFFF
        assert page._refcount.counter.value_() == 1


def test_they_wait_to_be_freed(freeing: Sample) -> None:
    story = take_census(freeing.prog).stories.pending
    ways = [free.way for free in story.frees]
    found = [int(pfn) for pfn, free in zip(story.pfns, story.free) if ways[free] is Way.KERNEL_WORK]
    assert found == waiting(freeing)
    assert not story.typed[[ways[free] is Way.KERNEL_WORK for free in story.free]].any()


def test_the_commands_show_them(freeing: Sample) -> None:
    expected = [hex(pfn) for pfn in waiting(freeing)]
    tables = answer("--sample", freeing.name, "lists")["tables"]
    (row,) = [row for row in tables["lists"] if row["list"] == FREE_LIST]
    assert row["nodes"] == len(expected)
    shown = [row["pfn"] for row in tables["nodes"] if row["list"] == FREE_LIST]
    assert shown == expected


def test_healthy(freeing: Sample) -> None:
    results = run_checks(freeing.prog)
    assert results.findings == ()
    assert not results.incomplete
    (one,) = [r for r in results.results if r.invariant.id == "kernel-work-list"]
    assert (one.verdict, one.examined) == (Verdict.PASS, len(waiting(freeing)))


def test_every_corruption_is_found(freeing: Sample) -> None:
    cells = matrix(freeing.prog, freeing.name)
    assert set(cells) == {*CORRUPTIONS, *RETYPINGS}
    assert {id: cell.why for id, cell in cells.items() if cell.caught is False} == {}
    assert cells["kernel-work-list"].caught
    words = {id: "-" if cell.caught is None else "caught" for id, cell in cells.items()}
    told = documented(freeing.name)
    assert {id: word for id, word in told.items() if id in cells} == words
    assert not run_checks(freeing.prog).findings


def test_a_typed_table_on_the_list_is_held_by_it(freeing: Sample) -> None:
    """As if it had been queued before it was untyped: the census knows who has it."""
    pfn = waiting(freeing)[1]
    page = pfn_to_page(freeing.prog, pfn)
    canonical = page_type_test(freeing.prog).canonical
    with Overlay(freeing.prog).value_of(page.page_type, canonical):
        census = take_census(freeing.prog)
        index = census.index_of_pfn(pfn)
        assert index is not None
        assert census.holder[index] == Holder.FREE_LIST
        (finding,) = run_checks(freeing.prog, only=["kernel-work-list"]).findings
    assert finding.address == page.value_()
    assert finding.message == "a table that waits to be freed is typed"
    assert dict(finding.evidence)["pfn"] == pfn


def test_a_listed_table_in_a_tree_or_free(freeing: Sample) -> None:
    overlay = Overlay(freeing.prog)
    pfn = waiting(freeing)[0]
    census = take_census(freeing.prog)
    with ExitStack() as stack:
        damage = Damage(overlay, census, stack)
        address = damage.entry_address(damage.row(0))
        damage.write_entry(address, damage.retarget(damage.entry(address), pfn * 4096, level=1))
        found = run_checks(freeing.prog, only=["kernel-work-list", "pending-not-linked"]).findings
    assert sorted(finding.message for finding in found) == [
        "a table that waits to be freed is linked in a tree",
        "a table that waits to be freed is linked in a tree",
    ]
    page = pfn_to_page(freeing.prog, pfn)
    # PGTY_buddy (include/linux/page-flags.h).
    with overlay.value_of(page.page_type, 0xF0000000):
        (finding,) = run_checks(freeing.prog, only=["kernel-work-list"]).findings
    assert finding.message == "a table that waits to be freed is free"


def test_a_cut_list(freeing: Sample) -> None:
    head = work(freeing).list
    overlay = Overlay(freeing.prog)
    assert try_corruption(freeing.prog, overlay, "list-integrity").caught
    with overlay.value_of(head.next.next, 0x100):
        found = listed(take_census(freeing.prog))
        (problem, *_) = [f for f in run_checks(freeing.prog).findings if f.address == found.head]
    assert found.problems
    assert problem.invariant == "list-integrity"
    # Walked from the other end too: nothing is lost but the order.
    assert sorted(found.pfns) == sorted(waiting(freeing))
