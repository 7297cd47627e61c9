# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""bpftrace's lines become readings and totals."""

import json
from dataclasses import replace
from typing import Any

import pytest

from ptinspect.trace.reader import Dropped, EndEvent, Gate, Reader, Reading, TableEvent, Waiting
from ptinspect.trace.totals import (
    CounterChange,
    TraceResult,
    cause_of,
    quantile,
    read_totals,
    stack_frames,
)


def said(text: str) -> str:
    return json.dumps({"type": "printf", "data": text})


def test_lines_of_the_gate() -> None:
    reader = Reader()
    assert reader.feed('{"type": "attached_probes", "count": 8, "data": {"probes": 8}}') is None
    assert reader.feed(said("waiting\n")) == Waiting()
    assert reader.feed(said("gate 1 282768511475\n")) == Gate(True, 282768511475)
    assert reader.feed(said("gate 0 285792702572\n")) == Gate(False, 285792702572)


def test_chatter_before_it_begins_is_no_loss() -> None:
    reader = Reader()
    assert reader.feed("script.bt:23:31-51: WARNING: Return value discarded.") is None
    assert reader.chatter == ["script.bt:23:31-51: WARNING: Return value discarded."]
    reader.feed(said("waiting\n"))
    assert isinstance(reader.feed("WARNING: Map full"), Dropped)


def test_losses_are_counted() -> None:
    reader = Reader()
    lost = reader.feed('{"type": "lost_events", "data": {"events": 17}}')
    assert isinstance(lost, Dropped)
    assert lost.count == 17
    full = reader.feed('{"type": "helper_error", "msg": "Map full", "retcode": -7}')
    assert full == Dropped(1, "bpftrace says helper_error: Map full")
    e2big = reader.feed('{"type": "helper_error", "msg": "Argument list too long"}')
    assert isinstance(e2big, Dropped)
    assert "a map that was full" in e2big.what
    assert isinstance(reader.feed(said("nonsense\n")), Dropped)
    assert isinstance(reader.feed(said("made 1 2\n")), Dropped)


def test_events_keep_odd_names() -> None:
    reader = Reader()
    made = reader.feed(said("made 5 ffd40000 1 ff1100 42 a b, c\n\n"))
    assert made == TableEvent("made", 5, 0xFFD40000, "PTE", 42, "a b, c\n", mm=0xFF1100)
    freed = reader.feed(said("freed 9 ffd40000 2 3 4000 42 sh\n"))
    assert freed == TableEvent(
        "freed", 9, 0xFFD40000, "PMD", 42, "sh", way="gather+RCU", waited_ns=4000
    )
    unlinked = reader.feed(said("unlinked 8 ffd40000 1 2 42 sh\n"))
    assert unlinked == TableEvent("unlinked", 8, 0xFFD40000, "PTE", 42, "sh", way="gather")
    assert reader.feed(said("ended 7 ff1100\n")) == EndEvent(7, 0xFF1100)


def read(maps: dict[str, Any], nsecs: int = 1_000_000_000) -> Reading:
    reader = Reader()
    reader.feed(said(f"reading {nsecs}\n"))
    for name, value in maps.items():
        kind = "hist" if name == "wait_us" else "map"
        reader.feed(json.dumps({"type": kind, "data": {f"@{name}": value}}))
    reading = reader.feed(said("end\n"))
    assert isinstance(reading, Reading)
    assert reading.last
    return reading


