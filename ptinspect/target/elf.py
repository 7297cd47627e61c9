# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Headers and notes of ELF files: what a file is, before drgn is asked to open it.

Only what telling and repairing a dump needs. Reads are positional, so a file descriptor can be
shared, and nothing is mapped: a file that shrinks meanwhile gives an error, not a signal.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

MAGIC = b"\x7fELF"
HEADER_BYTES = 64

EM_PPC64 = 21

ET_REL = 1
ET_CORE = 4
PT_LOAD = 1
PT_NOTE = 4
SHT_NOTE = 7
SHT_NOBITS = 8

NT_PRSTATUS = 1
NT_GNU_BUILD_ID = 3
NT_TASKSTRUCT = 4
NT_AUXV = 6

#: e_phnum of a file with more program headers than fit; section 0's sh_info has the number.
_PN_XNUM = 0xFFFF
_ET_NAMES = {1: "a relocatable object", 2: "an executable", 3: "an executable or shared object"}

#: No table or note is larger than this; a garbled header must not exhaust memory.
_MOST_BYTES = 1 << 28


class ElfError(Exception):
    """The file is not a well-formed ELF file; the message says what is wrong with it."""


class Segment(NamedTuple):
    """One program header."""

    type: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int


class Section(NamedTuple):
    """One section header."""

    name: str
    type: int
    offset: int
    size: int


class Note(NamedTuple):
    """One ELF note."""

    name: bytes
    type: int
    desc: bytes


@dataclass(frozen=True)
class ElfFile:
    """The headers of an ELF file."""

    fd: int
    bits: int
    little_endian: bool
    type: int
    machine: int
    flags: int
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]

    @property
    def type_name(self) -> str:
        """What the ELF type is called in a sentence."""
        return _ET_NAMES.get(self.type, f"of ELF type {self.type}")

    @property
    def load_segments(self) -> list[Segment]:
        """The segments that hold memory."""
        return [segment for segment in self.segments if segment.type == PT_LOAD]

    @property
    def end(self) -> int:
        """The size that the file must have for its segments to be whole."""
        return max((segment.offset + segment.filesz for segment in self.segments), default=0)

    def notes(self) -> Iterator[Note]:
        """
        All notes, from the PT_NOTE segments of a core file or the sections of any other.

        A separate debug file keeps the note sections' contents, but its program headers still
        speak of the file that it was stripped from.
        """
        if self.type == ET_CORE:
            ranges = [(s.offset, s.filesz) for s in self.segments if s.type == PT_NOTE]
        else:
            ranges = [(s.offset, s.size) for s in self.sections if s.type == SHT_NOTE]
        for offset, size in ranges:
            data = _pread(self.fd, size, offset)
            yield from parse_notes(data, self.little_endian)

    def build_id(self) -> str | None:
        """The GNU build ID in hexadecimal, if the file has one."""
        for note in self.notes():
            if note.name == b"GNU" and note.type == NT_GNU_BUILD_ID:
                return note.desc.hex()
        return None


def _pread(fd: int, size: int, offset: int) -> bytes:
    """Read what there is of a range that a header names, however absurd it is."""
    if offset >= 1 << 62:
        return b""
    return os.pread(fd, min(size, _MOST_BYTES), offset)


def parse_notes(data: bytes, little_endian: bool) -> Iterator[Note]:
    """The notes in the contents of a note segment or section, up to the first malformed one."""
    header = struct.Struct("<III" if little_endian else ">III")
    offset = 0
    while offset + header.size <= len(data):
        name_size, desc_size, kind = header.unpack_from(data, offset)
        name_start = offset + header.size
        desc_start = name_start + (name_size + 3 & ~3)
        if desc_start + desc_size > len(data):
            return
        name = data[name_start : name_start + name_size].rstrip(b"\0")
        yield Note(name, kind, data[desc_start : desc_start + desc_size])
        offset = desc_start + (desc_size + 3 & ~3)


