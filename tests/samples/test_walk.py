# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The walk of each sample against what its kernel said, and against drgn's own walker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from drgn import FaultError, Object, Program
from drgn.helpers.linux.mm import follow_phys, page_to_pfn, virt_to_pfn
from opened import Sample

from ptinspect.census import Census, Holder, join, take_census
from ptinspect.cli.main import run
from ptinspect.kernel.descriptor import pfn_to_ptdesc, ptdesc_member
from ptinspect.kernel.paging import EntryClass, Paging, Permission, paging_of
from ptinspect.tables.lookup import Outcome, page_owners, walk_address
from ptinspect.tables.physical import physical_ranges
from ptinspect.tables.ranges import AddressRange, SpaceMap, fold_ranges, map_space
from ptinspect.tables.spaces import Found, Space, SpaceKind, SpaceList, find_spaces
from ptinspect.tables.usage import space_usage
from ptinspect.tables.walk import RowState, Tables, walk_spaces

#: PTE of s390 that is present for the kernel, but invalid for the hardware while it is old.
S390_PAGE_INVALID = 0x400


class Walked(NamedTuple):
    paging: Paging
    spaces: SpaceList
    tables: Tables
    census: Census


def walked(sample: Sample) -> Walked:
    """Walk a sample, once."""
    prog = sample.prog
    if "test_walk" not in prog.cache:
        prog.cache["test_walk"] = walk(sample)
    found = prog.cache["test_walk"]
    assert isinstance(found, Walked)
    return found


def walk(sample: Sample) -> Walked:
    prog = sample.prog
    paging = paging_of(prog)
    spaces = find_spaces(prog)
    tables = walk_spaces(prog, paging, spaces.spaces, memory=physical_ranges(prog))
    return Walked(paging, spaces, tables, join(sample.prog, spaces, tables, sample.scan))


def mapped(sample: Sample, space: Space) -> SpaceMap:
    """Map a space, once."""
    prog = sample.prog
    key = ("test_walk", space.root)
    if key not in prog.cache:
        prog.cache[key] = map_space(prog, walked(sample).paging, space)
    found = prog.cache[key]
    assert isinstance(found, SpaceMap)
    return found


def processes(sample: Sample) -> Iterator[tuple[dict[str, object], Space]]:
    for process in sample.truth["processes"]:
        space = walked(sample).spaces.of_pid(process["pid"])
        assert space is not None, process["name_escaped"]
        yield process, space


def deposits(prog: Program, paging: Paging, tables: Tables, rows: np.ndarray) -> list[int]:
    """
    Get the spare tables of huge pages that hang on PMD tables (pmd_huge_pte).

    :return: The page frame of each.
    """
    if paging.architecture == "s390x":
        # Its samples have no huge pages.
        return []
    # The list node is in the descriptor of the spare table, on ppc64 in the table itself.
    node_at = 0 if paging.architecture == "ppc64" else 8
    pages = tables.address[rows[tables.level[rows] == 1]] // np.uint64(paging.page_bytes)
    found = []
    for page in np.unique(pages).tolist():
        first = ptdesc_member(pfn_to_ptdesc(prog, page), "pmd_huge_pte").value_()
        if not first:
            continue
        # A ring of nodes without a head.
        node = first + node_at
        while True:
            if node_at:
                pfn = page_to_pfn(Object(prog, "struct page *", node - node_at))
            else:
                pfn = virt_to_pfn(prog, node)
            found.append(pfn.value_())
            node = prog.read_u64(node)
            if node == first + node_at:
                break
    return found


def test_census_finds_in_one_pass_what_is_found_alone(sample: Sample) -> None:
    """A census reads the memory map once, for the typed pages and for the slabs of mms."""
    alone = walked(sample).spaces
    census = take_census(sample.prog, leaf_counts=False)
    own = [space for space in census.spaces.spaces if space.kind is not SpaceKind.GMAP]
    assert own == list(alone.spaces)
    assert census.spaces.notes == alone.notes
    assert any(Found.SLAB in space.found for space in own)
    assert census.scan.pfns.tolist() == sample.scan.pfns.tolist()


