# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Crafted targets: memory of a kernel that fits in 1 MiB, in every kind of dump file, and DWARF."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

RELEASE = "6.12.0-crafted"
BUILD_ID = "00112233445566778899aabbccddeeff00112233"

EM_386, EM_ARM, EM_PPC64, EM_S390, EM_X86_64 = 3, 40, 21, 22, 62
ET_REL, ET_EXEC, ET_CORE = 1, 2, 4
PT_LOAD, PT_NOTE = 1, 4

#: Where things are in the crafted memory, by physical address.
MEMORY_BYTES = 1 << 20
NOTE_ADDRESS = 0x40000
TABLES = 0x10000
UTS_NAMESPACE = 0x20000
LOWCORE_POINTER = 0xE0C

#: The kernel's half begins here on x86_64; the crafted page tables map it to physical address 0.
X86_KERNEL = 0xFFFFFFFF80000000


def note(name: bytes, kind: int, desc: bytes, order: str = "<") -> bytes:
    """An ELF note."""

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    header = struct.pack(order + "III", len(name) + 1, len(desc), kind)
    return header + padded(name + b"\0") + padded(desc)


@dataclass(frozen=True)
class Load:
    """One PT_LOAD segment."""

    paddr: int
    data: bytes
    memsz: int | None = None
    vaddr: int = 0


def elf_core(
    loads: Iterable[Load],
    notes: bytes = b"",
    *,
    machine: int = EM_X86_64,
    order: str = "<",
    kind: int = ET_CORE,
    flags: int = 0,
) -> bytes:
    """A 64-bit ELF file with a PT_NOTE and PT_LOAD segments."""
    loads = list(loads)
    offset = 64 + 56 * (1 + len(loads))
    segment = struct.Struct(order + "IIQQQQQQ")
    headers = segment.pack(PT_NOTE, 0, offset, 0, 0, len(notes), len(notes), 0)
    body = notes
    for load in loads:
        size = len(load.data) if load.memsz is None else load.memsz
        at = offset + len(body)
        headers += segment.pack(PT_LOAD, 0, at, load.vaddr, load.paddr, len(load.data), size, 0)
        body += load.data
    ident = b"\x7fELF" + bytes([2, 1 if order == "<" else 2, 1, 0]) + bytes(8)
    header = struct.pack(
        order + "HHIQQQIHHHHHH",
        *(kind, machine, 1, 0, 64, 0, flags, 64, 56, 1 + len(loads), 64, 0, 0),
    )
    return ident + header + headers + body


def elf32(machine: int, kind: int = ET_CORE) -> bytes:
    """A 32-bit ELF file with nothing but its header."""
    ident = b"\x7fELF" + bytes([1, 1, 1, 0]) + bytes(8)
    return ident + struct.pack("<HHIIIIIHHHHHH", kind, machine, 1, 0, 52, 0, 0, 52, 32, 0, 40, 0, 0)


def vmcoreinfo_text(
    swapper: int, uts: int, *, release: str = RELEASE, page_size: int = 4096, extra: str = ""
) -> bytes:
    """The text of a VMCOREINFO."""
    return (
        f"OSRELEASE={release}\nBUILD-ID={BUILD_ID}\nPAGESIZE={page_size}\n"
        f"SYMBOL(init_uts_ns)={uts:x}\nOFFSET(uts_namespace.name)=8\n"
        f"SYMBOL(swapper_pg_dir)={swapper:x}\n{extra}"
    ).encode()


def x86_text(release: str = RELEASE) -> bytes:
    """The VMCOREINFO of *x86_memory*."""
    return vmcoreinfo_text(
        X86_KERNEL + TABLES,
        X86_KERNEL + UTS_NAMESPACE,
        release=release,
        extra="NUMBER(phys_base)=0\nKERNELOFFSET=0\nNUMBER(pgtable_l5_enabled)=0\n",
    )


