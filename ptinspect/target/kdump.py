# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Headers of kdump files (makedumpfile's compressed dumps), plain or in the flattened format.

drgn reads the memory in them through libkdumpfile. What is read here tells it what the headers of
some files leave out (QEMU 7.2 writes no release, and for ppc64 not even the machine), and whether
the file is whole: libkdumpfile would notice only when it comes to the missing page.

Layout: struct disk_dump_header and kdump_sub_header of makedumpfile (diskdump_mod.h,
IMPLEMENTATION), which QEMU follows (include/sysemu/dump.h).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Callable

import numpy as np

from ptinspect.target.elf import NT_PRSTATUS, Note, parse_notes

SIGNATURE = b"KDUMP   "
FLATTENED_SIGNATURE = b"makedumpfile\0\0\0\0"

#: The flattened format's own header, before the first record.
_FLATTENED_HEADER_BYTES = 4096
#: A record: offset in the real file, size; big-endian. A negative offset ends the stream.
_RECORD = struct.Struct(">qq")

_VERSION_OFFSET = 8
_UTSNAME_OFFSET = 12
_UTSNAME_STRING = 65
_MACHINE_INDEX = 4
#: status, block_size, sub_hdr_size, bitmap_blocks, max_mapnr (of a 64-bit kernel's header).
_FIELDS_OFFSET = 424
_FIELDS = "IIiII"
#: phys_base, dump_level, split, start_pfn, end_pfn; then offset and size of VMCOREINFO, of the
#: CPUs' notes, and of the record of erased data.
_SUB_HEADER = "QiiQQQQQQQQ"
#: offset, size, flags, page_flags of each page.
_PAGE_DESCRIPTOR_BYTES = 24

#: Flags in ``status``.
_INCOMPLETE = 0x8
_EXCLUDED_VMEMMAP = 0x10

#: How many of the last page descriptors are looked at to find the end of the data.
_LAST_DESCRIPTORS = 4096
_MOST_NOTE_BYTES = 1 << 26
#: Bitmaps are of 32 MiB for each TiB of memory.
_MOST_BITMAP_BYTES = 1 << 30
#: How much of a bitmap becomes an array at a time.
_BITMAP_CHUNK_BYTES = 1 << 20

#: Size of struct elf_prstatus by architecture, for headers without a machine. x86_64 and s390x have
#: the same size but not the same byte order.
_PRSTATUS_ARCHITECTURES = {
    (336, True): "x86_64",
    (336, False): "s390x",
    (376, True): "riscv64",
    (392, True): "aarch64",
    (504, True): "ppc64le",
    # QEMU writes the headers of a pseries guest in big-endian order whatever the kernel's is.
    (504, False): "ppc64le",
}

#: Reads the (unflattened) file: offset, size -> as many of the bytes as there are.
Reader = Callable[[int, int], bytes]


class KdumpError(Exception):
    """The file is not a whole, well-formed kdump file; the message says what is wrong with it."""