def test_everything_is_found_and_read(sample: Sample) -> None:
    paging, spaces, tables, _ = walked(sample)
    assert spaces.notes == ()
    assert spaces.kernel is not None
    assert tables.complete
    assert {RowState(state) for state in tables.state} <= {RowState.READ, RowState.SHARED}
    for space in spaces.spaces:
        if space.kind is SpaceKind.USER:
            assert Found.SLAB in space.found
            if paging.architecture == "x86_64":
                assert Found.PGD_LIST in space.found


def test_walked_tables_are_what_the_kernel_counted(sample: Sample) -> None:
    """Tables x size = mm->pgtables_bytes = VmPTE, exactly; spare tables of huge pages included."""
    paging, spaces, tables, _ = walked(sample)
    usage = space_usage(tables)
    told = {process["pid"]: process["vm_pte_kb"] * 1024 for process in sample.truth["processes"]}
    checked = 0
    for number, space in enumerate(spaces.spaces):
        if space.kind is not SpaceKind.USER:
            continue
        assert space.mm is not None
        rows = tables.rows_of_space(number)
        spare = len(deposits(sample.prog, paging, tables, rows)) * paging.levels[0].table_bytes
        assert usage.accounted_bytes[number] + spare == space.mm.pgtables_bytes, space.name
        for task in space.tasks:
            assert told[task.pid] == space.mm.pgtables_bytes // 1024 * 1024, space.name
            checked += 1
    assert checked == len(told)


def test_pagemap_counts(sample: Sample) -> None:
    """Present and swapped pages of every mapping."""
    page = walked(sample).paging.page_bytes
    for process, space in processes(sample):
        ranges = mapped(sample, space).ranges
        for mapping in process["pagemap"]:  # type: ignore[attr-defined]
            start, end = int(mapping["start"], 16), int(mapping["end"], 16)
            present = swapped = 0
            for area in ranges:
                pages = (min(end, area.end) - max(start, area.start)) // page
                if pages > 0 and area.kind in (EntryClass.LEAF, EntryClass.PROT_NONE):
                    present += pages
                elif pages > 0:
                    swapped += pages
            assert (present, swapped) == (mapping["present"], mapping["swapped"]), mapping["start"]


def test_pagemap_pages(sample: Sample) -> None:
    """Page frames of sampled addresses."""
    paging = walked(sample).paging
    differing = []
    for process, space in processes(sample):
        for mapping in process["pagemap"]:  # type: ignore[attr-defined]
            for text, raw_text in mapping["pages"]:
                address, raw = int(text, 16), int(raw_text, 16)
                found = walk_address(sample.prog, paging, space.root, address)
                if raw >> 63:
                    frame = raw & ((1 << 55) - 1)
                    same = found.physical == frame * paging.page_bytes
                elif raw >> 62 & 1:
                    same = found.outcome is Outcome.NOT_PRESENT
                else:
                    same = found.outcome is Outcome.NOT_MAPPED
                if not same:
                    differing.append((process["pid"], address))
    # The reporter is a process itself: while it reports it writes to pages of its own.
    assert {pid for pid, _ in differing} <= {1}
    assert len(differing) <= 2


def test_every_present_page_against_drgn(sample: Sample) -> None:
    paging = walked(sample).paging
    if paging.architecture == "riscv64":
        pytest.skip("drgn 0.3 does not walk the tables of riscv64")
    for _, space in processes(sample):
        assert space.mm is not None
        mm = space.mm.object(sample.prog)
        for area in mapped(sample, space).ranges:
            if area.kind is not EntryClass.LEAF:
                continue
            for address in range(area.start, area.end, paging.levels[area.level].entry_span):
                found = walk_address(sample.prog, paging, space.root, address)
                assert found.permissions == area.permissions
                try:
                    expected = int(follow_phys(mm, address))
                except FaultError:
                    value = found.steps[-1].value
                    assert value is not None
                    # drgn goes by the hardware's valid bit alone.
                    assert paging.architecture == "s390x"
                    assert value & S390_PAGE_INVALID
                else:
                    assert found.physical == expected