# As bpftrace 0.27 wrote them in a guest with 6.12, less rows.
MAPS = {
    "made": {"2": 50, "3": 44, "1": 64},
    "made_pages": 158,
    "gone": {"3": 43, "2": 48, "1": 61},
    "gone_pages": 152,
    "made_by": {"613,a,b,1": 60, "613,a,b,2": 50, "7,sh,3": 44},
    "gone_of": {"613,a,b,1": 59, "613,a,b,2": 48, "7,sh,3": 43},
    "freed": {"2,3": 43, "2,2": 48, "3,1": 55},
    "freed_by": {"615,exe,2,2": 48, "615,exe,3,1": 55, "615,exe,2,3": 43},
    "wait_us": {
        "2": [{"min": 64, "max": 79, "count": 50}, {"min": 80, "max": 95, "count": 41}],
        "3": [{"min": 2048, "max": 2559, "count": 54}, {"min": 4096, "max": 5119, "count": 1}],
    },
    "lost_releases": 1,
    "unlinked_first": 91,
    "unlinked_way3": 61,
    "batch_tables": 55,
    "batches": 2,
    "pending": {"18438304246144497408": [999_000_000, 3, 1, 615, "exe"]},
    "live": {
        "18438304246144890304": [100_000_000, 1, 4096, 439, "sh"],
        "18438304246144890368": [300_000_000, 2, 8192, 439, "sh"],
        "18438304246144890560": [700_000_000, 1, 4096, 440, "sh"],
        "18438304246144890624": ["900000000", 1, 0, 2, "kthreadd"],
    },
    "live_stack": {"18438304246144890304": "\n        pte_alloc_one+9\n        __pte_alloc+3\n"},
    "exited": {"4096": 500_000_000},
}


def test_totals() -> None:
    totals = read_totals(read(MAPS))
    assert [(level.level, level.net) for level in totals.levels] == [
        ("PTE", 3),
        ("PMD", 2),
        ("PUD", 1),
    ]
    assert (totals.made_pages, totals.gone_pages, totals.net_pages) == (158, 152, 6)
    assert totals.waiting == 91 + 61 - 146 - 1
    assert totals.unattributed == 158 - 154
    assert (totals.batch_tables, totals.batches) == (55, 2)
    gather, rcu = totals.ways
    assert (gather.way, gather.freed) == ("gather", (0, 0, 48, 43, 0, 0))
    assert (rcu.wait_p50_us, rcu.wait_p99_us, rcu.wait_max_us) == (2559, 5119, 5119)
    by_pid = {(p.pid, p.comm): p for p in totals.processes}
    assert by_pid[613, "a,b"].made == (0, 60, 50, 0, 0, 0)
    assert by_pid[613, "a,b"].live == 3
    assert by_pid[615, "exe"].freed == (0, 0, 91, 55, 0, 0)


def test_destructors_that_were_missed_are_noticed() -> None:
    late = read_totals(read({**MAPS, "gone_unseen": {"613,a,b,1": 1}}))
    assert late.gone_unseen == 1
    assert {(p.pid, p.live) for p in late.processes if p.pid == 613} == {(613, 2)}
    assert not result(totals=replace(result().totals, gone_unseen=1)).exact


def test_full_maps_are_noticed() -> None:
    # Five are said to wait, one is there; four are there of six that live.
    assert read_totals(read(MAPS)).lost_records == 4 + 0
    short = {**MAPS, "live": {}}
    assert read_totals(read(short)).lost_records == 4 + 4
    assert not result(totals=replace(result().totals, lost_records=1)).exact
    assert not result(totals=replace(result().totals, unattributed=1)).exact
    assert result(totals=replace(result().totals, unattributed=1), filtered=True).exact


def test_tables_that_are_left() -> None:
    totals = read_totals(read(MAPS))
    (pending,) = totals.pending
    assert (pending.page, pending.way, pending.age_ns) == (
        18438304246144497408,
        "gather+RCU",
        1_000_000,
    )
    old, other, reused, kernel = totals.live
    assert (old.age_ns, old.mm, old.mm_ended_ns) == (900_000_000, 4096, 500_000_000)
    assert old.frames == ("pte_alloc_one+9", "__pte_alloc+3")
    assert (other.mm, other.mm_ended_ns) == (8192, None)
    # The same address, but made after the mm that ended: another mm.
    assert (reused.mm, reused.mm_ended_ns) == (4096, None)
    assert (kernel.age_ns, kernel.mm) == (100_000_000, None)