def x86_memory(*, with_note: bool = True, release: str = RELEASE) -> bytearray:
    """
    Physical memory of an x86_64 kernel: four-level page tables, init_uts_ns, VMCOREINFO.

    :param with_note: Whether the kernel's note is in it.
    """
    memory = bytearray(MEMORY_BYTES)
    tables = {511: TABLES + 0x1000}, {510: TABLES + 0x2000}
    for level, entries in enumerate(tables):
        for index, target in entries.items():
            struct.pack_into("<Q", memory, TABLES + 0x1000 * level + 8 * index, target | 0x3)
    # One 2 MiB page from physical address 0: present, writable, PSE.
    struct.pack_into("<Q", memory, TABLES + 0x2000, 0x83)
    _put_release(memory, release)
    if with_note:
        text = note(b"VMCOREINFO", 0, x86_text(release))
        memory[NOTE_ADDRESS : NOTE_ADDRESS + len(text)] = text
    return memory


def s390x_text() -> bytes:
    """The VMCOREINFO of *s390x_memory*."""
    return vmcoreinfo_text(TABLES, UTS_NAMESPACE)


def s390x_memory(*, with_pointer: bool = True) -> bytearray:
    """Physical memory of an s390x kernel, whose lowcore points to its VMCOREINFO."""
    memory = bytearray(MEMORY_BYTES)
    # A region-third table of 2048 entries: the first maps 2 GiB, the others are invalid.
    for index in range(2048):
        struct.pack_into(">Q", memory, TABLES + 8 * index, 0x407 if index == 0 else 0x24)
    _put_release(memory, RELEASE)
    text = note(b"VMCOREINFO", 0, s390x_text(), ">")
    memory[NOTE_ADDRESS : NOTE_ADDRESS + len(text)] = text
    if with_pointer:
        struct.pack_into(">Q", memory, LOWCORE_POINTER, NOTE_ADDRESS)
    return memory


def _put_release(memory: bytearray, release: str) -> None:
    strings = ("Linux", "crafted", release, "#1", "machine", "")
    for index, string in enumerate(strings):
        at = UTS_NAMESPACE + 8 + 65 * index
        memory[at : at + len(string)] = string.encode()


def kdump(
    memory: bytes,
    *,
    machine: str = "x86_64",
    order: str = "<",
    vmcoreinfo: bytes = b"",
    notes: bytes = b"",
    status: int = 1,
    split: int = 0,
    dump_level: int = 1,
    block_size: int = 4096,
) -> bytes:
    """A kdump-compressed file (zlib) of physical memory from address 0."""
    pages = [memory[at : at + block_size] for at in range(0, len(memory), block_size)]
    bitmap = bytearray(block_size)
    for pfn in range(len(pages)):
        bitmap[pfn >> 3] |= 1 << (pfn & 7)
    header = bytearray(block_size)
    header[0:8] = b"KDUMP   "
    struct.pack_into(order + "I", header, 8, 6)
    header[12 + 4 * 65 : 12 + 4 * 65 + len(machine)] = machine.encode()
    # status, block_size, sub_hdr_size, bitmap_blocks, max_mapnr
    struct.pack_into(order + "IIiII", header, 424, status, block_size, 1, 2, len(pages))
    sub = bytearray(block_size)
    info_at = block_size + 512
    notes_at = info_at + len(vmcoreinfo)
    struct.pack_into(
        order + "QiiQQQQQQ",
        sub,
        0,
        *(0, dump_level, split, 0, 0),
        *((info_at, len(vmcoreinfo)) if vmcoreinfo else (0, 0)),
        *((notes_at, len(notes)) if notes else (0, 0)),
    )
    struct.pack_into(order + "QQQQQ", sub, 64, 0, 0, 0, 0, len(pages))
    sub[512 : 512 + len(vmcoreinfo)] = vmcoreinfo
    sub[512 + len(vmcoreinfo) : 512 + len(vmcoreinfo) + len(notes)] = notes
    at = 4 * block_size + 24 * len(pages)
    descriptors, data = b"", b""
    for page in pages:
        packed = zlib.compress(page)
        flags = 1
        if len(packed) >= len(page):
            packed, flags = page, 0
        descriptors += struct.pack(order + "QIIQ", at + len(data), len(packed), flags, 0)
        data += packed
    return bytes(header + sub + bitmap + bitmap) + descriptors + data