def test_kernel_addresses_against_drgn(sample: Sample) -> None:
    paging, spaces, _, _ = walked(sample)
    if paging.architecture == "riscv64":
        pytest.skip("drgn 0.3 does not walk the tables of riscv64")
    assert spaces.kernel is not None
    init_mm = sample.prog["init_mm"].address_of_()
    for area in mapped(sample, spaces.kernel).ranges[:400]:
        if area.kind is EntryClass.LEAF:
            for address in (area.start, area.end - 1):
                found = walk_address(sample.prog, paging, spaces.kernel.root, address)
                try:
                    expected = int(follow_phys(init_mm, address))
                except FaultError:
                    # drgn reads 16 KiB at the address of a page table of s390, which has 2 KiB:
                    # the last tables of memory are out of its reach.
                    assert paging.architecture == "s390x"
                    with pytest.raises(FaultError):
                        sample.prog.read(found.steps[-1].table, 0x4000, True)
                else:
                    assert found.physical == expected


class PtdumpLine(NamedTuple):
    start: int
    end: int
    attributes: tuple[str, ...]


#: Start, end, on ppc64 the physical address of the start, size, and the rest.
PTDUMP_LINE = re.compile(r"0x([0-9a-f]+)-0x([0-9a-f]+)\s+(?:0x([0-9a-f]+)\s+)?\S+\s(.*)")

#: Words that are compared where not all of them are: level and permissions. The others are what
#: kind of memory it is, and what the hardware noted.
PTDUMP_WORDS = {
    "arm64": {"PTE", "PMD", "PUD", "PGD", "USR", "RW", "ro", "x", "NX", "UXN", "CON"},
    "ppc64": {"user", "r", "w", "X"},
}
#: Words of entries that the hardware does not see.
PTDUMP_HIDDEN = {"arm64": "F", "s390x": "I", "x86_64": "I"}


def ptdump_lines(text: str, paging: Paging) -> list[PtdumpLine]:
    """Get the mapped ranges of debugfs page_tables, neighbours of one kind joined."""
    architecture = paging.architecture
    lines: list[PtdumpLine] = []
    for line in text.splitlines():
        match = PTDUMP_LINE.match(line)
        if match is None:
            continue
        words = tuple(match[4].split())
        if architecture == "ppc64":
            mapped_here = "valid" in words and "pte" in words
        else:
            mapped_here = len(words) > 1 and PTDUMP_HIDDEN[architecture] not in words
        if not mapped_here:
            continue
        start, end = int(match[1], 16), int(match[2], 16)
        # ppc64 shows the last byte, the others what follows it.
        end = end + 1 if architecture == "ppc64" else end or 1 << 64
        kept = PTDUMP_WORDS.get(architecture)
        words = tuple(w for w in words if (w in kept if kept else w != "PSE"))
        append_joined(lines, PtdumpLine(start, end, words))
    return lines


def ptdump_physical(text: str) -> Iterator[tuple[int, int]]:
    """Get where ranges begin, and the physical address of that, where ptdump shows it."""
    for line in text.splitlines():
        match = PTDUMP_LINE.match(line)
        if match is not None and match[3] is not None and "valid" in match[4].split():
            yield int(match[1], 16), int(match[3], 16)


def append_joined(lines: list[PtdumpLine], line: PtdumpLine) -> None:
    if lines and lines[-1].end == line.start and lines[-1].attributes == line.attributes:
        line = PtdumpLine(lines.pop().start, line.end, line.attributes)
    lines.append(line)


