# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What single entries are, against the kernel's own predicates.

The predicates are written here as the kernel's headers have them, one entry at a time.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_memory import MODES, Mode

from ptinspect.kernel.paging import (
    EntryClass,
    Paging,
    Permission,
    aarch64,
    ppc64,
    riscv64,
    s390x,
    x86_64,
)
from ptinspect.kernel.paging.model import PLAIN_SWAP

X86 = x86_64.make_paging(five_levels=True)
S390_OLD = s390x.make_paging(present_bits=False)
S390_NEW = s390x.make_paging(present_bits=True)
PPC = ppc64.make_paging(page_shift=16)
ARM_OLD = aarch64.make_paging(page_shift=12, va_bits=48, present_invalid=aarch64.OLD_PROT_NONE)
ARM_NEW = aarch64.make_paging(page_shift=12, va_bits=48)
RISCV = riscv64.make_paging(va_bits=48)

#: Entries with few bits set or clear, as well as any number.
entries = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sets(st.integers(0, 63), max_size=6).map(lambda bits: sum(1 << bit for bit in bits)),
)


def classify(paging: Paging, value: int, level: int) -> EntryClass:
    return EntryClass(int(paging.classify(np.array([value], np.uint64), level)[0]))


def target(paging: Paging, value: int, level: int, index: int = 0) -> int:
    return int(paging.leaf_targets(np.array([value], np.uint64), level, np.array([index]))[0])


def permissions(paging: Paging, value: int, level: int, leaf: bool) -> Permission:
    return Permission(int(paging.permissions(np.array([value], np.uint64), level, leaf=leaf)[0]))


@given(entries)
def test_x86_pte(value: int) -> None:
    none = value & ~0x60 == 0
    present = bool(value & 0x101)
    kind = classify(X86, value, 0)
    if none:
        assert kind is EntryClass.NONE
    elif present:
        assert kind is (EntryClass.LEAF if value & 1 else EntryClass.PROT_NONE)
    else:
        assert kind is EntryClass.SWAP


@given(entries)
def test_x86_pmd(value: int) -> None:
    kind = classify(X86, value, 1)
    present = bool(value & 0x181)
    if value & ~0x60 == 0:
        assert kind is EntryClass.NONE
    elif not present:
        assert kind is EntryClass.SWAP
    elif value & 0x80:
        assert kind is (EntryClass.LEAF if value & 1 else EntryClass.PROT_NONE)
    else:
        assert kind is (EntryClass.TABLE if value & 1 else EntryClass.BAD)


@given(entries)
def test_s390_pte(value: int) -> None:
    kind = classify(S390_OLD, value, 0)
    if value == 0x400:
        assert kind is EntryClass.NONE
    elif value & 1:
        assert kind is (EntryClass.LEAF if value & 0x10 else EntryClass.PROT_NONE)
    elif not value & 0x400:
        assert kind is EntryClass.LEAF
    elif value & 0x201 == 0x200:
        assert kind is EntryClass.SWAP
    else:
        assert kind is EntryClass.BAD


@given(entries, st.booleans())
def test_s390_segment(value: int, present_bits: bool) -> None:
    kind = classify(S390_NEW if present_bits else S390_OLD, value, 1)
    if value == 0x20:
        assert kind is EntryClass.NONE
    elif present_bits and value & 0x11 == 0x10:
        assert kind is EntryClass.SWAP
    elif value & 0xC:
        assert kind is EntryClass.BAD
    elif value & 0x400:
        read = 0x4000 if present_bits else 0x1
        assert kind is (EntryClass.LEAF if value & read else EntryClass.PROT_NONE)
    else:
        assert kind is (EntryClass.BAD if value & 0x20 else EntryClass.TABLE)


@given(entries)
def test_ppc64_pte(value: int) -> None:
    kind = classify(PPC, value, 0)
    present, pte, invalid = value >> 63 & 1, value >> 62 & 1, value >> 61 & 1
    if value & ~0x180 == 0:
        assert kind is EntryClass.NONE
    elif present and pte:
        assert kind is (EntryClass.LEAF if value & 7 else EntryClass.PROT_NONE)
    elif pte:
        assert kind is (EntryClass.PROT_NONE if invalid else EntryClass.SWAP)
    else:
        assert kind is EntryClass.BAD