def test_counting_only_follows_nothing() -> None:
    totals = read_totals(read({"made": {"1": 2}, "made_pages": 2, "made_by": {"1,init,1": 2}}))
    assert totals.waiting is None
    assert totals.processes[0].live is None
    assert totals.levels[0].gone == 0


def test_an_empty_reading() -> None:
    totals = read_totals(read({"made": {}, "freed": {}, "unlinked_first": 0}))
    assert totals.levels == totals.ways == totals.processes == ()
    assert totals.waiting == totals.net_pages == 0


def test_stacks() -> None:
    text = (
        "\nbpf_prog_395252bf0669f4fd_fentry_x+1492\nbpf_prog_2565dcc17e841e2f_end_8+899\n"
        "__lruvec_stat_mod_folio+9\nlruvec_stat_mod_folio.constprop.0+28\n___pte_free_tlb+55\n"
        "bpf_prog_2a+3\n___pte_free_tlb+9\nfree_pgtables+1\nexit_mmap+2\n"
    )
    frames = stack_frames(text)
    assert frames == ("___pte_free_tlb+55", "free_pgtables+1", "exit_mmap+2")
    assert cause_of(frames) == "exit"
    assert cause_of(("a+1", "__vmalloc_node_range_noprof+4")) == "vmalloc"
    assert cause_of(()) == "other"
    for frame, cause in (
        ("vmap_small_pages_range_noflush+7", "vmalloc"),
        ("change_page_attr_set_clr+7", "set_memory"),
        ("madvise_vma_behavior+7", "madvise"),
        ("__mmdrop+7", "last mm reference"),
    ):
        assert cause_of(("pte_alloc_one+1", frame, "do_syscall_64+3")) == cause
    assert cause_of(("collapse_file+1", "do_madvise+2")) == "THP collapse"
    totals = read_totals(read({"made": {}, "made_at": {f"{text},1": 3}, "unlinked_at": {}}))
    assert [(s.made, s.level, s.count, s.cause) for s in totals.stacks] == [
        (True, "PTE", 3, "exit")
    ]


def test_a_table_that_waits_is_not_left_over() -> None:
    """7.2 runs the destructor when a table is released: until then both maps have it."""
    page = "18438304246144890304"
    maps = {**MAPS, "pending": {**MAPS["pending"], page: [999_000_000, 3, 1, 439, "sh"]}}
    totals = read_totals(read(maps))
    assert int(page) not in {table.page for table in totals.live}
    assert int(page) in {table.page for table in totals.pending}
    assert len(totals.live) == len(MAPS["live"]) - 1


@pytest.mark.parametrize(
    ("histogram", "percent", "expected"),
    [
        ((), 50, None),
        (((0, 1, 1),), 50, 1),
        (((0, 1, 50), (2, 3, 50)), 50, 1),
        (((2, 3, 50), (0, 1, 50)), 99, 3),
        (((0, 1, 99), (2, 3, 1)), 99, 1),
    ],
)
def test_quantile(
    histogram: tuple[tuple[int, int, int], ...], percent: int, expected: "int | None"
) -> None:
    assert quantile(histogram, percent) == expected


def result(**changes: Any) -> TraceResult:
    values: dict[str, Any] = {
        "totals": read_totals(read({"made_pages": 5, "gone_pages": 2})),
        "counter": CounterChange(10, 10, 13, 13),
        "missed": 0,
        "dropped": {},
        "seconds": 1.0,
        "filtered": False,
        "unseen": (),
    }
    return TraceResult(**{**values, **changes})


def test_exact_only_if_nothing_was_lost_and_the_kernel_agrees() -> None:
    assert result().exact
    assert not result(missed=1).exact
    assert not result(missed=None).exact
    assert not result(dropped={"x": 1}).exact
    assert not result(counter=CounterChange(10, 10, 14, 14)).exact
    assert not result(counter=CounterChange(None, None, 13, 13)).exact
    assert not result(ended_early="killed").exact
    lost = read_totals(read({"made_pages": 5, "gone_pages": 2, "lost_releases": 1}))
    assert not result(totals=lost).exact
