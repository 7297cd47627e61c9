# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Guests with guests: small kernels whose KVM starts without SIE, over QMP and from their dumps.

The questions are those that the samples are asked; on top of that, guest memory is there to be
read, and every way of looking at one stopped guest has to give the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from opened import Sample
from resting import Running
from test_asce import test_all_agree, test_an_upgraded_space_has_more_levels
from test_gmap import (
    census,
    test_guest_memory_is_what_the_process_wrote,
    test_guest_pages_are_the_pages_of_the_process,
    test_lists_and_trees_as_drgn_reads_them,
    test_nothing_disagrees,
    test_own_tables_are_not_typed_and_bear_their_guest_address,
    test_pgstes_of_guest_pages,
    test_segments_that_were_not_faulted_have_no_table,
    test_shadows_lead_to_the_pages_of_their_parent,
    test_slots_are_those_that_were_set,
    test_the_census_counts_guests_apart,
)
from test_guest_damage import test_all_of_it_in_a_dump, test_damage_is_found_while_it_lasts

from lab.errors import MissingToolError
from lab.guest import Guest, booted
from lab.initramfs import workload_initramfs
from lab.kernels import built_kernel
from lab.truth import parse_report
from ptinspect.state.asce import read_asces
from ptinspect.state.gmap import read_gmaps
from ptinspect.tables.spaces import find_spaces
from ptinspect.target import TargetOptions, open_target

pytestmark = pytest.mark.guest

__all__ = (
    "census",
    "test_all_agree",
    "test_all_of_it_in_a_dump",
    "test_an_upgraded_space_has_more_levels",
    "test_damage_is_found_while_it_lasts",
    "test_guest_memory_is_what_the_process_wrote",
    "test_guest_pages_are_the_pages_of_the_process",
    "test_lists_and_trees_as_drgn_reads_them",
    "test_nothing_disagrees",
    "test_own_tables_are_not_typed_and_bear_their_guest_address",
    "test_pgstes_of_guest_pages",
    "test_segments_that_were_not_faulted_have_no_table",
    "test_shadows_lead_to_the_pages_of_their_parent",
    "test_slots_are_those_that_were_set",
    "test_the_census_counts_guests_apart",
)


@pytest.fixture(scope="module", params=["s390x-6.1", "s390x-6.12", "s390x-7.3"])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    """A guest with one of the small kernels, if that was built before."""
    kernel = built_kernel(request.param)
    if kernel is None:
        pytest.skip(f"the kernel is not built: scripts/lab build {request.param}")
    try:
        initrd = workload_initramfs(kernel.arch, kernel.modules)
    except MissingToolError as error:
        pytest.skip(str(error))

    def make() -> Guest:
        return Guest(kernel.arch, kernel.image, initrd, memory=256, smp="2", stub=True)

    with booted(make, "@@ready", timeout=600) as guest:
        yield Running(guest, kernel, *parse_report(guest.console()))


@pytest.fixture
def s390(sample: Sample) -> Sample:
    return sample


@pytest.mark.parametrize("form", ["elf", "kdump-zlib"])
def test_the_same_from_a_dump(running: Running, sample: Sample, tmp_path: Path, form: str) -> None:
    """Every record of every guest and ASCE, from the stopped guest and from its dump."""
    core = tmp_path / "core"
    running.guest.dump(core, form)
    spaces = find_spaces(sample.prog).spaces
    guests = read_gmaps(sample.prog, spaces)
    assert len(guests.gmaps) > 5
    symbols = (running.kernel.vmlinux,)
    with open_target(TargetOptions(core=core, symbols=symbols)) as target:
        prog = target.prog
        found = find_spaces(prog).spaces
        assert found == spaces
        assert read_gmaps(prog, found) == guests
        assert read_asces(prog, found) == read_asces(sample.prog, spaces)
