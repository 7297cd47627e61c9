# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stock kernels whose live memory is damaged: it is found, and gone when the damage is undone."""

from __future__ import annotations

import pytest
from opened import Sample
from real_damage import WRONGS, run_on, strike
from resting import Running

from ptinspect.checks import run_checks

pytestmark = pytest.mark.guest


def test_damage_is_found_while_it_lasts(running: Running, sample: Sample) -> None:
    """Silent before; each damage found at the right address, the guest having run on; silent."""
    prog, guest = sample.prog, running.guest
    assert run_checks(prog).findings == ()
    outcomes = [strike(guest, prog, wrong) for wrong in WRONGS]
    assert {o.wrong.name: o.why for o in outcomes if o.caught is False} == {}
    assert {o.wrong.name: o.left for o in outcomes if o.left} == {}
    # On every kernel at least these can be done.
    done = {o.wrong.name for o in outcomes if o.caught}
    assert done >= {"leaked table", "table linked twice", "wrong pgtables_bytes"}
    if running.kernel.arch.name == "x86_64":
        assert done >= {"stale pmd_huge_pte", "wrong pt_mm", "broken list of tables"}
    if running.kernel.arch.name == "ppc64le":
        assert "wrong pt_frag_refcount" in done
    # The kernel has noticed nothing, and lives; without a tick while it has nothing to do.
    before = int(prog["jiffies"])
    for _ in range(100):
        run_on(guest)
        if int(prog["jiffies"]) != before:
            break
    assert int(prog["jiffies"]) > before
    said = running.guest.console()
    assert [line for line in said.splitlines() if "BUG:" in line or "Bad page" in line] == []
