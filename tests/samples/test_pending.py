# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Tables that wait to be freed: a kernel caught freeing, against plain drgn and RCU's own counters.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest
from corrupt import Answer, ask
from drgn import Architecture, Object, Program, cast, container_of, offsetof
from drgn.helpers.linux.cpumask import for_each_possible_cpu
from drgn.helpers.linux.mm import page_to_pfn, pfn_to_page, virt_to_page
from drgn.helpers.linux.percpu import per_cpu
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.sched import cpu_curr
from opened import Sample
from overlay import Overlay
from test_commands import answer, run

from ptinspect.census import Census, Holder, take_census
from ptinspect.checks import run_checks
from ptinspect.faces.orphans import orphans_notes
from ptinspect.faces.pending import pending_report
from ptinspect.faces.report import Report
from ptinspect.kernel.direct_map import physical_to_virtual
from ptinspect.kernel.paging import EntryClass
from ptinspect.orphans import describe_orphans
from ptinspect.state.pending import Pending, Way, tables_are_batched
from ptinspect.state.rcu import Segment
from ptinspect.state.stacks import stack_bytes
from ptinspect.summary import summarise

BATCH_FUNCTION = "tlb_remove_table_rcu"
SEGMENTS = (Segment.DONE, Segment.WAIT, Segment.NEXT_READY, Segment.NEXT)


@pytest.fixture(scope="module")
def census(moving: Sample) -> Census:
    return take_census(moving.prog)


@pytest.fixture(scope="module")
def pending(census: Census) -> Pending:
    return census.stories.pending


def report_of(census: Census) -> Report:
    return pending_report(
        census.stories.pending,
        census.paging,
        census.tables.spaces,
        "damaged",
        each_table=False,
        racing=False,
    )


def damaged(prog: Program) -> Answer:
    return ask(prog, report_of)


def segments(prog: Program) -> Iterator[tuple[int, Object]]:
    """Each CPU with its ``struct rcu_segcblist``."""
    for cpu in for_each_possible_cpu(prog):
        yield cpu, per_cpu(prog["rcu_data"], cpu).cblist


def callbacks(prog: Program) -> list[tuple[int, Object]]:
    """Each callback on a CPU's list, as drgn objects follow it."""
    found = []
    for cpu, cblist in segments(prog):
        data = container_of(cblist.address_of_(), "struct rcu_data", "cblist")
        heads = [cblist.head]
        if data.type_.type.has_member("nocb_bypass"):
            heads.append(data.nocb_bypass.head)
        for first in heads:
            head = first.read_()
            while head:
                found.append((cpu, head))
                head = head.next.read_()
    return found


def batches(prog: Program) -> list[tuple[int, Object]]:
    return [
        (cpu, container_of(head, "struct mmu_table_batch", "rcu"))
        for cpu, head in callbacks(prog)
        if prog.symbol(head.func.value_()).name == BATCH_FUNCTION
    ]


# A kernel caught freeing --------------------------------------------------------------------------


def test_callbacks_are_those_that_plain_drgn_finds(moving: Sample, pending: Pending) -> None:
    assert pending.rcu is not None
    listed = [(each.cpu, head) for each in pending.rcu.lists for head in each.heads.tolist()]
    assert listed == [(cpu, head.value_()) for cpu, head in callbacks(moving.prog)]
    assert len(listed) > 5
    for said in moving.truth["moment"]["rcu"]:
        ours = [each for each in pending.rcu.lists if each.cpu == said["cpu"]]
        names = Counter(
            moving.prog.symbol(function).name
            for each in ours
            for function in each.functions.tolist()
        )
        assert names == said["functions"]
        unlisted = pending.rcu.unlisted.get(said["cpu"], 0)
        assert said["len"] == sum(len(each.heads) for each in ours) + unlisted


def test_segments_are_as_long_as_rcu_counts_them(moving: Sample, pending: Pending) -> None:
    """``seglen[]``, which RCU keeps beside ``tails[]``."""
    assert pending.rcu is not None
    for cpu, cblist in segments(moving.prog):
        ours = {each.segment: each for each in pending.rcu.lists if each.cpu == cpu}
        for number, segment in enumerate(SEGMENTS):
            each = ours.get(segment)
            assert cblist.seglen[number] == (0 if each is None else len(each.heads))
            if each is not None and segment in (Segment.WAIT, Segment.NEXT_READY):
                assert each.wanted_gp_seq == cblist.gp_seq[number].norm