def flattened(data: bytes, *, pieces: int = 5000, end: bool = True) -> bytes:
    """The flattened stream of a file, its header written twice as makedumpfile and QEMU do."""
    stream = (b"makedumpfile\0\0\0\0" + struct.pack(">qq", 1, 1)).ljust(4096, b"\0")
    stream += struct.pack(">qq", 0, 4096) + b"KDUMP   ".ljust(4096, b"\xee")
    for at in range(0, len(data), pieces):
        piece = data[at : at + pieces]
        stream += struct.pack(">qq", at, len(piece)) + piece
    return stream + (struct.pack(">qq", -1, -1) if end else b"")


def debug_file(
    build_id: str | None = BUILD_ID,
    *,
    machine: int = EM_X86_64,
    order: str = "<",
    dwarf: bool = True,
    kind: int = ET_EXEC,
) -> bytes:
    """An ELF file with a build ID and, unless told otherwise, the DWARF of ``struct crafted``."""
    sections: list[tuple[str, int, bytes]] = []
    if build_id is not None:
        sections.append((".notes", 7, note(b"GNU", 3, bytes.fromhex(build_id), order)))
    if dwarf:
        abbreviations, information = _dwarf(order)
        sections.append((".debug_abbrev", 1, abbreviations))
        sections.append((".debug_info", 1, information))
    return _with_sections(sections, machine, order, kind)


def _dwarf(order: str) -> tuple[bytes, bytes]:
    """DWARF 4 of one compilation unit: ``struct crafted { int member; };``."""

    def abbreviation(code: int, tag: int, children: bool, *attributes: tuple[int, int]) -> bytes:
        data = bytes([code, tag, children])
        for attribute in attributes:
            data += bytes(attribute)
        return data + b"\0\0"

    name, byte_size, encoding, kind, location, language = 0x03, 0x0B, 0x3E, 0x49, 0x38, 0x13
    string, data1, reference = 0x08, 0x0B, 0x13
    abbreviations = (
        abbreviation(1, 0x11, True, (name, string), (language, data1))
        + abbreviation(2, 0x24, False, (name, string), (byte_size, data1), (encoding, data1))
        + abbreviation(3, 0x13, True, (name, string), (byte_size, data1))
        + abbreviation(4, 0x0D, False, (name, string), (kind, reference), (location, data1))
        + b"\0"
    )
    unit = b"\x01crafted.c\0\x0c"
    base_type = 11 + len(unit)
    unit += b"\x02int\0\x04\x05"
    unit += b"\x03crafted\0\x04"
    unit += b"\x04member\0" + struct.pack(order + "I", base_type) + b"\0"
    unit += b"\0\0"
    header = struct.pack(order + "IHIB", 7 + len(unit), 4, 0, 8)
    return abbreviations, header + unit


def _with_sections(
    sections: Sequence[tuple[str, int, bytes]], machine: int, order: str, kind: int
) -> bytes:
    names = b"\0"
    entries = [struct.pack(order + "IIQQQQIIQQ", *([0] * 10))]
    body = b""
    for name, section_type, data in (*sections, (".shstrtab", 3, b"")):
        at = len(names)
        names += name.encode() + b"\0"
        content = names if name == ".shstrtab" else data
        body += bytes(-len(body) % 8)
        fields = (at, section_type, 0, 0, 64 + len(body), len(content), 0, 0, 4, 0)
        entries.append(struct.pack(order + "IIQQQQIIQQ", *fields))
        body += content
    body += bytes(-len(body) % 8)
    ident = b"\x7fELF" + bytes([2, 1 if order == "<" else 2, 1, 0]) + bytes(8)
    header = struct.pack(
        order + "HHIQQQIHHHHHH",
        *(kind, machine, 1, 0, 0, 64 + len(body), 0, 64, 56, 0, 64),
        *(len(entries), len(entries) - 1),
    )
    return ident + header + body + b"".join(entries)
