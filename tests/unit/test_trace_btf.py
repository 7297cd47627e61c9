# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""BTF, made up of a few types, in both byte orders."""

import struct

import pytest

from ptinspect.errors import TargetError
from ptinspect.trace.btf import read_btf


def made_up(order: str) -> bytes:
    names = ["", "int", "mm", "val", "__pmd_alloc", "batch", "nr", "node_stat_item", "NR_PAGETABLE"]
    strings = b"\0".join(name.encode() for name in names) + b"\0"
    at = {name: strings.index(b"\0" + name.encode() + b"\0") + 1 for name in names[1:]}

    def record(name: str, kind: int, count: int, ref: int, *rest: int) -> bytes:
        head = (at.get(name, 0), kind << 24 | count, ref)
        return struct.pack(f"{order}{3 + len(rest)}I", *head, *rest)

    types = b"".join(
        [
            record("int", 1, 0, 4, 32),  # 1: int
            record("", 13, 2, 1, at["mm"], 1, at["val"], 1),  # 2: its prototype
            record("__pmd_alloc", 12, 1, 2),  # 3: the function
            record("batch", 4, 2, 8, at["mm"], 1, 0, at["nr"], 1, 32),  # 4: a structure
            record("", 3, 0, 0, 1, 1, 4),  # 5: an array
            record("node_stat_item", 6, 1, 4, at["NR_PAGETABLE"], 38),  # 6: an enumeration
            record("val", 14, 0, 1, 0),  # 7: a variable
            record("nr", 17, 0, 1, 0),  # 8: a tag
        ]
    )
    head = struct.pack(f"{order}HBB5I", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    return head + types + strings


@pytest.mark.parametrize("order", ["<", ">"])
def test_names(order: str) -> None:
    found = read_btf(made_up(order), ["__pmd_alloc", "absent"], ["batch"], ["NR_PAGETABLE"])
    assert found.functions == {"__pmd_alloc": ("mm", "val")}
    assert found.structs == {"batch": ("mm", "nr")}
    assert found.enumerators == {"NR_PAGETABLE": 38}


@pytest.mark.parametrize("order", ["<", ">"])
def test_every_truncation_is_one_error_or_an_answer(order: str) -> None:
    whole = made_up(order)
    for length in range(len(whole)):
        try:
            read_btf(whole[:length], ["__pmd_alloc"], ["batch"], ["NR_PAGETABLE"])
        except TargetError:
            continue