def test_grace_period(moving: Sample, pending: Pending) -> None:
    assert pending.rcu is not None
    state = moving.prog["rcu_state"]
    gp = pending.rcu.grace_period
    assert gp.gp_seq == state.gp_seq.value_()
    assert gp.in_progress == bool(state.gp_seq & 3)
    if gp.in_progress:
        assert gp.started_ago == (moving.prog["jiffies"] - state.gp_start).value_()
    for each in pending.rcu.lists:
        if each.wanted_gp_seq is not None:
            left = (each.wanted_gp_seq >> 2) - (gp.gp_seq >> 2)
            assert each.grace_periods_to_go == max(0, left)


def test_tables_of_the_batches(moving: Sample, pending: Pending) -> None:
    """Their entries are descriptors on this kernel; each is typed and counted, and in no tree."""
    expected = [
        page_to_pfn(cast("struct page *", batch.tables[n])).value_()
        for _, batch in batches(moving.prog)
        for n in range(batch.nr)
    ]
    listed = np.array(
        [f.way is Way.RCU and f.segment is not Segment.INVOKED for f in pending.frees]
    )
    assert pending.pfns[listed[pending.free]].tolist() == expected
    assert len(expected) == sum(each["tables"] for each in moving.truth["moment"]["rcu"])
    assert len(set(expected)) == len(expected) > 100
    assert pending.typed[listed[pending.free]].all()


def test_the_batch_on_the_stack(moving: Sample, census: Census, pending: Pending) -> None:
    """A CPU was in free_pgd_range(): its mmu_gather is on the stack of the task that exits."""
    (busy,) = (
        each for each in moving.truth["moment"]["cpus"] if "free_pgd_range" in each["frames"]
    )
    (number, free), *more = (
        (n, free) for n, free in enumerate(pending.frees) if free.way is Way.GATHER
    )
    assert not more
    assert free.cpu == busy["cpu"]
    assert free.task.endswith(f"/{busy['pid']}")
    tables = pending.free == number
    assert tables.any()
    assert not np.isin(pending.addresses[tables], census.tables.address).any()
    batch = Object(moving.prog, "struct mmu_table_batch *", free.address)
    assert batch.nr == np.count_nonzero(tables)


def test_every_typed_page_is_accounted_for(moving: Sample, census: Census) -> None:
    """While tables are freed too: what waits is typed and counted until it is freed."""
    summary = summarise(moving.prog, census.scan)
    said = moving.truth["moment"]["nr_page_table_pages"]
    assert summary.counter is not None
    assert summary.counter.exact_pages == summary.counted_pages == said["exact"]
    held = {count.holder: count.pages for count in census.holder_counts()}
    assert held[Holder.RCU] > 100
    assert held[Holder.GATHER] > 0
    assert sum(held.values()) == said["exact"]
    assert census.complete
    # The CPU was in ___pte_free_tlb(), with one table that is in no tree any more and in no batch
    # yet: it is told apart, beside the reason.
    assert held[Holder.UNEXPLAINED] == 1
    known = describe_orphans(moving.prog, census)
    (orphan,) = known.orphans
    assert [orphan.index] == census.unexplained().tolist()
    (busy,) = (each for each in moving.truth["moment"]["cpus"] if each["pid"])
    assert "___pte_free_tlb" in busy["frames"]
    (reason,) = known.at_work
    assert f"CPU {busy['cpu']} gathers tables" in reason
    assert f"/{busy['pid']})" in reason
    (runs,) = known.running
    assert f"CPU {busy['cpu']} runs " in runs
    # Its register still names it.
    assert orphan.on_stacks == (f"the registers on CPU {busy['cpu']}: its descriptor",)
    assert list(orphans_notes(known)) == []
    unnamed = replace(known, orphans=(replace(orphan, on_stacks=()),))
    (note,) = orphans_notes(unnamed)
    assert reason in note
    assert "What is still there later is leaked." in note
    assert all(not each.used for each in orphan.used_as)
    assert orphan.before.startswith("PTE of mm")


