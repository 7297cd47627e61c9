# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Page frames to struct pages and back, with holes between the sections."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ptinspect.tables import memmap
from ptinspect.tables.scan import PageRange


class FakeProgram:
    def type(self, name: str) -> str:
        return name

    def __getitem__(self, name: str) -> SimpleNamespace:
        assert name == "PAGE_SHIFT"
        return SimpleNamespace(value_=lambda: 12)


@pytest.fixture
def two_sections(monkeypatch: pytest.MonkeyPatch) -> memmap.Memmap:
    """Pages 0x10 to 0x1f and 0x100 to 0x107, their struct pages in the other order."""
    ranges = [PageRange(0x100, 0x108, 0x1000), PageRange(0x10, 0x20, 0xFFFF8000)]
    monkeypatch.setattr(memmap, "memmap_ranges", lambda prog: ranges)
    monkeypatch.setattr(memmap, "sizeof", lambda type_: 64)
    return memmap.Memmap(FakeProgram())  # type: ignore[arg-type]


def test_there_and_back(two_sections: memmap.Memmap) -> None:
    pfns = np.array([0x10, 0x1F, 0x100, 0x107], np.uint64)
    addresses, known = two_sections.addresses(pfns)
    assert known.all()
    assert addresses.tolist() == [0xFFFF8000, 0xFFFF83C0, 0x1000, 0x11C0]
    again, known = two_sections.pfns(addresses)
    assert known.all()
    assert again.tolist() == pfns.tolist()
    by_address, known = two_sections.pages_of(pfns << np.uint64(12))
    assert known.all()
    assert by_address.tolist() == addresses.tolist()


def test_what_is_no_page(two_sections: memmap.Memmap) -> None:
    pfns = np.array([0, 0xF, 0x20, 0xFF, 0x108, (1 << 64) - 1], np.uint64)
    assert not two_sections.addresses(pfns)[1].any()
    wrong = [0, 0xFFF, 0x1001, 0x1200, 0xFFFF7FC0, 0xFFFF8400, (1 << 64) - 64]
    assert not two_sections.pfns(np.array(wrong, np.uint64))[1].any()
    assert not len(two_sections.pfns(np.empty(0, np.uint64))[0])
