# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""pt_list and pt_mm of each sample against drgn's own list helpers; cut, looped, crossed lists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from corrupt import Answer, ask
from drgn import Object, Type, TypeMember
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mm import PageSlab, compound_head, follow_phys, page_to_pfn, pfn_to_page
from drgn.helpers.linux.pid import for_each_task
from opened import Sample
from overlay import Overlay
from test_walk import deposits, walked

from ptinspect import describe_ptdesc, for_each_pgd_list_ptdesc, pfn_to_ptdesc
from ptinspect.cli.census import tree_census
from ptinspect.faces.lists import lists_report, pgd_report
from ptinspect.kernel.descriptor import page_ptdesc
from ptinspect.listing import Listing
from ptinspect.lists import BreakReason
from ptinspect.reach import reach_of
from ptinspect.records import FieldState
from ptinspect.state.lists import FREE_LIST, PGD_LIST, Lists, Role
from ptinspect.state.owners import Owners, Verdict
from ptinspect.state.pending import Way
from ptinspect.tables.spaces import Space, SpaceKind


def lists(sample: Sample) -> Lists:
    return walked(sample).census.stories.lists


def owners(sample: Sample) -> Owners:
    return walked(sample).census.stories.owners


def is_x86(sample: Sample) -> bool:
    return walked(sample).paging.architecture == "x86_64"


def pgd_pages(sample: Sample) -> list[Object]:
    """The struct pages on pgd_list, by drgn's helper."""
    head = sample.prog["pgd_list"].address_of_()
    return list(list_for_each_entry("struct page", head, "lru"))


@pytest.fixture
def pgds(sample: Sample) -> list[Object]:
    if not is_x86(sample):
        pytest.skip("only x86 has a list of PGDs")
    return pgd_pages(sample)


def test_pgd_list(sample: Sample) -> None:
    found = lists(sample).named(PGD_LIST)
    assert lists(sample).missing == ()
    if not is_x86(sample):
        assert found is None
        return
    assert found is not None
    pages = pgd_pages(sample)
    assert list(found.ptdescs) == [page.value_() for page in pages]
    assert list(found.pfns) == [page_to_pfn(page).value_() for page in pages]
    assert found.before_break == len(pages)
    assert [pt.value_() for pt in for_each_pgd_list_ptdesc(sample.prog)] == list(found.ptdescs)


def test_lists_of_each_space(sample: Sample) -> None:
    """s390: half-free pages of each mm, and the tables of each guest, by drgn's helper."""
    prog, tables = sample.prog, walked(sample).tables
    found = {a.name: list(a.ptdescs) for a in lists(sample).lists if " of " in a.name}
    expected = {}
    heads = []
    if prog.type("struct mm_struct").member("context").type.has_member("pgtable_list"):
        for space in tables.spaces:
            if space.mm is not None and space.kind in (SpaceKind.USER, SpaceKind.KERNEL):
                mm = space.mm.object(prog)
                heads.append((f"pgtable_list of {space.name}", mm.context.pgtable_list))
    for gmap in walked(sample).census.stories.gmaps.gmaps.gmaps:
        struct = Object(prog, "struct gmap *", gmap.address)
        for name in ("crst_list", "pt_list"):
            if struct.type_.type.has_member(name):
                heads.append((f"{name} of {gmap.name}", struct.member_(name)))
    for name, head in heads:
        nodes = list_for_each_entry("struct page", head.address_of_(), "lru")
        expected[name] = [page.value_() for page in nodes]
    assert found == expected
    if sample.name == "s390x-6.1":
        assert any(pages for name, pages in found.items() if name.startswith("crst_list"))
        assert any(pages for name, pages in found.items() if name.startswith("pgtable_list"))
    elif not sample.name.startswith("s390x"):
        assert found == {}


