# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""ELF headers and notes, among them malformed ones."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Callable

import pytest
import target_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from target_files import Load, elf_core, note

from ptinspect.target.elf import ElfError, ElfFile, Note, parse_notes, read_elf

Reader = Callable[[bytes], ElfFile]


@pytest.fixture
def read(tmp_path: Path) -> Iterator[Reader]:
    fds = []

    def read_bytes(data: bytes) -> ElfFile:
        path = tmp_path / "file"
        path.write_bytes(data)
        fds.append(os.open(path, os.O_RDONLY))
        return read_elf(fds[-1])

    yield read_bytes
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("order", ["<", ">"])
def test_core(read: Reader, order: str) -> None:
    notes = note(b"CORE", 1, b"abcde", order) + note(b"VMCOREINFO", 0, b"text", order)
    data = elf_core(
        [Load(0x1000, b"x" * 10), Load(0x8000, b"y", memsz=0x1000, vaddr=0x77)],
        notes,
        machine=target_files.EM_S390,
        order=order,
        flags=1,
    )
    elf = read(data)
    assert (elf.bits, elf.little_endian, elf.machine) == (64, order == "<", 22)
    assert (elf.type, elf.flags) == (target_files.ET_CORE, 1)
    first, second = elf.load_segments
    assert (first.paddr, first.filesz, first.memsz) == (0x1000, 10, 10)
    assert (second.paddr, second.vaddr, second.filesz, second.memsz) == (0x8000, 0x77, 1, 0x1000)
    assert elf.end == len(data)
    assert list(elf.notes()) == [Note(b"CORE", 1, b"abcde"), Note(b"VMCOREINFO", 0, b"text")]
    assert elf.build_id() is None


def test_32_bit(read: Reader) -> None:
    elf = read(target_files.elf32(target_files.EM_ARM))
    assert (elf.bits, elf.machine, elf.segments) == (32, 40, ())


@pytest.mark.parametrize("order", ["<", ">"])
def test_debug_file(read: Reader, order: str) -> None:
    elf = read(target_files.debug_file(order=order, machine=target_files.EM_S390))
    assert elf.build_id() == target_files.BUILD_ID
    assert ".debug_info" in [section.name for section in elf.sections]
    assert elf.type_name == "an executable"
    assert read(target_files.debug_file(None)).build_id() is None


def test_many_program_headers(read: Reader) -> None:
    """More than 65534 segments: e_phnum is PN_XNUM, section 0's sh_info has the number."""
    data = bytearray(elf_core([Load(0, b"abc")]))
    section = bytearray(64)
    struct.pack_into("<I", section, 44, 2)
    struct.pack_into("<Q", data, 40, len(data))
    struct.pack_into("<H", data, 56, 0xFFFF)
    assert len(read(bytes(data + section)).segments) == 2
    with pytest.raises(ElfError, match="number of program headers"):
        read(bytes(data))


def test_misplaced_section_names(read: Reader) -> None:
    """QEMU 7.2 writes a section header of the wrong byte order into big-endian dumps."""
    data = bytearray(elf_core([Load(0, b"abc")], order=">"))
    section = struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, len(data), 1, 0, 0, 0, 0)
    struct.pack_into(">Q", data, 40, len(data))
    struct.pack_into(">H", data, 60, 1)
    assert len(read(bytes(data + section)).load_segments) == 1


@pytest.mark.parametrize(
    ("size", "message"),
    [(0, "no ELF header"), (3, "no ELF header"), (20, "malformed"), (60, "within its ELF header")],
)
def test_cut_header(read: Reader, size: int, message: str) -> None:
    with pytest.raises(ElfError, match=message):
        read(elf_core([Load(0, b"abc")])[:size])


def test_cut_program_headers(read: Reader) -> None:
    with pytest.raises(ElfError, match="within its program headers"):
        read(elf_core([Load(0, b"abc")])[:100])


def test_bad_class(read: Reader) -> None:
    with pytest.raises(ElfError, match="malformed"):
        read(b"\x7fELF\x07" + bytes(100))


def test_cut_note() -> None:
    whole = note(b"A", 1, b"first") + note(b"B", 2, b"second")
    assert [n.name for n in parse_notes(whole, True)] == [b"A", b"B"]
    assert [n.name for n in parse_notes(whole[:-8], True)] == [b"A"]
    assert list(parse_notes(whole[:7], True)) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=300), st.integers(0, 200))
def test_garbage_is_an_elf_error(read: Reader, garbage: bytes, keep: int) -> None:
    """Whatever follows the magic, there is an answer or an ElfError."""
    data = elf_core([Load(0, b"abc" * 10)], note(b"CORE", 1, b"abc"))
    with suppress(ElfError):
        list(read(data[: max(keep, 6)] + garbage).notes())
