# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""How struct ptdesc lies over struct page."""

from __future__ import annotations

from collections.abc import Iterator

from ptinspect.checks.context import Context
from ptinspect.checks.model import Finding, NotApplicableError, Severity, Tally
from ptinspect.checks.registry import invariant
from ptinspect.kernel.layout import ptdesc_layout


@invariant(
    "table-match",
    severity=Severity.CORRUPTION,
    applies="kernels that have struct ptdesc (6.6 and later)",
    source="TABLE_MATCH() in include/linux/mm_types.h",
    false_positives="none: the kernel asserts the same when it is built",
    breaks="debug information of another build; a change of struct page that was not followed",
)
def table_match(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    The members of struct ptdesc lie where the members of struct page lie that they stand for.

    Otherwise each writes over what the other keeps there.
    """
    layout = ptdesc_layout(context.prog)
    if not layout.native:
        raise NotApplicableError("this kernel has no struct ptdesc: the overlay is built from page")
    # The pairs of the June 2023 patch are shown by `layout`; kernels since decided otherwise.
    pairs = [match for match in layout.matches if match.source == "kernel"]
    tally.examine(len(pairs) + 1)
    for match in pairs:
        if match.verdict == "MISMATCH":
            yield Finding(
                "type",
                match.ptdesc_offset or 0,
                f"ptdesc.{match.ptdesc_member} does not lie over page.{match.page_member}",
                (
                    ("ptdesc_offset", match.ptdesc_offset or 0),
                    ("page_offset", match.page_offset or 0),
                ),
                look="layout",
            )
    if not layout.size_fits:
        yield Finding(
            "type",
            layout.ptdesc_size,
            "struct ptdesc is larger than struct page",
            (("ptdesc_size", layout.ptdesc_size), ("page_size", layout.page_size)),
            look="layout",
        )