def test_orphans_are_listed_with_what_is_known(moving: Sample) -> None:
    tables = answer("--sample", moving.name, "list", "--orphan")["tables"]
    assert len(tables["descriptors"]) == len(tables["orphans"]) == 1
    assert tables["orphans"][0]["pfn"] == tables["descriptors"][0]["pfn"]
    assert tables["orphans"][0]["holds"] == "nothing"


def test_show_says_what_a_table_waits_for(moving: Sample, pending: Pending) -> None:
    for number, words in ((0, "that waits for RCU on CPU 1 (wait)"), (3, "gathers on CPU 1")):
        free = pending.frees[number]
        pfn = int(pending.pfns[pending.free == number][0])
        text = run("--sample", moving.name, "show", f"pfn:{pfn:#x}").stdout
        assert f"in the batch at {free.address:#x} that" in text
        assert words in text


def linked_alone(sample: Sample) -> tuple[Census, int, int, int]:
    """
    A page table with one parent and nothing else that holds its page.

    :return: the census, the index of its descriptor, its entry's address, and an empty entry
    """
    before = take_census(sample.prog, leaf_counts=False)
    alone = (before.level == 0) & (before.reached_counts() == 1)
    alone &= ~np.isin(before.scan.pfns, before.stories.parted_pages.held_pfns)
    if not alone.any():
        pytest.skip("every page with one table is somebody's cache of fragments too")
    index = int(np.flatnonzero(alone)[0])
    row = int(before.rows_of(index)[0])
    entry = int(before.tables.entry_address[row])
    none = 0x20 if sample.name.startswith("s390x") else 0
    return before, index, entry, none


def test_an_orphan_that_nothing_names(sample: Sample) -> None:
    """Both CPUs of a sample at rest are idle: a table that is in no tree is leaked."""
    prog = sample.prog
    _, index, entry, none = linked_alone(sample)
    with Overlay(prog).word_at(entry, none, physical=True):
        known = describe_orphans(prog, take_census(prog, leaf_counts=False))
    (orphan,) = (each for each in known.orphans if each.index == index)
    if known.running:
        pytest.skip(f"not quite at rest: {known.running}")
    if not orphan.on_its_way:
        assert "leaked, it seems" in " ".join(orphans_notes(known))
    assert known.at_work == ()


def test_an_orphan_that_a_stack_names(sample: Sample) -> None:
    """A table taken out of its tree, whose address lies on the stack of the first CPU's task."""
    prog = sample.prog
    before, index, entry, none = linked_alone(sample)
    task = cpu_curr(prog, 0)
    slot = task.stack.value_() + stack_bytes(prog) - 512
    overlay = Overlay(prog)
    descriptor = int(before.scan.addresses[index])
    with overlay.word_at(entry, none, physical=True), overlay.word_at(slot, descriptor):
        census = take_census(prog, leaf_counts=False)
        known = describe_orphans(prog, census)
    (orphan,) = (each for each in known.orphans if each.index == index)
    name = f"{task.comm.string_().decode()}/{task.pid.value_()} on CPU 0: its descriptor"
    assert orphan.on_stacks == (name,)
    assert list(orphans_notes(known)) == []
    assert Holder(int(census.holder[index])) is Holder.UNEXPLAINED
    levels = {each.level: each for each in orphan.used_as}
    assert levels["PTE"].entries >= levels["PTE"].used


def alone(census: Census, row: int) -> bool:
    """Whether a process has a table, and nothing else holds its page."""
    index = int(census.descriptor[row])
    if index < 0 or census.tables.spaces[int(census.tables.space[row])].kernel:
        return False
    parted = census.scan.pfns[index] in census.stories.parted_pages.held_pfns
    return not parted and len(census.rows_of(index)) == 1


