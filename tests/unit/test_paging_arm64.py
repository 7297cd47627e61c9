# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where an arm64 kernel has its image and its roots, for every size of page and address."""

from __future__ import annotations

import pytest
from drgn import (
    Architecture,
    Object,
    Platform,
    Program,
    Symbol,
    SymbolBinding,
    SymbolKind,
    TypeMember,
)
from synthetic_memory import LITTLE

from ptinspect.kernel.paging import MmFields, Root, aarch64

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


SWAPPER = 0xFFFF_C000_8000_4000
TRAMPOLINE = 0xFFFF_C000_8000_0000
INIT_MM = 0xFFFF_C000_9000_0000


def kernel_with_trampoline(first_entry: int, *, named: bool = True) -> Program:
    """A kernel with 16K pages whose ``tramp_pg_dir`` has this entry at its end."""
    prog = Program(Platform(Architecture.AARCH64, LITTLE))
    prog.set_linux_kernel_custom(
        f"OSRELEASE=7.2.0\nPAGESIZE=16384\nNUMBER(kimage_voffset)={OFFSET:#x}\n"
        f"SYMBOL(swapper_pg_dir)={SWAPPER:x}\n",
        False,
    )
    word = prog.int_type("unsigned long", 8, False)
    pgd = TypeMember(prog.pointer_type(word), "pgd")
    mm = prog.struct_type("mm_struct", 8, (pgd,))

    def find(_: Program, name: str, flags: object, filename: object) -> Object | None:
        return Object(prog, mm, address=INIT_MM) if name == "init_mm" else None

    def find_symbol(_: Program, name: str | None, *__: object) -> list[Symbol]:
        if not named or name != "tramp_pg_dir":
            return []
        return [Symbol(name, TRAMPOLINE, 1 << 14, SymbolBinding.GLOBAL, SymbolKind.OBJECT)]

    prog.register_object_finder("mock", find, enable_index=0)
    prog.register_symbol_finder("mock", find_symbol, enable_index=0)
    table = bytes((1 << 14) - 8) + first_entry.to_bytes(8, "little")
    for address, data, physical in (
        (TRAMPOLINE - OFFSET, table, True),
        (INIT_MM, SWAPPER.to_bytes(8, "little"), False),
    ):
        prog.add_memory_segment(
            address, len(data), lambda _, n, at, __, data=data: data[at : at + n], physical
        )
    return prog


def test_the_root_of_user_mode_is_the_trampoline() -> None:
    """With the kernel unmapped in user mode there is one more root, the same for all processes."""
    paging = aarch64.make_paging(page_shift=14, va_bits=47)
    kernel = MmFields(INIT_MM, SWAPPER - OFFSET, 0, False)
    prog = kernel_with_trampoline(0x44430003)
    base = (1 << 64) - (1 << 47)
    root = paging.isolated_root(prog, kernel)
    assert root == Root(TRAMPOLINE - OFFSET, 2, ((0, 2048),), base)
    assert paging.kernel_root(prog) == Root(SWAPPER - OFFSET, 2, ((0, 2048),), base)
    assert paging.isolated_root(prog, kernel._replace(address=INIT_MM + 8)) is None


@pytest.mark.parametrize(("entry", "named"), [(0, True), (0x44430003, False)])
def test_without_isolation_there_is_no_such_root(entry: int, named: bool) -> None:
    paging = aarch64.make_paging(page_shift=14, va_bits=47)
    prog = kernel_with_trampoline(entry, named=named)
    assert paging.isolated_root(prog, MmFields(INIT_MM, SWAPPER - OFFSET, 0, False)) is None