def read_elf(fd: int) -> ElfFile:
    """
    Read the headers of an ELF file.

    :raises ElfError: if they are malformed or lie beyond the end of the file
    """
    ident = os.pread(fd, HEADER_BYTES, 0)
    if not ident.startswith(MAGIC):
        raise ElfError("it has no ELF header")
    if len(ident) < 52 or ident[4] not in (1, 2) or ident[5] not in (1, 2):
        raise ElfError("its ELF header is malformed")
    bits = 64 if ident[4] == 2 else 32
    order = "<" if ident[5] == 1 else ">"
    # e_type e_machine e_version e_entry e_phoff e_shoff e_flags
    # e_ehsize e_phentsize e_phnum e_shentsize e_shnum e_shstrndx
    header = struct.Struct(order + ("HHIQQQIHHHHHH" if bits == 64 else "HHIIIIIHHHHHH"))
    if len(ident) < 16 + header.size:
        raise ElfError("it ends within its ELF header")
    fields = header.unpack_from(ident, 16)
    kind, machine = fields[0], fields[1]
    phoff, shoff = fields[4], fields[5]
    flags = fields[6]
    phnum, shnum, shstrndx = fields[9], fields[11], fields[12]
    sections = _read_sections(fd, order, bits, shoff, shnum, shstrndx)
    if phnum == _PN_XNUM:
        phnum = _extended_phnum(fd, order, bits, shoff)
    segments = _read_segments(fd, order, bits, phoff, phnum)
    return ElfFile(fd, bits, order == "<", kind, machine, flags, segments, sections)


def _extended_phnum(fd: int, order: str, bits: int, shoff: int) -> int:
    """The number of program headers when e_phnum is PN_XNUM: section 0's sh_info."""
    offset, size = (44, 64) if bits == 64 else (28, 40)
    first = _pread(fd, size, shoff)
    if not shoff or len(first) < size:
        raise ElfError("its number of program headers cannot be read")
    (phnum,) = struct.unpack_from(order + "I", first, offset)
    return int(phnum)


def _read_segments(fd: int, order: str, bits: int, phoff: int, phnum: int) -> tuple[Segment, ...]:
    entry = struct.Struct(order + ("IIQQQQQQ" if bits == 64 else "IIIIIIII"))
    size = phnum * entry.size
    table = _pread(fd, size, phoff) if size else b""
    if len(table) < size:
        raise ElfError("it ends within its program headers")
    if bits == 64:
        return tuple(
            Segment(kind, offset, vaddr, paddr, filesz, memsz)
            for kind, _, offset, vaddr, paddr, filesz, memsz, _ in entry.iter_unpack(table)
        )
    return tuple(
        Segment(kind, offset, vaddr, paddr, filesz, memsz)
        for kind, offset, vaddr, paddr, filesz, memsz, _, _ in entry.iter_unpack(table)
    )


def _read_sections(
    fd: int, order: str, bits: int, shoff: int, shnum: int, shstrndx: int
) -> tuple[Section, ...]:
    """The section headers; none if they are not in the file, as in a dump that was cut."""
    entry = struct.Struct(order + ("IIQQQQIIQQ" if bits == 64 else "IIIIIIIIII"))
    table = _pread(fd, shnum * entry.size, shoff) if shoff and shnum else b""
    if len(table) < shnum * entry.size or not table:
        return ()
    headers = list(entry.iter_unpack(table))
    names = b""
    if shstrndx < len(headers):
        offset, size = headers[shstrndx][4:6]
        # QEMU 7.2 writes the only section of a big-endian dump in little-endian order.
        if offset + size <= os.fstat(fd).st_size:
            names = _pread(fd, size, offset)
    return tuple(
        Section(
            names[name : max(name, names.find(b"\0", name))].decode("ascii", "replace"),
            kind,
            offset,
            size,
        )
        for name, kind, _, _, offset, size, _, _, _, _ in headers
    )
