# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Headers of kdump files, plain and flattened, whole and cut."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from target_files import flattened, kdump, note, x86_memory

from ptinspect.target import kdump as kdump_module
from ptinspect.target.kdump import Kdump, KdumpError, read_kdump

MEMORY = bytes(x86_memory())


def read(path: Path, data: bytes) -> Kdump:
    (path / "dump").write_bytes(data)
    fd = os.open(path / "dump", os.O_RDONLY)
    try:
        return read_kdump(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("flat", [False, True])
def test_headers(tmp_path: Path, order: str, flat: bool) -> None:
    data = kdump(MEMORY, order=order, vmcoreinfo=b"OSRELEASE=1\n", machine="s390x")
    dump = read(tmp_path, flattened(data) if flat else data)
    assert (dump.flattened, dump.little_endian) == (flat, order == "<")
    assert (dump.machine, dump.block_size) == ("s390x", 4096)
    assert dump.vmcoreinfo == b"OSRELEASE=1\n"
    assert list(dump.ranges()) == [(0, len(MEMORY))]
    assert not dump.incomplete
    assert not dump.excluded_vmemmap


def test_ranges(tmp_path: Path) -> None:
    """The bitmap of the pages in the file as ranges of physical memory."""
    data = bytearray(kdump(MEMORY))
    bitmap = 3 * 4096
    # Leave out pages 0 and 9 to 10. Their descriptors stay: only the ranges are looked at.
    data[bitmap] &= ~0x01
    data[bitmap + 1] &= ~0x06
    ranges = list(read(tmp_path, bytes(data)).ranges())
    assert ranges == [(0x1000, 0x8000), (0xB000, len(MEMORY) - 0xB000)]


@given(st.binary(max_size=12))
def test_ranges_in_chunks(bitmap: bytes) -> None:
    """As one would do it bit by bit."""
    bits = [byte >> bit & 1 for byte in bitmap for bit in range(8)]
    dump = Kdump(False, True, None, 4096, bitmap, None, False, False, 1)
    with mock.patch.object(kdump_module, "_BITMAP_CHUNK_BYTES", 3):
        ranges = list(dump.ranges())
        assert kdump_module._count_bits(bitmap) == sum(bits)
    pages: set[int] = set()
    before = -1
    for start, size in ranges:
        assert start > before
        before = start + size
        pages.update(range(start // 4096, before // 4096))
    assert pages == {page for page, bit in enumerate(bits) if bit}


@pytest.mark.parametrize("machine", ["", "Unknown"])
@pytest.mark.parametrize(
    ("size", "order", "expected"),
    [
        (336, "<", "x86_64"),
        (336, ">", "s390x"),
        (392, "<", "aarch64"),
        (376, "<", "riscv64"),
        (504, "<", "ppc64le"),
        (504, ">", "ppc64le"),
        (144, "<", None),
    ],
)
def test_machine_from_notes(
    tmp_path: Path, machine: str, size: int, order: str, expected: str
) -> None:
    notes = note(b"QEMU", 0, b"x", order) + note(b"CORE", 1, bytes(size), order)
    data = kdump(MEMORY, machine=machine, notes=notes, order=order)
    assert read(tmp_path, data).machine == expected


def test_no_machine(tmp_path: Path) -> None:
    assert read(tmp_path, kdump(MEMORY, machine="")).machine is None


@pytest.mark.parametrize("left_out", [1, 1000, 100_000])
def test_cut(tmp_path: Path, left_out: int) -> None:
    data = kdump(bytes(os.urandom(1 << 18)))
    with pytest.raises(KdumpError, match=r"truncated dump: it has \d+ bytes of at least \d+"):
        read(tmp_path, data[:-left_out])


@pytest.mark.parametrize("size", [9, 300, 4200, 9000, 14000])
def test_cut_headers(tmp_path: Path, size: int) -> None:
    with pytest.raises(KdumpError, match="truncated dump: it ends within its header"):
        read(tmp_path, kdump(MEMORY)[:size])


def test_declared_incomplete(tmp_path: Path) -> None:
    """makedumpfile ran out of space: not an error here, but told."""
    assert read(tmp_path, kdump(MEMORY, status=0x9)[:-100]).incomplete


def test_excluded_vmemmap(tmp_path: Path) -> None:
    assert read(tmp_path, kdump(MEMORY, status=0x11)).excluded_vmemmap


def test_split(tmp_path: Path) -> None:
    with pytest.raises(KdumpError, match="--reassemble"):
        read(tmp_path, kdump(MEMORY, split=1))


def test_flattened_without_end(tmp_path: Path) -> None:
    stream = flattened(kdump(MEMORY), end=False)
    for data in (stream, stream[:-1], stream[:4096], stream[:4100]):
        with pytest.raises(KdumpError, match="the flattened stream has no end"):
            read(tmp_path, data)


def test_flattened_elf(tmp_path: Path) -> None:
    stream = flattened(b"\x7fELF" + bytes(5000))
    with pytest.raises(KdumpError, match="makedumpfile -R"):
        read(tmp_path, stream)


def test_flattened_garbage(tmp_path: Path) -> None:
    stream = flattened(kdump(MEMORY))
    with pytest.raises(KdumpError, match="malformed"):
        read(tmp_path, stream[:4096] + bytes(100))


@pytest.mark.parametrize("block_size", [0, 1000, 4097, 1 << 21])
def test_malformed(tmp_path: Path, block_size: int) -> None:
    data = bytearray(kdump(MEMORY))
    data[428:432] = block_size.to_bytes(4, "little")
    with pytest.raises(KdumpError, match=r"malformed, or of a 32-bit kernel"):
        read(tmp_path, bytes(data))


def test_no_version(tmp_path: Path) -> None:
    with pytest.raises(KdumpError, match="no version"):
        read(tmp_path, b"KDUMP   " + bytes(8192))


@pytest.mark.parametrize("field", [32, 40, 48, 56, 64, 72])
def test_notes_beyond_the_end(tmp_path: Path, field: int) -> None:
    """libkdumpfile would die of these with SIGBUS."""
    data = bytearray(kdump(MEMORY, vmcoreinfo=b"OSRELEASE=1\n"))
    data[4096 + field + 7] = 1
    data[4096 + (field ^ 8)] |= 1
    with pytest.raises(KdumpError, match="a note beyond the end of the file"):
        read(tmp_path, bytes(data))