def test_a_word_left_on_the_stack_of_a_sleeper(sample: Sample) -> None:
    """Who sleeps at rest does not take tables out of trees: one with entries is leaked."""
    prog = sample.prog
    before = take_census(prog)
    tables = before.tables
    used = tables.counts.sum(axis=1, dtype=np.int64) - tables.counts[:, EntryClass.NONE] > 0
    rows = [row for row in np.flatnonzero(used & (tables.level == 0)) if alone(before, int(row))]
    if not rows:
        pytest.skip("every page with one table is somebody's cache of fragments too")
    index = int(before.descriptor[rows[0]])
    entry = int(tables.entry_address[rows[0]])
    none = 0x20 if sample.name.startswith("s390x") else 0
    task = next(t for t in for_each_task(prog) if t.mm and t.member_("__state").value_() == 1)
    slot = task.stack.value_() + stack_bytes(prog) - 64
    descriptor = int(before.scan.addresses[index])
    overlay = Overlay(prog)
    with overlay.word_at(entry, none, physical=True), overlay.word_at(slot, descriptor):
        known = describe_orphans(prog, take_census(prog, leaf_counts=False))
        results = run_checks(prog, only=["typed-reachability"]).results
    (orphan,) = (each for each in known.orphans if each.index == index)
    name = f"{task.comm.string_().decode()}/{task.pid.value_()}: its descriptor"
    assert name in orphan.on_stacks
    if orphan.at_rest:
        assert orphan.filled
        assert not orphan.on_its_way
        assert descriptor in {finding.address for finding in results[0].findings}
    assert replace(orphan, at_rest=False).on_its_way
    empty = tuple(replace(used, used=0) for used in orphan.used_as)
    assert replace(orphan, used_as=empty).on_its_way


# At rest, and made up -----------------------------------------------------------------------------


def test_nothing_waits_at_rest(sample: Sample) -> None:
    census = take_census(sample.prog, leaf_counts=False)
    found = census.stories.pending
    assert found.frees == found.missing == ()
    assert found.rcu is not None
    assert found.rcu.lists == ()
    assert callbacks(sample.prog) == []
    assert not len(census.unexplained())
    assert census.complete


def test_whether_tables_are_batched(sample: Sample) -> None:
    """x86 before 7.x on bare hardware (or QEMU without KVM) does not."""
    prog = sample.prog
    native = sample.name.startswith("x86_64-6")
    assert tables_are_batched(prog) == (not native)
    words = "without RCU: those on their way are not told"
    assert (words in damaged(prog).text) == native
    if native:
        function = prog["pv_ops"].mmu.tlb_remove_table
        with Overlay(prog).value_of(function, prog.symbol("tlb_remove_table").address):
            assert tables_are_batched(prog)


def entry_of(sample: Sample, pfn: int) -> int:
    """A table as this kernel's batches name it (see __tlb_remove_table() of each)."""
    prog = sample.prog
    assert prog.platform is not None
    table = physical_to_virtual(prog, pfn * int(prog["PAGE_SIZE"]))
    if prog.platform.arch == Architecture.PPC64:
        return table | 1  # PMD_INDEX
    if prog.platform.arch == Architecture.S390X:
        return table
    return int(pfn_to_page(prog, pfn).value_())


@contextmanager
def waiting_batch(sample: Sample, entries: list[int], number: int | None = None) -> Iterator[int]:
    """A batch on the first CPU's list, made up in a page of the kernel that is zero."""
    prog = sample.prog
    overlay = Overlay(prog)
    assert prog.platform is not None
    order = "<" if prog.platform.flags & prog.platform.flags.IS_LITTLE_ENDIAN else ">"
    batch = zero_page(prog)
    base = prog.type("struct mmu_table_batch")
    content = bytearray(int(prog["PAGE_SIZE"]))
    function = prog.symbol(BATCH_FUNCTION).address
    struct.pack_into(f"{order}QQ", content, offsetof(base, "rcu"), 0, function)
    count = len(entries) if number is None else number
    struct.pack_into(f"{order}I", content, offsetof(base, "nr"), count)
    struct.pack_into(f"{order}{len(entries)}Q", content, offsetof(base, "tables"), *entries)
    cblist = per_cpu(prog["rcu_data"], 0).cblist
    first = cblist.head.address_
    assert first is not None
    with ExitStack() as stack:
        for start in range(0, len(content), 4096):
            stack.enter_context(overlay.bytes_at(batch + start, bytes(content[start:][:4096])))
        stack.enter_context(overlay.word_at(first, batch))
        for tail, link in zip(cblist.tails, (first, batch, batch, batch)):
            assert tail.address_ is not None
            stack.enter_context(overlay.word_at(tail.address_, link))
        yield batch