def as_ptdump(paging: Paging, space_map: SpaceMap) -> list[PtdumpLine]:
    lines: list[PtdumpLine] = []
    for area in space_map.ranges:
        if area.kind is EntryClass.LEAF:
            words = ptdump_words(paging, area)
            append_joined(lines, PtdumpLine(area.start, area.end, words))
    return lines


def ptdump_words(paging: Paging, area: AddressRange) -> tuple[str, ...]:
    """Say what a range is in the words of the architecture's ptdump."""
    read = bool(area.permissions & Permission.READ)
    write = bool(area.permissions & Permission.WRITE)
    user = bool(area.permissions & Permission.USER)
    execute = bool(area.permissions & Permission.EXECUTE_KERNEL)
    level = paging.levels[area.level]
    if paging.architecture == "s390x":
        return (level.name, "RW" if write else "RO", "X" if execute else "NX")
    if paging.architecture == "ppc64":
        flags = {"user": user, "r": read, "w": write, "X": execute}
        return tuple(word for word, is_set in flags.items() if is_set)
    if paging.architecture == "arm64":
        flags = {
            level.name: True,
            "USR": user,
            "RW" if write else "ro": True,
            "x" if execute else "NX": True,
            "CON": area.page_bytes > level.entry_span,
            "UXN": not area.permissions & Permission.EXECUTE_USER,
        }
        return tuple(word for word, is_set in flags.items() if is_set)
    named = tuple(name for name in ("PWT", "PCD", "GLB") if name in area.attributes)
    words = ("USR",) if user else ()
    return (*words, "RW" if write else "ro", *named, "x" if execute else "NX", level.name.lower())


def test_kernel_map_against_debugfs(sample: Sample) -> None:
    """Every range of the kernel's own page-table dump, with its permissions and level."""
    texts = [text for name, text in sample.texts.items() if "current" not in name]
    if not texts:
        pytest.skip("this kernel has no page_tables in debugfs")
    (text,) = texts
    paging, spaces, _, _ = walked(sample)
    assert spaces.kernel is not None
    theirs = set(ptdump_lines(text, paging))
    ours = set(as_ptdump(paging, mapped(sample, spaces.kernel)))
    assert len(theirs) > 5
    assert theirs - ours == set()
    for address, physical in ptdump_physical(text):
        found = walk_address(sample.prog, paging, spaces.kernel.root, address)
        assert found.physical == physical
    # Of the espfix area, which repeats one page 65,536 times, x86 prints the first lines only.
    espfix = {0xFFFFFF0000000000 >> 39} if paging.architecture == "x86_64" else set()
    assert {line.start >> 39 for line in ours - theirs} <= espfix


def test_typed_pages_are_reached_or_deposited(sample: Sample) -> None:
    _, _, tables, census = walked(sample)
    paging = census.paging
    # Kernel PMD tables do not have the field.
    user = np.array([space.kind is SpaceKind.USER for space in tables.spaces])
    users = np.flatnonzero(user[tables.space] & (tables.first < 0))
    spare = deposits(sample.prog, paging, tables, users)
    # A page with fragments can have spare tables beside others that are reached.
    alone = {census.index_of_pfn(pfn) for pfn in spare} & set(census.unexplained().tolist())
    assert None not in {census.index_of_pfn(pfn) for pfn in spare}
    assert set(census.unexplained().tolist()) == alone
    assert not census.level_conflict.any()
    for level in census.levels():
        if not level.kernel and level.level < 2:
            assert not level.untyped
    assert int((census.holder == Holder.TREE).sum()) + len(alone) == len(sample.scan.pfns)
    assert census.nbytes() < 200 * len(tables)