@given(entries)
def test_ppc64_directory_entry_must_tell_the_size_of_its_table(value: int) -> None:
    kind = classify(PPC, value, 1)
    if value >> 62 == 2:
        assert kind is (EntryClass.TABLE if value & 0x1F == 5 else EntryClass.BAD)


@given(entries, st.booleans())
def test_arm64_pte(value: int, old: bool) -> None:
    kind = classify(ARM_OLD if old else ARM_NEW, value, 0)
    hidden = value >> (58 if old else 11) & 1
    if value == 0:
        assert kind is EntryClass.NONE
    elif value & 1:
        assert kind is (EntryClass.LEAF if value & 2 else EntryClass.BAD)
    else:
        assert kind is (EntryClass.PROT_NONE if hidden else EntryClass.SWAP)


@given(entries)
def test_riscv_pte_and_pmd(value: int) -> None:
    for level in (0, 1):
        kind = classify(RISCV, value, level)
        if value == 0:
            assert kind is EntryClass.NONE
        elif value & 1:
            no_leaf = EntryClass.TABLE if level else EntryClass.BAD
            assert kind is (EntryClass.LEAF if value & 0xE else no_leaf)
        elif value & 0x20 or (level and value & 2):
            assert kind is EntryClass.PROT_NONE
        else:
            assert kind is EntryClass.SWAP


@pytest.mark.parametrize("mode", MODES, ids=str)
@given(value=entries)
def test_usual_leaf_and_empty_are_what_the_rules_say(mode: Mode, value: int) -> None:
    """The counting by whole tables must not differ from the rules."""
    for number, level in enumerate(mode.paging.levels):
        assert classify(mode.paging, level.empty, number) is EntryClass.NONE
        if level.usual_leaf is not None:
            forced = value & ~level.usual_leaf.mask | level.usual_leaf.value
            assert classify(mode.paging, forced, number) is EntryClass.LEAF
        if level.usual_leaf is not None and value & level.usual_leaf.mask == level.usual_leaf.value:
            assert classify(mode.paging, value, number) is EntryClass.LEAF


@pytest.mark.parametrize(
    ("paging", "level", "make"),
    [
        (X86, 0, lambda type_: type_ << 59 | 0x1234_5600),
        (S390_OLD, 0, lambda type_: 0x12345000 | 0x600 | type_ << 2),
        (S390_NEW, 1, lambda type_: 0x12345000 | 0x30 | type_ << 6),
        (PPC, 0, lambda type_: 1 << 62 | 0x120000 | type_),
        (ARM_OLD, 0, lambda type_: 0x12300 | type_ << 3),
        (ARM_NEW, 0, lambda type_: 0x123000 | type_ << 6),
        (RISCV, 0, lambda type_: 0x123000 | type_ << 7),
    ],
)
def test_swap_types(paging: Paging, level: int, make: object) -> None:
    from dataclasses import replace

    kinds = list(PLAIN_SWAP)
    kinds[27:] = [
        EntryClass.SPECIAL,
        EntryClass.MIGRATION,
        EntryClass.MIGRATION,
        EntryClass.MIGRATION,
        EntryClass.MARKER,
    ]
    paging = replace(paging, swap_classes=tuple(kinds))
    for type_ in range(32):
        assert classify(paging, make(type_), level) is kinds[type_]  # type: ignore[operator]


def test_x86_hidden_addresses_are_inverted() -> None:
    mask = (1 << 52) - 4096
    value = ~0x1234_5000 & mask | 0x100
    assert target(X86, value, 0) == 0x1234_5000
    patterns = X86.leaf_patterns(0x1234_5678, 0)
    assert any(value & mask == wanted for mask, wanted in patterns)


def test_x86_memory_encryption_bit_is_no_address() -> None:
    paging = x86_64.make_paging(five_levels=False, physical_mask=(1 << 52) - 1 & ~(1 << 51))
    value = 0x1234_5000 | 1 << 51 | 0x67
    assert target(paging, value, 0) == 0x1234_5000
    assert int(paging.table_targets(np.array([value], np.uint64), 2)[0]) == 0x1234_5000


def test_x86_pat_bit_of_a_huge_page_is_no_address() -> None:
    assert target(X86, 0x4000_0000 | 1 << 12 | 0x80 | 0x67, 1) == 0x4000_0000


