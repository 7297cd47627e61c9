# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
VMCOREINFO: the kernel's own note about itself, and how to recover it when a target lacks it.

The kernel keeps the note in its memory (kernel/vmcore_info.c: vmcoreinfo_note, before 6.9 in
kernel/crash_core.c). drgn cannot do without it: the address of the kernel's page tables, the KASLR
offset and the build ID are there and nowhere else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Callable, Optional

from ptinspect.errors import TargetError
from ptinspect.target.elf import ET_CORE, MAGIC, ElfError, parse_notes, read_elf
from ptinspect.target.wording import reason

NAME = b"VMCOREINFO"

#: An ELF note's header (three words), its name padded to a multiple of 4, then the text.
_HEADER_BYTES = 12
_PADDED_NAME = NAME + b"\0\0"
_TEXT_START = b"OSRELEASE="

#: The text is at most one page (VMCOREINFO_BYTES), and no architecture has pages above 64 KiB.
_MOST_TEXT_BYTES = 1 << 16
_LEAST_TEXT_BYTES = 64

#: Where an s390 kernel leaves the physical address of its note in the lowcore
#: (arch/s390/include/asm/lowcore.h: struct lowcore.vmcore_info).
_LOWCORE_VMCORE_INFO = 0xE0C

#: Bytes searched in one read.
_CHUNK_BYTES = 1 << 20
_LEAST_CHUNK_BYTES = 4096

#: Offset of ``release`` in ``struct new_utsname``: two strings of __NEW_UTS_LEN + 1 before it.
_UTSNAME_RELEASE = 2 * 65
_UTSNAME_STRING = 65

#: Reads memory: address, size -> the bytes, or None where there are none.
Reader = Callable[[int, int], Optional[bytes]]


def parse(text: bytes) -> dict[str, str]:
    """The ``KEY=value`` lines of a note's text."""
    fields: dict[str, str] = {}
    for line in text.rstrip(b"\0").split(b"\n"):
        key, equals, value = line.partition(b"=")
        if equals:
            fields[key.decode("ascii", "replace")] = value.decode("utf-8", "replace")
    return fields


def problem(text: bytes) -> str | None:
    """What makes a text unfit to be the VMCOREINFO of a kernel, or None if nothing does."""
    fields = parse(text)
    if not fields.get("OSRELEASE"):
        return "it has no OSRELEASE"
    size = page_size(text)
    if size & (size - 1) or not 4096 <= size <= 65536:
        return f"its PAGESIZE is {fields.get('PAGESIZE', 'missing')}"
    # The one is needed to translate addresses, the other to check that they come out right; all
    # architectures have both.
    for symbol in ("SYMBOL(swapper_pg_dir)", "SYMBOL(init_uts_ns)"):
        value = fields.get(symbol)
        if value is None:
            return f"it has no {symbol}"
        if not _is_hexadecimal(value):
            return f"its {symbol} is not an address"
    return None


def page_size(text: bytes) -> int:
    """The kernel's page size in bytes, or 0 if the note does not tell it."""
    value = parse(text).get("PAGESIZE", "")
    return int(value) if value.isascii() and value.isdigit() else 0