def test_owners_of_a_shared_page(sample: Sample) -> None:
    """A page of the program itself is mapped at the same address by all processes that run it."""
    paging, spaces, tables, _ = walked(sample)
    init = spaces.of_pid(1)
    assert init is not None
    area = next(a for a in mapped(sample, init).ranges if a.kind is EntryClass.LEAF)
    assert area.physical is not None
    owners = page_owners(sample.prog, tables, area.physical)
    users = [o for o in owners if spaces.spaces[o.space].kind is SpaceKind.USER]
    assert len({owner.space for owner in users}) > 1
    for owner in owners:
        space = spaces.spaces[owner.space]
        found = walk_address(sample.prog, paging, space.root, owner.va, kernel=space.kernel)
        assert found.physical == area.physical
        assert found.steps[-1].entry_address == owner.entry_address
        assert found.permissions == owner.permissions


def made(sample: Sample, what: str) -> list[tuple[Space, int]]:
    """Get what the workload made of a kind: in which space, and where."""
    found = []
    for note in sample.truth["made"]:
        words = note["text"].split()
        if words[0] == what:
            space = walked(sample).spaces.of_pid(note["pid"])
            assert space is not None
            found.append((space, int(words[1], 16)))
    return found


def test_contiguous_entries_are_one_page(sample: Sample) -> None:
    pages = made(sample, "hugetlb-64k")
    if not pages:
        pytest.skip("the sample has no contiguous entries")
    (space, start), (other, folios) = *pages, *made(sample, "folios-64k")
    assert other is space
    size = 1 << 16
    # Of the last folio one page has other permissions.
    expected = {start + n * size: size for n in range(2)}
    expected.update({folios + n * size: size for n in range(3)})
    expected[folios + 3 * size] = walked(sample).paging.page_bytes
    for address, page_bytes in expected.items():
        (area,) = (a for a in mapped(sample, space).ranges if a.start <= address < a.end)
        assert area.kind is EntryClass.LEAF
        assert area.page_bytes == page_bytes


def test_hugetlb_mappings_share_a_table(sample: Sample) -> None:
    both = made(sample, "hugetlb")
    if not both:
        pytest.skip("the sample has no hugetlb pages")
    paging = walked(sample).paging
    steps = [walk_address(sample.prog, paging, space.root, at).steps[-1] for space, at in both]
    assert [step.level for step in steps] == [1, 1]
    assert len(steps) == 2
    # ppc64 has hugetlb pages, but no sharing of their tables.
    tables = {step.entry_address for step in steps}
    assert len(tables) == (2 if paging.architecture == "ppc64" else 1)
    for table in tables:
        pt = pfn_to_ptdesc(sample.prog, table // paging.page_bytes)
        try:
            shared = ptdesc_member(pt, "pt_share_count").counter.value_()
        except LookupError:
            continue  # this kernel does not count sharers, or counts them as references
        assert shared == 2 - len(tables)


def test_what_repeats_is_folded_and_nothing_else(sample: Sample) -> None:
    """Unfolded again, the ranges are the same; x86's ESPFIX area is one row."""
    kernel = walked(sample).spaces.kernel
    assert kernel is not None
    ranges = mapped(sample, kernel).ranges
    folded = list(fold_ranges(ranges))
    unfolded = [
        replace(first, start=first.start + n * distance, end=first.end + n * distance)
        for first, times, distance in folded
        for n in range(times)
    ]
    assert unfolded == list(ranges)
    espfix = [each for each in folded if each.times == 1 << 16]
    assert [each.distance for each in espfix] == [1 << 16] * ("espfix" in str(sample.texts).lower())


def test_text_is_folded_and_data_is_not(sample: Sample, capsys: pytest.CaptureFixture[str]) -> None:
    if sample.name != "x86_64-6.1":
        pytest.skip("one sample with an ESPFIX area is enough")
    ask = ["--sample", sample.name, "map", "kernel"]
    assert run(ask) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 100
    assert "--no-fold writes each" in text
    (row,) = (line.split() for line in text.splitlines() if " 65536 " in line)
    assert row[-2:] == ["65536", "64"]
    assert run([*ask, "--no-fold"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 1 << 16
    assert run([*ask, "--format", "csv"]) == 0
    whole = capsys.readouterr().out.splitlines()
    assert len(whole) > 1 << 16
    assert "times" not in whole[0]
