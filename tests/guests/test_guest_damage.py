# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels whose live memory is damaged: it is found, and gone when the damage is undone."""

from __future__ import annotations

from pathlib import Path

import pytest
from opened import Sample
from real_damage import WRONGS, ask_all, complaints, run_on, strike
from resting import Running

from ptinspect.checks import run_checks

pytestmark = pytest.mark.guest


def possible(running: Running, sample: Sample) -> set[str]:
    """What can go wrong with this kernel."""
    names = {"leaked table", "table linked twice", "wrong pgtables_bytes", "stale pmd_huge_pte"}
    arch = running.kernel.arch.name
    if arch == "x86_64":
        names |= {"wrong pt_mm", "broken list of tables"}
    if arch == "ppc64le":
        names.add("wrong pt_frag_refcount")
    if arch == "s390x":
        context = sample.prog.type("struct mm_struct").member("context").type
        if context.has_member("pgtable_list"):
            names.add("broken list of tables")
        # Only the lab's own kernels have guests; since 7.0 their tables bear no address.
        if any("gmap" in each["text"] for each in running.truth["made"]):
            names |= {"wrong pt_index of a gmap"} if sample.name < "7" else set()
    return names


def test_damage_is_found_while_it_lasts(running: Running, sample: Sample) -> None:
    """Silent before; each damage found at the right address, the guest having run on; silent."""
    prog, guest = sample.prog, running.guest
    assert run_checks(prog).findings == ()
    outcomes = [strike(guest, prog, wrong) for wrong in WRONGS]
    assert {o.wrong.name: o.why for o in outcomes if o.caught is False} == {}
    assert {o.wrong.name: o.left for o in outcomes if o.left} == {}
    assert {o.wrong.name for o in outcomes if o.caught} >= possible(running, sample)
    # The kernel has noticed nothing, and lives; without a tick while it has nothing to do.
    before = int(prog["jiffies"])
    for _ in range(100):
        run_on(guest)
        if int(prog["jiffies"]) != before:
            break
    assert int(prog["jiffies"]) > before
    assert complaints(prog) == []


def test_all_of_it_in_a_dump(running: Running, sample: Sample, tmp_path: Path) -> None:
    """Everything wrong at once: the command finds all of it, over QMP and in the dump."""
    forms = ["kdump-zlib" if running.kernel.arch.name == "x86_64" else "elf"]
    vmlinux = running.kernel.vmlinux
    answers = ask_all(running.guest, sample.prog, vmlinux, tmp_path / "core", forms)
    assert answers.missed() == []
    assert {wrong.name for wrong, _ in answers.done} >= possible(running, sample)
    assert list(answers.found) == ["QMP", *forms]
    run_on(running.guest)
    assert run_checks(sample.prog).findings == ()
