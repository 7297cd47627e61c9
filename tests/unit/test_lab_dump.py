# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's dumps: reading them, finding VMCOREINFO, writing small ones."""

from __future__ import annotations

import struct

import drgn
import numpy as np
import pytest

from lab import shrink
from lab.dump import ElfDump, Pages, move_program_headers
from lab.errors import LabError

PAGE = 4096
INFO = b"OSRELEASE=7.3\nPAGESIZE=4096\n"


def note(name: bytes, text: bytes, order: str = "<") -> bytes:
    """An ELF note of type 0."""
    padded = name + b"\0"
    head = struct.pack(order + "III", len(padded), len(text), 0)
    return head + padded + bytes(-len(padded) % 4) + text + bytes(-len(text) % 4)


def write_dump(path, segments, notes=b"", order="<", machine=62, sections=0):
    """Write an ELF core: segments are (physical address, data, size in memory)."""
    count = len(segments) + 1
    table = 64 + 64 * sections
    at = table + 56 * count
    ident = b"\x7fELF\x02" + (b"\x01" if order == "<" else b"\x02") + b"\x01" + bytes(9)
    head = ident + struct.pack(
        order + "HHIQQQIHHHHHH",
        *(4, machine, 1, 0, table, 64 if sections else 0, 0, 64, 56, count, 64, sections, 0),
    )
    head += b"s" * (64 * sections)
    entry = order + "IIQQQQQQ"
    head += struct.pack(entry, 4, 0, at, 0, 0, len(notes), len(notes), 0)
    body = notes
    for physical, data, size in segments:
        place = at + len(body)
        head += struct.pack(entry, 1, 0, place, 0, physical, len(data), size, 0)
        body += data
    path.write_bytes(head + body)
    return ElfDump(path)


@pytest.mark.parametrize(("order", "machine"), [("<", 62), (">", 22)])
def test_program_headers_move_before_what_were_sections(tmp_path, order, machine):
    """What QEMU writes becomes what makedumpfile reads; nothing else in the dump changes."""
    path = tmp_path / "d"
    segments = [(0x3000, b"c" * PAGE, 2 * PAGE), (0, b"a" * PAGE, PAGE)]
    notes = note(b"VMCOREINFO", INFO, order)
    before = write_dump(path, segments, notes, order, machine, sections=2)
    pages = before.segments
    path.chmod(0o400)
    move_program_headers(path)
    after = ElfDump(path)
    assert after.segments == pages
    assert after.notes == before.notes == notes
    assert after.read(0, PAGE) == b"a" * PAGE
    header = path.read_bytes()[:64]
    assert struct.unpack_from(order + "QQ", header, 32) == (64, 0)
    assert struct.unpack_from(order + "HHH", header, 58) == (0, 0, 0)


@pytest.mark.parametrize(("order", "machine"), [("<", 62), (">", 22)])
def test_reading(tmp_path, order, machine):
    dump = write_dump(
        tmp_path / "d",
        [(0x3000, b"c" * PAGE, 2 * PAGE), (0, b"a" * PAGE, PAGE), (PAGE, b"b" * PAGE, PAGE)],
        order=order,
        machine=machine,
    )
    assert dump.read(PAGE - 1, 2) == b"ab"
    assert dump.read(0x3FFF, 3) == b"c\0\0"
    assert dump.read(0x4FFF, 1) == b"\0"
    for address, count in ((0x2000, 1), (0x1FFF, 2), (0x4FFF, 2), (1 << 40, 8)):
        with pytest.raises(drgn.FaultError):
            dump.read(address, count)
    assert bool(dump.platform.flags & drgn.PlatformFlags.IS_LITTLE_ENDIAN) == (order == "<")


def test_vmcoreinfo_in_a_note(tmp_path):
    notes = note(b"CORE", b"registers") + note(b"VMCOREINFO", INFO)
    assert write_dump(tmp_path / "d", [(0, bytes(PAGE), PAGE)], notes).vmcoreinfo() == INFO