def test_owners_are_the_mms_of_tasks(sample: Sample) -> None:
    """Each task's mm by drgn's helpers: its pgd's page, and on x86 the mm that this page names."""
    story = owners(sample)
    assert story.missing == story.findings == ()
    by_table = {owner.table: owner for owner in story.pgds}
    spaces = walked(sample).tables.spaces
    page_bytes = walked(sample).paging.page_bytes
    checked = 0
    for task in for_each_task(sample.prog):
        mm = task.mm.read_()
        if not mm:
            continue
        root = physical_of(sample, mm.pgd.value_())
        owner = by_table[root]
        assert owner.space is not None
        space = spaces[owner.space]
        assert space.mm is not None
        assert space.mm.address == mm.value_()
        page = pfn_to_page(sample.prog, root // page_bytes)
        if owner.ptdesc is None:
            assert page_is_slab(page)
            assert owner.pages is None
        else:
            assert owner.ptdesc == page.value_()
        if is_x86(sample):
            pt_mm = sample.prog.read_u64(page.value_() + 32)
            assert owner.pt_mm == pt_mm == mm.value_()
            assert owner.position is not None
            assert owner.verdict is Verdict.AGREES
        else:
            assert owner.pt_mm is None
            assert owner.verdict is Verdict.NOT_RECORDED
        checked += 1
    assert checked >= len(sample.truth["processes"])
    users = [space for space in spaces if space.kind is SpaceKind.USER]
    assert len(story.pgds) == len(users)


def physical_of(sample: Sample, address: int) -> int:
    """Translate an address of the direct map."""
    paging = walked(sample).paging
    return int(paging.virtual_to_physical(sample.prog, address))


def page_is_slab(page: Object) -> bool:
    return bool(PageSlab(compound_head(page)))


def test_pages_of_a_pgd(sample: Sample) -> None:
    """Two with page-table isolation, and then the second is the user half."""
    page_bytes = walked(sample).paging.page_bytes
    isolated = {
        space.mm.address: space.root.address
        for space in walked(sample).tables.spaces
        if space.kind is SpaceKind.ISOLATED and space.mm is not None
    }
    for owner in owners(sample).pgds:
        page = pfn_to_page(sample.prog, owner.table // page_bytes)
        if owner.pages is None:
            assert page_is_slab(page)
            continue
        assert not page_is_slab(page)
        if is_x86(sample):
            assert owner.user_half == (owner.table + page_bytes if isolated else None)
            if owner.pages == 2 and not isolated:
                # Built in, switched off: 6.12 has the second page all the same, unused.
                assert sample.prog.symbol("__pti_set_user_pgtbl")
                assert not any(sample.prog.read(owner.table + page_bytes, page_bytes, True))
            else:
                assert owner.pages == (2 if isolated else 1)
        elif walked(sample).paging.architecture == "s390x":
            assert owner.pages == 4
        elif walked(sample).paging.architecture == "ppc64":
            size = sample.prog["__pgd_table_size"].value_()
            assert owner.pages == max(1, size // page_bytes)
        else:
            assert owner.pages == 1
        assert page._refcount.counter == 1


def test_roles(sample: Sample) -> None:
    """The roles of all descriptors, each counted in another way."""
    paging, _, tables, census = walked(sample)
    roles = lists(sample).roles
    users = np.flatnonzero([space.kind is SpaceKind.USER for space in tables.spaces])
    rows = np.flatnonzero(np.isin(tables.space, users) & (tables.first < 0))
    spare = set(deposits(sample.prog, paging, tables, rows))
    in_table = paging.architecture in ("s390x", "ppc64")
    pfns = sample.scan.pfns
    assert set(pfns[roles == Role.DEPOSIT].tolist()) == (set() if in_table else spare)
    pmds = {a // paging.page_bytes for a in tables.address[rows[tables.level[rows] == 1]].tolist()}
    assert set(pfns[roles == Role.PMD_HUGE_PTE].tolist()) == pmds
    listed = set(pfns[roles == Role.PGD_LIST].tolist())
    on_list = (
        {page_to_pfn(page).value_() for page in pgd_pages(sample)} if is_x86(sample) else set()
    )
    assert listed == on_list & set(pfns.tolist())
    for index in np.flatnonzero(roles == Role.SELF).tolist():
        page = Object(sample.prog, "struct page *", int(sample.scan.addresses[index]))
        assert page.lru.next == page.lru.address_of_()
    for index in np.flatnonzero(roles == Role.STALE).tolist():
        page = Object(sample.prog, "struct page *", int(sample.scan.addresses[index]))
        text = describe_ptdesc(page_ptdesc(page)).fields
        (field,) = (f for f in text if f.name == "pt_list")
        assert field.state is not FieldState.VALUE
    listing = Listing(sample.prog, census.scan, census)
    for role in Role:
        chosen = listing.select([f"role = {role.name.lower()}"])
        assert chosen.tolist() == np.flatnonzero(roles == role).tolist()


def test_show_says_what_the_words_are(sample: Sample) -> None:
    census = tree_census(sample.prog)

    def text(pfn: int, member: str) -> str:
        pt = pfn_to_ptdesc(sample.prog, pfn)
        reach = reach_of(sample.prog, census, pfn, pt.value_(), 0)
        record = describe_ptdesc(pt, reach.level, told=reach.told)
        (field,) = (f for f in record.fields if f.name == member)
        return field.text if field.state is FieldState.VALUE else ""

    found = lists(sample).named(PGD_LIST)
    for position, pfn in enumerate(found.pfns if found is not None else ()):
        assert text(pfn, "pt_list") == f"node {position + 1} of {len(found.pfns)} of pgd_list"  # type: ignore[union-attr]
        assert text(pfn, "pt_mm").endswith("; agrees")
    page_bytes = census.paging.page_bytes
    for ring in census.stories.deposits.rings:
        pmd = ring.pmd_tables[0] // page_bytes
        count = len(ring.tables)
        assert text(pmd, "pmd_huge_pte") == f"first of {count} deposited tables, {count} needed"
        for position, table in enumerate(ring.tables):
            if not census.stories.deposits.node_in_table:
                expected = f"deposited for PMD table {ring.pmd_tables[0]:#x}"
                told = text(table // page_bytes, "pt_list")
                assert told.startswith(expected)
                assert told.endswith(f" at ring position {position}")
    for shared in census.stories.sharing.tables:
        told = text(shared.table // page_bytes, "pt_share_count")
        assert told.startswith(f"{len(shared.sharers)} entries point to it (hugetlb-")
        assert "/huge/shared" in told


# Damage


def list_answer(sample: Sample) -> Answer:
    return ask(sample.prog, lambda census: lists_report(census, "x", nodes=True))


def pgd_answer(sample: Sample) -> Answer:
    return ask(sample.prog, lambda census: pgd_report(census, "x", racing=False))


def node(page: Object) -> int:
    return int(page.lru.address_of_())


def test_cut(sample: Sample, pgds: list[Object]) -> None:
    """What lies behind the break is found from the other end; no mm is lost."""
    at = node(pgds[4])
    with Overlay(sample.prog).word_at(at, 0):
        found = list_answer(sample)
        by_pgd = pgd_answer(sample)
    assert found.status == by_pgd.status == 4
    lines = [line for line in found.text.splitlines() if f"node {at:#x}, next 0x0" in line]
    assert all(line.startswith("INCOMPLETE: pgd_list: ") for line in lines)
    assert BreakReason.NULL.value in lines[0]
    assert "broken" in found.line_with("pgd_list", f"{len(pgds)}", "5")
    story = found.census.stories.lists.named(PGD_LIST)
    assert story is not None
    assert story.before_break == 5
    assert list(story.ptdescs) == [page.value_() for page in pgds]
    assert "INCOMPLETE" in by_pgd.text
    assert "FINDING" not in by_pgd.text
    assert list_answer(sample).status == 0


def test_cut_in_both_directions(sample: Sample, pgds: list[Object]) -> None:
    """Two breaks: what lies between them is lost, and the mms there are known otherwise."""
    overlay = Overlay(sample.prog)
    with overlay.word_at(node(pgds[4]), 0x1234), overlay.word_at(node(pgds[9]) + 8, 0x5678):
        found = list_answer(sample)
        by_pgd = pgd_answer(sample)
    story = found.census.stories.lists.named(PGD_LIST)
    assert story is not None
    expected = pgds[:5] + pgds[9:]
    assert list(story.ptdescs) == [page.value_() for page in expected]
    (backward,) = (a for a in found.text.splitlines() if "from its end" in a)
    assert f"node {node(pgds[9]):#x}, prev 0x5678" in backward
    verdicts = [owner.verdict for owner in by_pgd.census.stories.owners.pgds]
    assert verdicts.count(Verdict.NOT_LISTED) == 4
    assert by_pgd.status == 4
    assert "FINDING" not in by_pgd.text


def test_looped(sample: Sample, pgds: list[Object]) -> None:
    with Overlay(sample.prog).word_at(node(pgds[7]), node(pgds[3])):
        found = list_answer(sample)
    assert found.status == 4
    line = f"node {node(pgds[7]):#x}, next {node(pgds[3]):#x}, its prev {node(pgds[2]):#x}"
    assert line in found.text
    story = found.census.stories.lists.named(PGD_LIST)
    assert story is not None
    assert len(story.ptdescs) == len(pgds)


def test_crossed(sample: Sample, pgds: list[Object]) -> None:
    """The list runs into the list of tasks."""
    other = int(sample.prog["init_task"].tasks.address_of_())
    with Overlay(sample.prog).word_at(node(pgds[3]), other):
        found = list_answer(sample)
    assert found.status == 4
    assert f"node {node(pgds[3]):#x}, next {other:#x}, its prev" in found.text
    story = found.census.stories.lists.named(PGD_LIST)
    assert story is not None
    assert list(story.ptdescs) == [page.value_() for page in pgds]


def test_a_pgd_is_missing(sample: Sample, pgds: list[Object]) -> None:
    """Taken out of the list properly, but its mm lives on."""
    overlay = Overlay(sample.prog)
    before, gone, after = (node(page) for page in pgds[3:6])
    with overlay.word_at(before, after), overlay.word_at(after + 8, before):
        found = pgd_answer(sample)
    assert found.status == 1
    line = found.line_with("FINDING")
    assert Verdict.NOT_LISTED.value in line
    assert f"PGD {page_to_pfn(pgds[4]).value_() << 12:#x} of " in line
    del gone


@pytest.mark.parametrize("wrong", ["null", "garbage", "init_mm", "other mm"])
def test_wrong_mm(sample: Sample, pgds: list[Object], wrong: str) -> None:
    values = {
        "null": (0, Verdict.NO_MM),
        "garbage": (0xDEAD0000BEEF0000, Verdict.MM_UNREADABLE),
        "init_mm": (int(sample.prog["init_mm"].address_of_()), Verdict.OTHER_PGD),
        "other mm": (sample.prog.read_u64(pgds[5].value_() + 32), Verdict.OTHER_PGD),
    }
    value, verdict = values[wrong]
    with Overlay(sample.prog).word_at(pgds[2].value_() + 32, value):
        found = pgd_answer(sample)
    # Spaces are found by the same word: one that cannot be read is missing there.
    assert bool(found.report.missing) is (wrong == "garbage")
    assert found.status == 1
    line = found.line_with("FINDING")
    assert f"pt_mm {value:#x}: {verdict.value}" in line
    assert verdict.value in found.line_with(f"{pgds[2].value_():#x}")
    assert pgd_answer(sample).status == 0


def test_two_mms_with_one_pgd(sample: Sample, pgds: list[Object]) -> None:
    """Both the PGD that lost its mm and the mm that took another's PGD are told."""
    one, two = (
        Object(sample.prog, "struct mm_struct *", sample.prog.read_u64(pgd.value_() + 32))
        for pgd in pgds[5:7]
    )
    with Overlay(sample.prog).value_of(two.pgd, one.pgd.value_()):
        found = pgd_answer(sample)
    assert found.status == 1
    assert f"pt_mm {two.value_():#x}: " in found.line_with("FINDING", Verdict.OTHER_PGD.value)
    assert f"pt_mm {one.value_():#x}: " in found.line_with("FINDING", Verdict.OTHER_MM.value)


def test_an_mm_that_only_pgd_list_knows(sample: Sample, pgds: list[Object]) -> None:
    """text_poke_mm has no task; without its symbol and the slab it would still be found."""
    names = {"text_poke_mm", "poking_mm"}
    rows = [owner for owner in owners(sample).pgds if space_of(sample, owner.space).name in names]
    assert len(rows) == 1
    assert not space_of(sample, rows[0].space).tasks
    assert "task" not in pgd_answer(sample).line_with(f"{rows[0].ptdesc:#x}")
    assert len(pgds) == len(owners(sample).pgds)


def space_of(sample: Sample, number: int | None) -> Space:
    assert number is not None
    return walked(sample).tables.spaces[number]


# Kernel tables to be freed: a list that exists for an instant, on kernels with IOMMU_SVA


@contextmanager
def free_list(sample: Sample, pages: list[Object], *, pending: bool) -> Iterator[Overlay]:
    """A kernel_pgtable_work laid over unused memory, with pages on its list."""
    prog = sample.prog
    overlay = Overlay(prog)
    home = int(prog["pgd_list"].address_of_()) & ~0xFFF
    type_ = work_type(sample)

    def find(program: object, name: str, flags: object, filename: str | None) -> Object | None:
        return Object(prog, type_, address=home) if name == "kernel_pgtable_work" else None

    prog.register_object_finder("free_list", find, enable_index=0)
    nodes = [home, *(node(page) for page in pages), home]
    blocks = []
    try:
        for here, following in zip(nodes, nodes[1:]):
            blocks.append(overlay.word_at(here, following))
            blocks.append(overlay.word_at(following + 8, here))
        blocks.append(overlay.word_at(home + 24, int(pending)))
        for block in blocks:
            block.__enter__()
        yield overlay
    finally:
        for block in reversed(blocks):
            block.__exit__(None, None, None)
        prog.set_enabled_object_finders(
            [n for n in prog.enabled_object_finders() if n != "free_list"]
        )


def work_type(sample: Sample) -> Type:
    prog = sample.prog
    members = [
        TypeMember(prog.type("struct list_head"), "list", 0),
        TypeMember(prog.type("spinlock_t"), "lock", 128),
        TypeMember(prog.type("struct work_struct"), "work", 192),
    ]
    return prog.struct_type(None, 24 + 32, members)


def test_kernel_tables_to_be_freed(sample: Sample) -> None:
    if sample.name != "x86_64-7.3":
        pytest.skip("one kernel is enough for what is laid over it")
    typed = set(sample.scan.pfns.tolist())
    # Pages of the kernel's image, which are on no list.
    init_mm, task = (sample.prog[name].address_of_() for name in ("init_mm", "init_task"))
    image = follow_phys(init_mm, task).value_() // 4096
    every = (pfn_to_page(sample.prog, image + n) for n in range(64))
    pages = [page for page in every if page.lru.next == page.lru.address_of_()][:3]
    assert not typed & {page_to_pfn(page).value_() for page in pages}
    with free_list(sample, pages, pending=True) as overlay:
        found = list_answer(sample)
        assert found.status == 0
        rows = [line for line in found.text.splitlines() if line.startswith(FREE_LIST)]
        assert len(rows) == 1 + len(pages)
        assert [f"{page.value_():#x}" in row for page, row in zip(pages, rows[1:])] == [True] * 3
        assert "kernel_pgtable_work is queued" in found.text
        pending = found.census.stories.pending
        waiting = [free.address for free in pending.frees if free.way is Way.KERNEL_WORK]
        assert waiting == [page.value_() for page in pages]
        assert not pending.typed.any()
        with overlay.word_at(node(pages[1]), 0xDEAD000000000100):
            found = list_answer(sample)
        assert found.status == 4
        assert BreakReason.POISON.value in found.text
        (sentence,) = found.census.stories.pending.missing
        assert sentence.startswith("kernel_pgtable_work.list is broken")
    assert FREE_LIST not in list_answer(sample).text