def read_file(path: Path) -> bytes:
    """
    Read what --vmcoreinfo names: the text, a whole note, or a core file with one.

    :raises TargetError: if it is none of these
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_TEXT_BYTES)
            is_elf = data.startswith(MAGIC)
            text = _note_of_core(file.fileno()) if is_elf else _text_of_note(data)
    except (OSError, ElfError) as error:
        raise TargetError(f"--vmcoreinfo {path}: {reason(error)}") from None
    why = problem(text)
    if why:
        raise TargetError(f"--vmcoreinfo {path}: not a VMCOREINFO: {why}")
    return text


def _note_of_core(fd: int) -> bytes:
    elf = read_elf(fd)
    if elf.type == ET_CORE:
        for note in elf.notes():
            if note.name == NAME:
                return note.desc
    raise ElfError("an ELF file without a VMCOREINFO note")


def _text_of_note(data: bytes) -> bytes:
    """The text of a note with its ELF header, or the data themselves if they have none."""
    for little_endian in (True, False):
        for note in parse_notes(data, little_endian):
            if note.name == NAME:
                return note.desc
            break
    return data


def from_lowcore(read: Reader) -> bytes | None:
    """
    Recover the note of an s390 kernel through the pointer in its lowcore.

    :param read: Reads absolute (not prefixed) physical memory.
    :return: its text; None if the kernel left no pointer or what it points to is no such note
    """
    raw = read(_LOWCORE_VMCORE_INFO, 8)
    if raw is None:
        return None
    (address,) = struct.unpack(">Q", raw)
    return _note_at(read, address) if address else None


def search(read: Reader, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """
    Search physical memory for notes.

    Stale copies (of a kernel that was booted before, of a file in the page cache) look the same;
    the caller has to check each against the memory that it describes (see *matches*).

    :param ranges: ``(start, size)`` of the memory to search.
    :return: physical address and text of each plausible note
    """
    needle = _PADDED_NAME + _TEXT_START
    overlap = _HEADER_BYTES + len(needle)
    for start, size in sorted(ranges, reverse=True):
        # From the end: the kernel allocates the note while it boots, mostly from high memory.
        for chunk in reversed(range(start, start + size, _CHUNK_BYTES)):
            end = min(chunk + _CHUNK_BYTES + overlap, start + size)
            for address, data in _readable(read, chunk, end):
                found = data.find(needle)
                while found >= 0:
                    note = address + found - _HEADER_BYTES
                    # What begins in the overlap is found in the chunk that it belongs to.
                    if chunk <= note < chunk + _CHUNK_BYTES:
                        text = _note_at(read, note)
                        if text is not None:
                            yield note, text
                    found = data.find(needle, found + 1)


def _readable(read: Reader, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """
    Read what can be read of a range, in pieces.

    The pieces need not overlap: a note starts at a page boundary, where a hole may begin.
    """
    data = read(start, end - start)
    if data is not None:
        yield start, data
    elif end - start > _LEAST_CHUNK_BYTES:
        middle = (start + end) // 2 // _LEAST_CHUNK_BYTES * _LEAST_CHUNK_BYTES
        middle = max(middle, start + _LEAST_CHUNK_BYTES)
        yield from _readable(read, middle, end)
        yield from _readable(read, start, middle)


def matches(text: bytes, read_virtual: Reader) -> bool | None:
    """
    Whether a note describes the memory of a target.

    :param read_virtual: Reads kernel virtual memory as translated by means of this very note.
    :return: whether ``init_uts_ns``, where the note says it is, names the note's release; None if
        that cannot be read
    """
    fields = parse(text)
    try:
        address = int(fields["SYMBOL(init_uts_ns)"], 16)
        # Kernels before 5.9 do not give the offset: kref (4 bytes) came first then.
        address += int(fields.get("OFFSET(uts_namespace.name)", "4"))
    except (KeyError, ValueError):
        return None
    release = read_virtual(address + _UTSNAME_RELEASE, _UTSNAME_STRING)
    if release is None:
        return None
    return release.split(b"\0")[0] == fields["OSRELEASE"].encode()


def _note_at(read: Reader, address: int) -> bytes | None:
    """The text of the note at a physical address, or None if there is none."""
    if address < 0:
        return None
    head = read(address, _HEADER_BYTES + len(_PADDED_NAME))
    if head is None or not head.endswith(_PADDED_NAME):
        return None
    for order in "<>":
        name_size, text_size, kind = struct.unpack_from(order + "III", head)
        if name_size in (len(NAME), len(NAME) + 1) and kind == 0:
            break
    else:
        return None
    if not _LEAST_TEXT_BYTES <= text_size <= _MOST_TEXT_BYTES:
        return None
    text = read(address + len(head), text_size)
    return None if text is None or problem(text) else text


def _is_hexadecimal(value: str) -> bool:
    try:
        int(value, 16)
    except ValueError:
        return False
    return True