def test_vmcoreinfo_by_the_s390_lowcore(tmp_path):
    memory = bytearray(3 * PAGE)
    memory[0xE0C : 0xE0C + 8] = (2 * PAGE).to_bytes(8, "big")
    found = note(b"VMCOREINFO", INFO, ">")
    memory[2 * PAGE : 2 * PAGE + len(found)] = found
    dump = write_dump(tmp_path / "d", [(0, bytes(memory), 3 * PAGE)], order=">", machine=22)
    assert dump.vmcoreinfo() == INFO


def test_vmcoreinfo_by_searching(tmp_path):
    memory = bytearray(3 * PAGE)
    memory[100:122] = b"VMCOREINFO\0\0OSRELEASE="  # a string of the kernel, no note
    found = note(b"VMCOREINFO", INFO)
    memory[2 * PAGE : 2 * PAGE + len(found)] = found
    dump = write_dump(tmp_path / "d", [(0, bytes(memory), 3 * PAGE)], machine=21)
    assert dump.vmcoreinfo() == INFO


def test_ppc64_headers_have_another_order_than_memory(tmp_path):
    found = note(b"VMCOREINFO", INFO)
    memory = bytes(4096) + found + bytes(4096 - len(found))
    dump = write_dump(tmp_path / "dump", [(0, memory, 8192)], order=">", machine=21)
    assert dump.vmcoreinfo() == INFO
    assert dump.platform.flags & drgn.PlatformFlags.IS_LITTLE_ENDIAN


def test_no_vmcoreinfo(tmp_path):
    with pytest.raises(LabError, match="no VMCOREINFO"):
        write_dump(tmp_path / "d", [(0, bytes(PAGE), PAGE)]).vmcoreinfo()


def test_no_dump(tmp_path):
    path = tmp_path / "d"
    path.write_bytes(b"something else entirely" * 10)
    with pytest.raises(LabError, match="not a 64-bit ELF"):
        ElfDump(path)


def test_a_written_dump_reads_the_same(tmp_path):
    frames = [b"\x11" * PAGE, bytes(PAGE), b"\x22" * PAGE, bytes(PAGE), bytes(PAGE)]
    notes = note(b"VMCOREINFO", INFO)
    full = write_dump(tmp_path / "full", [(0, b"".join(frames), 5 * PAGE)], notes)
    # Frame 0 with the zeroes after it, frame 2 left out, frames 3 and 4 only zeroes.
    shrink._write(full, tmp_path / "small", [(0, 1, 2), (3, 0, 2)], PAGE)
    small = ElfDump(tmp_path / "small")
    assert small.notes == full.notes
    for pfn in (0, 1, 3, 4):
        assert small.read(pfn * PAGE, PAGE) == frames[pfn]
    with pytest.raises(drgn.FaultError):
        small.read(2 * PAGE, 1)
    assert (tmp_path / "small").stat().st_size < (tmp_path / "full").stat().st_size


@pytest.mark.parametrize(
    ("mask", "runs"),
    [
        ([], []),
        ([0, 0], []),
        ([1, 1], [(0, 2)]),
        ([0, 1, 1, 0, 1], [(1, 3), (4, 5)]),
    ],
)
def test_runs(mask, runs):
    assert shrink._runs(np.array(mask, dtype=np.bool_)) == runs


@pytest.mark.parametrize("order", ["<", ">"])
def test_words_come_in_host_order(order):
    raw = np.frombuffer(struct.pack(order + "QQQQ", 1, 2, 3, 1 << 40), dtype=np.uint8)
    pages = Pages(PAGE, np.ones(2, dtype=np.bool_), raw.reshape(2, 16), order)
    assert pages.word(8).tolist() == [2, 1 << 40]
    assert pages.word(0, 8).tolist() == [1, 3]