def test_arm64_high_address_bits() -> None:
    lpa = aarch64.make_paging(page_shift=16, va_bits=52)
    assert target(lpa, 0x0000_1234_0000_A003, 0) == 0xA_1234_0000_0000 >> 0 | 0
    lpa2 = aarch64.make_paging(page_shift=12, va_bits=52, lpa2=True)
    assert target(lpa2, 0x0002_0000_1000_0303, 0) == (3 << 50 | 2 << 48 | 0x1000_0000)


def test_arm64_contiguous_entries_are_one_mapping() -> None:
    value = np.array([0x10000 | 3, 0x10000 | 3 | 1 << 52], np.uint64)
    assert ARM_NEW.leaf_bytes(value, 0).tolist() == [4096, 65536]


def test_riscv_napot_range() -> None:
    value = 0x1234_0000 >> 2 | 8 << 10 | 1 << 63 | 0xF
    assert [target(RISCV, value, 0, n) for n in (0, 5, 16, 31)] == [
        0x1234_0000,
        0x1234_5000,
        0x1234_0000,
        0x1234_F000,
    ]
    assert RISCV.leaf_bytes(np.array([value], np.uint64), 0).tolist() == [65536]
    for offset in (0, 0x5678, 0xFFFF):
        patterns = RISCV.leaf_patterns(0x1234_0000 + offset, 0)
        assert any(value & mask == wanted for mask, wanted in patterns)


@pytest.mark.parametrize(
    ("paging", "value", "meant"),
    [
        (X86, 0x67, "rwu+xX"),
        (X86, 0x61 | 1 << 63, "r"),
        (S390_OLD, 0x11 | 0x200, "ru+xX"),
        (S390_OLD, 0x11 | 0x100, "rwu"),
        (PPC, 3 << 62 | 4 | 2, "rwu"),
        (PPC, 3 << 62 | 4 | 1 | 8, "r+xX"),
        (ARM_NEW, 3 | 1 << 6 | 1 << 53, "rwu+x"),
        (ARM_NEW, 3 | 1 << 7 | 1 << 54, "r+X"),
        (RISCV, 1 | 2 | 8 | 0x10, "ru+xX"),
        (RISCV, 1 | 2 | 4, "rw"),
    ],
)
def test_leaf_permissions(paging: Paging, value: int, meant: str) -> None:
    letters = {
        "r": Permission.READ,
        "w": Permission.WRITE,
        "u": Permission.USER,
        "x": Permission.EXECUTE_USER,
        "X": Permission.EXECUTE_KERNEL,
    }
    wanted = Permission(0)
    for letter in meant.replace("+", ""):
        wanted |= letters[letter]
    assert permissions(paging, value, 0, leaf=True) == wanted


def test_arm64_table_entries_take_permissions_away() -> None:
    assert permissions(ARM_NEW, 3 | 1 << 59, 1, leaf=False) & Permission.EXECUTE_USER
    assert not permissions(ARM_NEW, 3 | 1 << 59, 1, leaf=False) & Permission.EXECUTE_KERNEL
    assert not permissions(ARM_NEW, 3 | 1 << 62, 1, leaf=False) & Permission.WRITE


def test_s390_asce_names_the_root() -> None:
    root = S390_OLD.root_of_asce(0x1234_4000 | 0x140 | 0x8 | 3)
    assert (root.address, root.level, root.entries) == (0x1234_4000, 3, ((0, 2048),))
    short = S390_OLD.root_of_asce(0x1234_4000 | 0x0 | 1)
    assert (short.level, short.entries) == (1, ((0, 1024),))
    with pytest.raises(ValueError, match="real space"):
        S390_OLD.root_of_asce(0x20)


def test_canonical_addresses() -> None:
    addresses = np.array([0, 1 << 56, (1 << 57) - 1], np.uint64)
    assert X86.canonical(addresses).tolist() == [
        0,
        0xFF00_0000_0000_0000,
        0xFFFF_FFFF_FFFF_FFFF,
    ]


def test_level_names() -> None:
    assert X86.level_named("p4d") == 3
    assert S390_OLD.level_named("segment") == 1
    with pytest.raises(KeyError):
        ARM_NEW.level_named("P4D")