def zero_page(prog: Program) -> int:
    try:
        page = prog["empty_zero_page"]
    except LookupError:
        return int(prog.symbol("empty_zero_page").address)  # x86's, in assembler
    if page.type_.kind.name == "ARRAY":
        assert page.address_ is not None
        return page.address_
    return int(page.value_())


def test_batch_as_each_architecture_names_its_tables(sample: Sample) -> None:
    pfns = sample.scan.pfns[[1, 3, 4]].tolist()
    with waiting_batch(sample, [entry_of(sample, pfn) for pfn in pfns]):
        told = damaged(sample.prog)
    assert told.status == 0, told.text
    found = told.census.stories.pending
    (free,) = found.frees
    assert (free.way, free.segment, free.cpu) == (Way.RCU, Segment.WAIT, 0)
    assert found.pfns.tolist() == pfns
    assert found.typed.all()
    assert (found.level == (1 if sample.name.startswith("ppc64le") else -1)).all()


def test_batch_damaged(sample: Sample) -> None:
    entries = [entry_of(sample, int(sample.scan.pfns[1])), 0x1230, (1 << 64) - 64]
    with waiting_batch(sample, entries) as batch:
        told = damaged(sample.prog)
    assert told.status == 4
    told.line_with(f"{batch:#x}", "2 of its 3 tables name no page of memory", "0x1230")
    assert len(told.census.stories.pending.pfns) == 1
    with waiting_batch(sample, entries, number=1 << 20) as batch:
        told = damaged(sample.prog)
    assert told.status == 4
    told.line_with(f"{batch:#x}", "says that it has 1048576 tables, more than fit")
    assert len(told.census.stories.pending.pfns) == 0


# Damaged lists ------------------------------------------------------------------------------------


def test_list_that_loops(moving: Sample) -> None:
    heads = callbacks(moving.prog)
    cpu, last = heads[-1]
    first = next(head for other, head in heads if other == cpu)
    with Overlay(moving.prog).word_at(last.value_(), first.value_()):
        told = damaged(moving.prog)
    assert told.status == 4
    told.line_with(f"CPU {cpu}", "broken", f"comes back to {first.value_():#x}")
    assert len(told.census.stories.pending.pfns) > 100


def test_list_that_is_cut(moving: Sample) -> None:
    cpu, head = callbacks(moving.prog)[1]
    with Overlay(moving.prog).word_at(head.value_(), 0):
        told = damaged(moving.prog)
    assert told.status == 4
    told.line_with(f"CPU {cpu}", "ends after 2 callbacks, before its last segment")


@pytest.mark.parametrize(
    ("link", "words"),
    [(0xDEAD000000000100, "cannot be read"), (0x1001, "odd address 0x1001")],
)
def test_list_that_leads_astray(moving: Sample, link: int, words: str) -> None:
    cpu, head = callbacks(moving.prog)[2]
    with Overlay(moving.prog).word_at(head.value_(), link):
        told = damaged(moving.prog)
    assert told.status == 4
    told.line_with(f"CPU {cpu}", "broken", "after 3 callbacks", words)


def test_function_that_is_none(moving: Sample) -> None:
    overlay = Overlay(moving.prog)
    _, head = callbacks(moving.prog)[2]
    function = moving.prog.symbol("schedule").address
    with overlay.word_at(head.value_() + 8, 0x1234567):
        told = damaged(moving.prog)
    assert told.status == 4
    told.line_with("function is 0x1234567, where no function begins")
    with overlay.word_at(head.value_() + 8, function + 4):
        told = damaged(moving.prog)
    assert told.status == 4
    told.line_with(f"{function + 4:#x}", "inside schedule")