@dataclass(frozen=True)
class Kdump:
    """What the headers of a kdump file say."""

    flattened: bool
    #: Byte order of the headers.
    little_endian: bool
    #: utsname's machine, or what the size of the CPUs' notes tells; None if neither does.
    machine: str | None
    #: Bytes of a page in this file. Not always the kernel's page size.
    block_size: int
    #: One bit for each page: whether it is in the file.
    bitmap: bytes = field(repr=False)
    #: The text of VMCOREINFO, if the file has it.
    vmcoreinfo: bytes | None
    #: makedumpfile ran out of space and said so.
    incomplete: bool
    #: The parts of the memory map that describe no page in the file were left out.
    excluded_vmemmap: bool
    #: makedumpfile's -d: which kinds of page were left out. QEMU writes 1, but leaves none out.
    dump_level: int

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Start and size in bytes of each range of physical memory that the file has."""
        start: int | None = None
        for at in range(0, len(self.bitmap), _BITMAP_CHUNK_BYTES):
            chunk = np.frombuffer(self.bitmap[at : at + _BITMAP_CHUNK_BYTES], np.uint8)
            # The first page is a byte's lowest bit.
            bits = np.unpackbits(chunk, bitorder="little").view(np.int8)
            edges = np.flatnonzero(np.diff(bits, prepend=np.int8(start is not None)))
            for page in (edges + 8 * at).tolist():
                if start is None:
                    start = page
                else:
                    yield start * self.block_size, (page - start) * self.block_size
                    start = None
        if start is not None:
            yield start * self.block_size, (8 * len(self.bitmap) - start) * self.block_size


def read_kdump(fd: int) -> Kdump:
    """
    Read the headers of a kdump file, and make sure that the file is whole.

    :raises KdumpError: if it is not
    """
    size = os.fstat(fd).st_size
    flattened = os.pread(fd, len(FLATTENED_SIGNATURE), 0) == FLATTENED_SIGNATURE
    read = _Flattened(fd, size).read if flattened else _plain_reader(fd)
    start = read(0, 4096)
    if not start.startswith(SIGNATURE):
        raise KdumpError(
            "a flattened file, but not of a kdump-compressed dump: make it a plain one first "
            "(makedumpfile -R NEW < THIS)"
        )
    if len(start) < _FIELDS_OFFSET + struct.calcsize("=" + _FIELDS):
        raise KdumpError("truncated dump: it ends within its header")
    order = _byte_order(start)
    fields = struct.Struct(order + _FIELDS)
    status, block_size, sub_blocks, bitmap_blocks, _ = fields.unpack_from(start, _FIELDS_OFFSET)
    if block_size & (block_size - 1) or not 4096 <= block_size <= 1 << 20 or sub_blocks < 1:
        raise KdumpError("its header is malformed, or of a 32-bit kernel")
    sub = struct.Struct(order + _SUB_HEADER)
    raw = read(block_size, sub.size)
    if len(raw) < sub.size:
        raise KdumpError("truncated dump: it ends within its header")
    _, dump_level, split, _, _, *parts = sub.unpack(raw)
    if split:
        raise KdumpError("one part of a split dump; join the parts with makedumpfile --reassemble")
    info, notes, _ = (_part(read, *parts[at : at + 2]) for at in (0, 2, 4))
    incomplete = bool(status & _INCOMPLETE)
    # After the headers come two bitmaps (memory that exists, pages in the file), then a descriptor
    # for each page in the file, then the pages.
    bitmaps = (1 + sub_blocks) * block_size
    half = bitmap_blocks * block_size // 2
    if half > _MOST_BITMAP_BYTES:
        raise KdumpError("its header is malformed: a bitmap without measure")
    bitmap = read(bitmaps + half, half)
    if not incomplete:
        if len(bitmap) < half:
            raise KdumpError("truncated dump: it ends within its headers")
        if not flattened:
            # A flattened stream is whole if its end marker is there.
            _check_data(read, size, order, bitmaps + 2 * half, _count_bits(bitmap))
    machine: str | None = _utsname(start, _MACHINE_INDEX)
    if not machine or machine == "Unknown":
        machine = _machine_of(parse_notes(notes, order == "<"), order == "<")
    return Kdump(
        flattened=flattened,
        little_endian=order == "<",
        machine=machine,
        block_size=block_size,
        bitmap=bitmap,
        vmcoreinfo=info or None,
        incomplete=incomplete,
        excluded_vmemmap=bool(status & _EXCLUDED_VMEMMAP),
        dump_level=dump_level,
    )


def _part(read: Reader, offset: int, size: int) -> bytes:
    """
    What the sub-header points to.

    libkdumpfile maps all of these into memory; one beyond the end of the file would end the process
    with SIGBUS.
    """
    data = read(offset, min(size, _MOST_NOTE_BYTES)) if size else b""
    if len(data) < size:
        raise KdumpError("its header is malformed: a note beyond the end of the file")
    return data


def _plain_reader(fd: int) -> Reader:
    # No file reaches so far; a garbled header may.
    return lambda offset, size: os.pread(fd, size, offset) if offset < 1 << 62 else b""


def _byte_order(start: bytes) -> str:
    for order in "<>":
        (version,) = struct.unpack_from(order + "I", start, _VERSION_OFFSET)
        if 1 <= version <= 255:
            return order
    raise KdumpError("its header is malformed: no version")


def _utsname(start: bytes, index: int) -> str:
    offset = _UTSNAME_OFFSET + index * _UTSNAME_STRING
    return start[offset : offset + _UTSNAME_STRING].split(b"\0")[0].decode("ascii", "replace")


def _machine_of(notes: Iterator[Note], little_endian: bool) -> str | None:
    for note in notes:
        if note.name == b"CORE" and note.type == NT_PRSTATUS:
            return _PRSTATUS_ARCHITECTURES.get((len(note.desc), little_endian))
    return None


def _check_data(read: Reader, size: int, order: str, descriptors: int, count: int) -> None:
    """
    Check that the file reaches to the end of its last page.

    :param descriptors: Offset of the page descriptors.
    :param count: Their number.
    """
    end = descriptors + count * _PAGE_DESCRIPTOR_BYTES
    if size >= end:
        last = min(count, _LAST_DESCRIPTORS)
        table = read(end - last * _PAGE_DESCRIPTOR_BYTES, last * _PAGE_DESCRIPTOR_BYTES)
        dtype = np.dtype([("offset", "u8"), ("size", "u4"), ("flags", "u4"), ("page_flags", "u8")])
        pages = np.frombuffer(table, dtype.newbyteorder("<" if order == "<" else ">"))
        if len(pages):
            end = max(end, int((pages["offset"] + pages["size"]).max()))
    if size < end:
        raise KdumpError(f"truncated dump: it has {size} bytes of at least {end}; copy it again")


def _count_bits(bitmap: bytes) -> int:
    total = 0
    for at in range(0, len(bitmap), _BITMAP_CHUNK_BYTES):
        chunk = np.frombuffer(bitmap[at : at + _BITMAP_CHUNK_BYTES], np.uint8)
        total += int(np.count_nonzero(np.unpackbits(chunk)))
    return total


class _Flattened:
    """
    The front of the file that a flattened stream contains.

    makedumpfile writes this format to pipes, QEMU to any destination: every piece of the file comes
    as a record with its offset, and headers come twice, the second time complete.
    """

    #: Headers, notes and bitmaps lie before this; the pages behind are left to libkdumpfile.
    front_bytes = 1 << 31

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        #: Start and size in the contained file, and offset in the stream, in order of writing.
        self._pieces: list[tuple[int, int, int]] = []
        at = _FLATTENED_HEADER_BYTES
        while True:
            raw = os.pread(fd, _RECORD.size, at)
            if len(raw) < _RECORD.size:
                raise KdumpError("truncated dump: the flattened stream has no end")
            start, length = _RECORD.unpack(raw)
            if start < 0:
                break
            at += _RECORD.size
            if length <= 0:
                raise KdumpError("the flattened stream is malformed")
            if at + length > size:
                raise KdumpError("truncated dump: the flattened stream has no end")
            if start < self.front_bytes:
                self._pieces.append((start, length, at))
            at += length

    def read(self, offset: int, size: int) -> bytes:
        """Read from the contained file; gaps between what was written are zero."""
        data = bytearray(size)
        end = 0
        for start, length, at in self._pieces:
            begin, stop = max(offset, start), min(offset + size, start + length)
            if begin < stop:
                data[begin - offset : stop - offset] = os.pread(
                    self._fd, stop - begin, at + begin - start
                )
                end = max(end, stop - offset)
        return bytes(data[:end])
