# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each invariant can fail: broken on each sample, found at the right address; and documented so."""

from __future__ import annotations

from corruptions import CORRUPTIONS, RETYPINGS
from matrix import DOCUMENT, matrix, reference
from opened import Sample

from ptinspect.checks import invariants, run_checks


def test_every_invariant_has_a_corruption() -> None:
    assert {one.id for one in invariants()} == {*CORRUPTIONS, *RETYPINGS}


def documented(name: str) -> dict[str, str]:
    """Get a sample's column of the table in the document."""
    lines = DOCUMENT.read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| invariant | arm64"))
    head = [cell.strip() for cell in lines[start].split("|")]
    rows = (line.split("|") for line in lines[start + 2 :] if line.startswith("| `"))
    return {row[1].strip(" `"): row[head.index(name)].strip() for row in rows}


def test_every_corruption_is_found(sample: Sample) -> None:
    cells = matrix(sample.prog, sample.name)
    assert {id: cell.why for id, cell in cells.items() if cell.caught is False} == {}
    words = {id: "-" if cell.caught is None else "caught" for id, cell in cells.items()}
    told = documented(sample.name)
    assert {id: word for id, word in told.items() if id in cells} == words
    # Mended again.
    assert not run_checks(sample.prog).findings


def test_the_list_of_invariants_is_up_to_date() -> None:
    """If not: scripts/invariants."""
    assert "\n".join(reference()) in DOCUMENT.read_text()
