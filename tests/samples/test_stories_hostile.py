# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Random words where lists, deposits, owners and sharing look: their commands end, soon, with an
answer.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace

import pytest
from drgn import FaultError
from drgn.helpers.linux.mm import vma_find
from hostile import limited
from opened import Sample
from overlay import Overlay
from test_walk import walked

from ptinspect.census import Census
from ptinspect.cli.output import emit
from ptinspect.errors import ExitStatus
from ptinspect.faces.deposits import deposits_report
from ptinspect.faces.lists import lists_report, pgd_report
from ptinspect.faces.sharing import sharing_report
from ptinspect.kernel.direct_map import physical_to_virtual
from ptinspect.listing import Listing
from ptinspect.state.stories import Stories

CASES = 60

#: Words that mean something, are just above or below it, or wrap around.
_ODD = (
    0,
    1,
    2,
    0x1234,
    0xDEAD000000000100,
    0xDEAD000000000122,
    *((1 << 64) - n for n in (1, 8, 16)),
)


def words(address: int, count: int) -> list[int]:
    return [address + 8 * n for n in range(count)]


def places(sample: Sample) -> Iterator[int]:
    """Addresses of words that the stories read; those of lists more than once."""
    prog, tables, census = sample.prog, walked(sample).tables, walked(sample).census
    stories = census.stories
    for ptdesc in stories.pmd_tables.ptdescs.tolist():
        yield from words(ptdesc, 8)
    for ring in stories.deposits.rings:
        yield from [(ring.ptdesc or 0) + 16] * 30
        for table in ring.tables:
            index = census.index_of_pfn(table // tables.paging.page_bytes)
            assert index is not None
            yield from words(int(sample.scan.addresses[index]), 8)
            if stories.deposits.node_in_table:
                yield from words(physical_to_virtual(prog, table), 2) * 6
    for found in stories.lists.lists:
        yield from words(found.head, 2) * 8
        for ptdesc in found.ptdescs:
            yield from words(ptdesc + 8, 4)
    for shared in stories.sharing.tables:
        for sharer in shared.sharers:
            space = tables.spaces[sharer.space]
            assert space.mm is not None
            mm = space.mm.object(prog)
            vma = vma_find(mm, sharer.va)
            path = vma.vm_file.f_path
            for thing in (mm, vma, vma.vm_file, path.dentry, path.mnt):
                yield from words(thing.value_(), 24)


def answers(census: Census) -> Iterator[int]:
    """Ask all that the stories answer: exit statuses of the commands."""
    for report in (
        lists_report(census, "x", nodes=True),
        pgd_report(census, "x", racing=False),
        deposits_report(census, "x", racing=False, each=True, space=None),
        sharing_report(census, "x", racing=False),
    ):
        with redirect_stdout(io.StringIO()):
            yield emit(report, "text")
    listing = Listing(census.stories.prog, census.scan, census)
    for name in ("role", "deposits", "deposits_needed"):
        listing.column(name)
    for index in range(0, len(census.scan.pfns), 50):
        census.stories.told(int(census.scan.pfns[index]), int(census.scan.addresses[index]))


@pytest.mark.parametrize("seed", range(3))
def test_random_words(sample: Sample, seed: int) -> None:
    chance = random.Random(f"{sample.name} {seed}")
    overlay = Overlay(sample.prog)
    every = list(places(sample))
    statuses = set()
    for _ in range(CASES // 3):
        with ExitStack() as stack:
            for _ in range(chance.randint(1, 3)):
                at = chance.choice(every)
                other = chance.choice(every)
                value = chance.choice((*_ODD, other, other - 8, at, at - 8, chance.getrandbits(64)))
                try:
                    stack.enter_context(overlay.word_at(at, value))
                except FaultError:
                    continue  # what the dump lacks cannot be damaged
            stories = Stories(sample.prog, walked(sample).tables, sample.scan)
            with limited(20):
                statuses.update(answers(replace(walked(sample).census, stories=stories)))
    assert statuses <= {ExitStatus.OK, ExitStatus.FINDINGS, ExitStatus.INCOMPLETE}
