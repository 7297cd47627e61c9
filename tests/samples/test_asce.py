# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""s390's address-space-control elements against the processes, the CPUs, and corruption."""

from __future__ import annotations

import pytest
from drgn import Object
from opened import Sample
from overlay import Overlay

from ptinspect.cli.spaces import choose_space
from ptinspect.errors import UsageError
from ptinspect.faces.gmap import asces_report
from ptinspect.state.asce import Asce, Asces, read_asces
from ptinspect.tables.spaces import SpaceKind, find_spaces


def asces(sample: Sample) -> Asces:
    return read_asces(sample.prog, find_spaces(sample.prog, slab=False).spaces)


@pytest.fixture
def s390(sample: Sample) -> Sample:
    if sample.truth["kernel"]["arch"] != "s390x":
        found = asces(sample)
        assert found.absent is not None
        report = asces_report(found, sample.name)
        assert report.notes == [f"Not applicable: {found.absent}."]
        pytest.skip("only s390 has ASCEs")
    return sample


def named(found: Asces, name: str) -> Asce:
    (asce,) = [asce for asce in found.asces if asce.name.split("/")[0] == name]
    return asce


def test_all_agree(s390: Sample) -> None:
    found = asces(s390)
    assert found.missing == ()
    assert [asce.problems for asce in found.asces if asce.problems] == []
    mms = [asce for asce in found.asces if asce.kind == "mm"]
    assert len({asce.pgd for asce in mms}) == len(mms)
    cpus = [asce.name for asce in found.asces if asce.kind == "user"]
    assert cpus == [f"cpu {cpu}" for cpu in range(s390.truth["cpus"])]


def test_an_upgraded_space_has_more_levels(s390: Sample) -> None:
    """The process with mappings above 8 PiB, and one that has none above 4 TiB."""
    found = asces(s390)
    high, plain = named(found, "high"), named(found, "sparse")
    assert (high.level, high.limit) == ("PGD", (1 << 64) - 4096)
    assert (plain.level, plain.limit) == ("PUD", 1 << 42)
    for asce in (high, plain):
        space = choose_space(s390.prog, f"asce:{asce.value:x}")
        assert space.kind is SpaceKind.ASCE
        assert space.root.address == asce.pgd
    with pytest.raises(UsageError, match="real space"):
        choose_space(s390.prog, "asce:20")


def test_corruption_is_told(s390: Sample) -> None:
    prog, overlay = s390.prog, Overlay(s390.prog)
    space = find_spaces(prog, slab=False).of_pid(1)
    assert space is not None
    assert space.mm is not None
    context = space.mm.object(prog).context
    asce = int(context.asce.value_())
    for value in (asce + 0x4000, asce ^ 0x4, asce & ~3):
        with overlay.value_of(context.asce, value):
            assert named(asces(s390), "init").problems
            assert asces_report(asces(s390), s390.name).findings
    for limit in (1 << 53, 12345):
        with overlay.value_of(context.asce_limit, limit):
            assert named(asces(s390), "init").problems
    lowcore = prog["lowcore_ptr"][1]
    for member in (lowcore.kernel_asce, lowcore.user_asce):
        word = Object(prog, "unsigned long", address=member.address_of_().value_())
        with overlay.value_of(word, int(word.value_()) + 0x8000):
            told = [asce for asce in asces(s390).asces if asce.problems]
            assert [asce.name for asce in told] == ["cpu 1"]
