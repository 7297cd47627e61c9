# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMCOREINFO: parsing, judging, finding it in memory."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import target_files
from target_files import NOTE_ADDRESS, Load, elf_core, note, s390x_memory, x86_memory, x86_text

from ptinspect.errors import TargetError
from ptinspect.target import vmcoreinfo


class Memory:
    """Physical memory with holes, that counts how much of it was asked for."""

    def __init__(self, data: bytes | bytearray, holes: tuple[tuple[int, int], ...] = ()) -> None:
        self.data = bytes(data)
        self.holes = holes

    def __call__(self, address: int, size: int) -> bytes | None:
        end = address + size
        if address < 0 or end > len(self.data):
            return None
        if any(address < stop and start < end for start, stop in self.holes):
            return None
        return self.data[address:end]


def found(memory: Memory, *ranges: tuple[int, int]) -> list[tuple[int, bytes]]:
    return list(vmcoreinfo.search(memory, ranges or [(0, len(memory.data))]))


def test_parse() -> None:
    fields = vmcoreinfo.parse(b"A=1\nB=x=y\nnonsense\nC=\n\0\0")
    assert fields == {"A": "1", "B": "x=y", "C": ""}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"OSRELEASE=", b"X=", "no OSRELEASE"),
        (b"PAGESIZE=4096", b"PAGESIZE=4095", "PAGESIZE is 4095"),
        (b"PAGESIZE=4096", b"PAGESIZE=1048576", "PAGESIZE is 1048576"),
        (b"PAGESIZE=4096", b"PAGESIZE=many", "PAGESIZE is many"),
        (b"PAGESIZE=4096\n", b"", "PAGESIZE is missing"),
        (b"SYMBOL(swapper_pg_dir)=", b"X=", r"no SYMBOL\(swapper_pg_dir\)"),
        (b"SYMBOL(init_uts_ns)=", b"SYMBOL(init_uts_ns)=there", "is not an address"),
    ],
)
def test_problem(old: bytes, new: bytes, message: str) -> None:
    text = x86_text()
    assert vmcoreinfo.problem(text) is None
    assert old in text
    why = vmcoreinfo.problem(text.replace(old, new))
    assert why is not None
    assert re.search(message, why)


def test_page_size() -> None:
    assert vmcoreinfo.page_size(x86_text()) == 4096
    assert vmcoreinfo.page_size(b"OSRELEASE=1\n") == 0


def test_search() -> None:
    assert found(Memory(x86_memory())) == [(NOTE_ADDRESS, x86_text())]
    assert found(Memory(x86_memory(with_note=False))) == []


def test_search_big_endian() -> None:
    assert found(Memory(s390x_memory())) == [(NOTE_ADDRESS, target_files.s390x_text())]


def test_search_beside_holes() -> None:
    holes = ((NOTE_ADDRESS - 4096, NOTE_ADDRESS), (NOTE_ADDRESS + 4096, NOTE_ADDRESS + 8192))
    assert [address for address, _ in found(Memory(x86_memory(), holes))] == [NOTE_ADDRESS]
    assert found(Memory(x86_memory(), ((NOTE_ADDRESS, NOTE_ADDRESS + 1),))) == []


def test_search_only_in_ranges() -> None:
    memory = Memory(x86_memory())
    assert found(memory, (0, NOTE_ADDRESS), (NOTE_ADDRESS + 4096, 4096)) == []
    assert len(found(memory, (NOTE_ADDRESS, 4096))) == 1
    # A range that promises more than there is.
    assert len(found(memory, (0, 1 << 22))) == 1


@pytest.mark.parametrize("offset", [-40, -13, -12, -4, 0])
def test_search_across_chunks(offset: int) -> None:
    """A note whose header lies in one chunk and its text in the next."""
    at = vmcoreinfo._CHUNK_BYTES + offset
    memory = bytearray(3 * vmcoreinfo._CHUNK_BYTES)
    whole = note(b"VMCOREINFO", 0, x86_text())
    memory[at : at + len(whole)] = whole
    assert found(Memory(memory)) == [(at, x86_text())]


def test_search_yields_all() -> None:
    memory = bytearray(x86_memory())
    stale = note(b"VMCOREINFO", 0, x86_text("5.10.0-stale"))
    memory[0x80000 : 0x80000 + len(stale)] = stale
    assert {address for address, _ in found(Memory(memory))} == {0x80000, NOTE_ADDRESS}


@pytest.mark.parametrize(
    ("at", "word"), [(0, 10**6), (4, 10**6), (4, 5), (8, 1), (4, (1 << 16) + 1)]
)
def test_search_rejects_bad_headers(at: int, word: int) -> None:
    memory = x86_memory()
    struct.pack_into("<I", memory, NOTE_ADDRESS + at, word)
    assert found(Memory(memory)) == []


def test_lowcore() -> None:
    assert vmcoreinfo.from_lowcore(Memory(s390x_memory())) == target_files.s390x_text()
    assert vmcoreinfo.from_lowcore(Memory(s390x_memory(with_pointer=False))) is None
    assert vmcoreinfo.from_lowcore(Memory(b"")) is None


@pytest.mark.parametrize("pointer", [1, NOTE_ADDRESS + 4, 1 << 40, (1 << 64) - 1])
def test_bad_lowcore_pointer(pointer: int) -> None:
    memory = s390x_memory()
    struct.pack_into(">Q", memory, target_files.LOWCORE_POINTER, pointer)
    assert vmcoreinfo.from_lowcore(Memory(memory)) is None


def test_matches() -> None:
    memory = Memory(x86_memory())

    def virtual(address: int, size: int) -> bytes | None:
        return memory(address - target_files.X86_KERNEL, size)

    assert vmcoreinfo.matches(x86_text(), virtual) is True
    assert vmcoreinfo.matches(x86_text("6.12.1"), virtual) is False
    # Not a prefix either.
    assert vmcoreinfo.matches(x86_text(target_files.RELEASE[:-1]), virtual) is False
    assert vmcoreinfo.matches(x86_text(), memory) is None
    assert vmcoreinfo.matches(b"OSRELEASE=1\n", virtual) is None


def test_read_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (
        x86_text(),
        note(b"VMCOREINFO", 0, x86_text()),
        note(b"VMCOREINFO", 0, x86_text(), ">"),
        elf_core([Load(0, bytes(4096))], note(b"VMCOREINFO", 0, x86_text())),
    ):
        path.write_bytes(content)
        assert vmcoreinfo.read_file(path) == x86_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no OSRELEASE"),
        (b"\x7fELF", "malformed"),
        (elf_core([Load(0, b"abc")]), "without a VMCOREINFO note"),
        (target_files.debug_file(), "without a VMCOREINFO note"),
        (None, "No such file"),
    ],
)
def test_bad_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TargetError, match=message) as caught:
        vmcoreinfo.read_file(path)
    assert str(caught.value).startswith(f"--vmcoreinfo {path}: ")


def test_folder_as_file(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="Is a directory"):
        vmcoreinfo.read_file(tmp_path)