def test_single_table_that_is_none(moving: Sample) -> None:
    _, batch = batches(moving.prog)[0]
    head = batch.rcu.address_
    assert head is not None
    function = moving.prog.symbol("__tlb_remove_table_one_rcu").address
    with Overlay(moving.prog).word_at(head + 8, function):
        told = damaged(moving.prog)
    assert told.status == 4
    told.line_with("__tlb_remove_table_one_rcu() is to free", "no descriptor")


def test_single_table(moving: Sample) -> None:
    """A descriptor's own callback instead of a batch."""
    prog = moving.prog
    cpu, head = callbacks(prog)[0]
    pfn = int(moving.scan.pfns[7])
    descriptor = pfn_to_page(prog, pfn).value_()
    member = descriptor + offsetof(prog.type("struct ptdesc"), "pt_rcu_head")
    function = prog.symbol("__tlb_remove_table_one_rcu").address
    cblist = per_cpu(prog["rcu_data"], cpu).cblist
    overlay = Overlay(prog)
    first = cblist.head.address_
    assert first is not None
    with ExitStack() as stack:
        for where, value in (
            (first, member),
            (member, head.value_()),
            (member + 8, function),
        ):
            stack.enter_context(overlay.word_at(where, value))
        found = take_census(prog, leaf_counts=False).stories.pending
    single = [free for free in found.frees if free.function == "__tlb_remove_table_one_rcu"]
    assert [free.address for free in single] == [member]
    assert pfn in found.pfns.tolist()


def test_a_batch_that_is_being_freed(moving: Sample) -> None:
    """Some of its tables are free, and may be somebody's again: linked, or queued once more."""
    census = take_census(moving.prog)
    story = census.stories.pending
    chosen = next(
        n for n, free in enumerate(story.frees) if free.function == "tlb_remove_table_rcu"
    )
    table = int(np.flatnonzero(story.free == chosen)[0])
    linked = int(census.tables.address[np.flatnonzero(census.tables.level == 0)[0]])
    addresses = story.addresses.copy()
    addresses[table] = linked
    waiting = replace(story, addresses=addresses)
    frees = list(story.frees)
    frees[chosen] = replace(frees[chosen], segment=Segment.INVOKED)
    invoked = replace(waiting, frees=tuple(frees))
    # Queued by another one as well.
    twice = replace(
        invoked,
        addresses=np.append(story.addresses, story.addresses[table]),
        free=np.append(story.free, np.int32((chosen + 1) % len(frees))),
    )
    for pending, wrong in ((waiting, 1), (invoked, 0), (twice, 0)):
        census.stories.__dict__["pending"] = pending
        (result,) = run_checks(moving.prog, census=census, only=["pending-not-linked"]).results
        assert len(result.findings) == wrong
        assert sum(dict(result.set_aside).values()) == 1 - wrong
    assert all("frees its batch" in why for why, _ in result.set_aside)


def test_a_table_that_two_batches_name(moving: Sample) -> None:
    census = take_census(moving.prog)
    story = census.stories.pending
    other = (int(story.free[0]) + 1) % len(story.frees)
    census.stories.__dict__["pending"] = replace(
        story,
        addresses=np.append(story.addresses, story.addresses[0]),
        free=np.append(story.free, np.int32(other)),
    )
    (result,) = run_checks(moving.prog, census=census, only=["pending-not-linked"]).results
    (finding,) = result.findings
    evidence = dict(finding.evidence)
    assert finding.message == "a table that waits to be freed is queued twice"
    assert evidence["queued_at"] == story.frees[other].address
    assert evidence["other_queued_at"] == story.frees[int(story.free[0])].address


def test_a_batch_that_was_freed(moving: Sample, pending: Pending) -> None:
    """A stack names it still, and its page says what it said: but nobody has the page."""
    (batch,) = (free.address for free in pending.frees if free.way is Way.GATHER)
    page = virt_to_page(moving.prog, batch)
    with Overlay(moving.prog).value_of(page._refcount.counter, 0):
        story = take_census(moving.prog).stories.pending
    assert [free.way for free in story.frees] == [
        free.way for free in pending.frees if free.way is not Way.GATHER
    ]
