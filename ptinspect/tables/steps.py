# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The descriptors of the tables that one address is translated through."""

from __future__ import annotations

from dataclasses import dataclass

from drgn import FaultError, Program
from drgn.helpers.linux.mm import compound_head, pfn_to_page

from ptinspect.kernel.descriptor import page_is_pgtable
from ptinspect.tables.lookup import Step, Translation


@dataclass(frozen=True)
class DescribedStep:
    """One step of a translation with the descriptor of its table."""

    step: Step
    #: Address of the descriptor; ``None`` if the struct page cannot be read.
    ptdesc: int | None
    #: Whether the page is typed as a page table; ``None`` if that cannot be read.
    typed: bool | None


def describe_steps(prog: Program, translation: Translation) -> list[DescribedStep]:
    """Find the descriptor of every table that a translation went through."""
    described = []
    shift = int(prog["PAGE_SHIFT"].value_())
    for step in translation.steps:
        try:
            page = compound_head(pfn_to_page(prog, step.table >> shift)).read_()
            described.append(DescribedStep(step, int(page.value_()), page_is_pgtable(page)))
        except FaultError:
            described.append(DescribedStep(step, None, None))
    return described
