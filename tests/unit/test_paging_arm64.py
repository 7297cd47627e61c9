# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which addresses of an arm64 kernel belong to its image, for every size of page and address."""

from __future__ import annotations

import pytest
from drgn import Architecture, Platform, Program
from synthetic_memory import LITTLE

from ptinspect.kernel.paging import aarch64

OFFSET = 0xFFFF_7FFF_C000_0000
ANSWER = 0x1234_5000


@pytest.mark.parametrize(
    ("page_shift", "va_bits", "least"),
    [
        *((12, 39, 39), (12, 48, 48), (12, 52, 48)),
        *((14, 47, 47), (14, 48, 48), (14, 52, 47)),
        *((16, 42, 42), (16, 48, 48), (16, 52, 48)),
    ],
)
def test_the_direct_map_ends_where_the_image_begins(
    page_shift: int, va_bits: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prog = Program(Platform(Architecture.AARCH64, LITTLE))
    note = (
        f"OSRELEASE=7.3.0\nPAGESIZE={1 << page_shift}\nNUMBER(kimage_voffset)={OFFSET:#x}\n"
        f"SYMBOL(swapper_pg_dir)={(1 << 64) - 8:x}\n"
    )
    prog.set_linux_kernel_custom(note, False)
    monkeypatch.setattr(aarch64, "virt_to_phys", lambda prog, address: ANSWER)
    paging = aarch64.make_paging(page_shift=page_shift, va_bits=va_bits, lpa2=va_bits == 52)
    page_end = (1 << 64) - (1 << (least - 1))
    assert paging.virtual_to_physical(prog, page_end - 8) == ANSWER
    assert paging.virtual_to_physical(prog, page_end) == page_end - OFFSET & ((1 << 64) - 1)
