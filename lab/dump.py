# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Guest dumps as QEMU writes them: an ELF reader, and a drgn Program over it for any architecture.

drgn opens x86_64 and aarch64 dumps itself. Where the machine has no vmcoreinfo device the kernel's
note is not in the file, but it is in the dumped memory, and is found there.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import drgn
import numpy as np

from lab.errors import LabError

#: sizeof(Elf64_Ehdr)
_HEADER_BYTES = 64
PT_LOAD = 1
PT_NOTE = 4
EM_PPC64 = 21

#: e_machine of each architecture that the lab knows, as drgn calls it.
_MACHINES = {
    62: drgn.Architecture.X86_64,
    22: drgn.Architecture.S390X,
    183: drgn.Architecture.AARCH64,
    EM_PPC64: drgn.Architecture.PPC64,
    243: drgn.Architecture.RISCV64,
}

#: Bytes of region and segment tables, and of page tables.
_S390_CRST_BYTES, _S390_PAGE_TABLE_BYTES = 0x4000, 0x800

#: s390 lowcore: the physical address of the kernel's note (arch/s390/include/asm/lowcore.h).
_S390_LOWCORE_VMCOREINFO = 0xE0C


class Segment(NamedTuple):
    """A PT_LOAD: bytes of the file, then zeroes up to the size in memory."""

    physical: int
    offset: int
    file_size: int
    size: int


class ElfDump:
    """
    An ELF dump of physical memory.

    :raises LabError: if the file is no 64-bit ELF core
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if self.data[:5] != b"\x7fELF\x02":
            raise LabError(f"{path} is not a 64-bit ELF file")
        self.order = "<" if self.data[5] == 1 else ">"
        (self.type, self.machine) = self._unpack("HH", 16)
        #: Byte order of the memory. QEMU writes the headers of ppc64 dumps in the order in which
        #: the CPU starts, big-endian; the lab's ppc64 kernels are all little-endian.
        self.memory_order = "<" if self.machine == EM_PPC64 else self.order
        if self.type != 4 or self.machine not in _MACHINES:
            raise LabError(f"{path} is not a core file of a known architecture")
        (table,) = self._unpack("Q", 32)
        (self.flags,) = self._unpack("I", 48)
        entry_size, count = self._unpack("HH", 54)
        self.notes = b""
        self.segments: list[Segment] = []
        for at in range(table, table + entry_size * count, entry_size):
            kind, _, offset, _, physical, file_size, size, _ = self._unpack("IIQQQQQQ", at)
            if kind == PT_NOTE:
                self.notes += self.data[offset : offset + file_size]
            elif kind == PT_LOAD:
                self.segments.append(Segment(physical, offset, file_size, size))
        self.segments.sort()
        self._starts = np.array([segment.physical for segment in self.segments], dtype=np.uint64)

    def _unpack(self, form: str, at: int) -> tuple[Any, ...]:
        return struct.unpack_from(self.order + form, self.data, at)

    def close(self) -> None:
        """Let go of the file."""
        self.data.close()

    @property
    def platform(self) -> drgn.Platform:
        """The platform, as drgn wants it."""
        flags = drgn.PlatformFlags.IS_64_BIT
        if self.memory_order == "<":
            flags |= drgn.PlatformFlags.IS_LITTLE_ENDIAN
        return drgn.Platform(_MACHINES[self.machine], flags)

    def read(self, address: int, count: int) -> bytes:
        """
        Read physical memory.

        :raises drgn.FaultError: where the dump has none
        """
        parts: list[bytes] = []
        while count:
            index = int(np.searchsorted(self._starts, np.uint64(address), side="right")) - 1
            segment = self.segments[index] if index >= 0 else None
            if segment is None or address >= segment.physical + segment.size:
                raise drgn.FaultError("not in the dump", address)
            skip = address - segment.physical
            take = min(count, segment.size - skip)
            in_file = max(0, min(take, segment.file_size - skip))
            start = segment.offset + skip
            parts.append(self.data[start : start + in_file] + bytes(take - in_file))
            address += take
            count -= take
        return b"".join(parts)

    def _note(self, data: bytes, at: int, order: str) -> tuple[bytes, bytes, int] | None:
        """Get name, descriptor and end of the note at an offset."""
        if at + 12 > len(data):
            return None
        name_size, size, _ = struct.unpack_from(order + "III", data, at)
        body = at + 12 + (name_size + 3) // 4 * 4
        return (
            data[at + 12 : at + 12 + name_size].rstrip(b"\0"),
            data[body : body + size],
            body + (size + 3) // 4 * 4,
        )

    def vmcoreinfo(self) -> bytes:
        """
        Get the text of the kernel's note, from the file or else from the memory in it.

        :raises LabError: if there is none
        """
        at: int = 0
        while (note := self._note(self.notes, at, self.order)) is not None:
            name, text, at = note
            if name == b"VMCOREINFO":
                return text
        try:
            if _MACHINES[self.machine] is drgn.Architecture.S390X:
                pointer = self.read(_S390_LOWCORE_VMCOREINFO, 8)
                found = self._note(
                    self.read(int.from_bytes(pointer, "big"), 4096), 0, self.memory_order
                )
                if found is not None and found[1].startswith(b"OSRELEASE="):
                    return found[1]
        except drgn.FaultError:
            pass
        return self._search_vmcoreinfo()

    def _search_vmcoreinfo(self) -> bytes:
        """Find the note in the dumped memory: its name, followed by its first line."""
        at = -1
        while (at := self.data.find(b"VMCOREINFO\0\0OSRELEASE=", at + 1)) >= 0:
            note = self._note(self.data[max(at - 12, 0) : at + 8192], 0, self.memory_order)
            if at >= 12 and note is not None and note[0] == b"VMCOREINFO" and len(note[1]) < 8192:
                return note[1]
        raise LabError(f"{self.path} has no VMCOREINFO note, nor has the memory in it")


def open_dump(path: Path, vmlinux: Path) -> drgn.Program:
    """
    Open a dump of any architecture as a kernel, with its debug information.

    :raises LabError: if it is no dump of a kernel
    """
    dump = ElfDump(path)
    program = drgn.Program(dump.platform)

    def read(address: int, count: int, offset: int, physical: bool) -> bytes:
        try:
            return dump.read(address, count)
        except drgn.FaultError:
            if count != _S390_CRST_BYTES or dump.platform.arch is not drgn.Architecture.S390X:
                raise
            # drgn reads a page table of s390 as if it were as long as the tables above it: what
            # lies behind it may not be there.
            return dump.read(address, _S390_PAGE_TABLE_BYTES).ljust(count, b"\0")

    program.add_memory_segment(0, (1 << 64) - 1, read, physical=True)
    program.set_linux_kernel_custom(dump.vmcoreinfo(), False)
    program.load_debug_info([str(vmlinux)])
    return program


class Pages(NamedTuple):
    """The memory map of one dump as arrays with an element a page frame, from PFN 0 on."""

    page_size: int
    exists: np.ndarray[Any, np.dtype[np.bool_]]  #: there is a struct page, and it could be read
    raw: np.ndarray[Any, np.dtype[np.uint8]]  #: (frames, sizeof(struct page))
    order: str

    def word(self, offset: int, size: int = 8) -> np.ndarray[Any, np.dtype[Any]]:
        """Get one member of each page, in the host's byte order."""
        column = np.ascontiguousarray(self.raw[:, offset : offset + size])
        return column.view(f"{self.order}u{size}").ravel().astype(f"u{size}")


def read_pages(program: drgn.Program) -> Pages:
    """Read every struct page of every node."""
    from drgn.helpers.linux.mm import pfn_to_page
    from drgn.helpers.linux.mmzone import for_each_online_pgdat

    size = drgn.sizeof(program.type("struct page"))
    spans = [
        (int(node.node_start_pfn), int(node.node_start_pfn + node.node_spanned_pages))
        for node in for_each_online_pgdat(program)
    ]
    frames = max(end for _, end in spans)
    exists = np.zeros(frames, dtype=np.bool_)
    raw = np.zeros((frames, size), dtype=np.uint8)
    step = 512
    for start, end in spans:
        for at in range(start, end, step):
            count = min(step, end - at)
            try:
                data = program.read(pfn_to_page(program, at), count * size)
            except drgn.FaultError:
                continue  # a hole: no memory map there
            raw[at : at + count] = np.frombuffer(data, dtype=np.uint8).reshape(count, size)
            exists[at : at + count] = True
    platform = program.platform
    assert platform is not None
    little = platform.flags & drgn.PlatformFlags.IS_LITTLE_ENDIAN
    return Pages(int(program["PAGE_SIZE"]), exists, raw, "<" if little else ">")


def typed_pages(program: drgn.Program, pages: Pages) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """
    Tell which page frames carry the page-table page type (include/linux/page-flags.h).

    From 6.12 on the type is the top byte, PGTY_table; before, a cleared bit of an otherwise
    set word.
    """
    types = pages.word(drgn.offsetof(program.type("struct page"), "page_type"), 4)
    try:
        table = int(program.constant("PGTY_table"))
    except LookupError:
        return np.asarray(pages.exists & ((types & 0xF0000200) == 0xF0000000))
    return np.asarray(pages.exists & (types >> 24 == table))


def count_typed(program: drgn.Program, pages: Pages) -> dict[str, int]:
    """
    Count the typed pages as :func:`nr_page_table_pages` counts them.

    :return: ``heads`` (descriptors), and ``pages`` with the tails of compound ones
    """
    typed = typed_pages(program, pages)
    tail = tails(program, pages)
    heads = np.where(tail, 0, np.arange(len(typed)))
    owner = np.maximum.accumulate(heads)
    return {
        "heads": int(np.count_nonzero(typed & ~tail)),
        "pages": int(np.count_nonzero(typed & ~tail) + np.count_nonzero(typed[owner] & tail)),
    }


def tails(program: drgn.Program, pages: Pages) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Tell which page frames are tails of compound pages (bit 0 of the word at the lru)."""
    page = program.type("struct page")
    for name in ("compound_info", "compound_head"):
        try:
            return np.asarray(pages.word(drgn.offsetof(page, name)) & 1 == 1)
        except LookupError:
            continue
    raise LabError("struct page has neither compound_info nor compound_head")


def nr_page_table_pages(program: drgn.Program) -> dict[str, int]:
    """
    Read NR_PAGETABLE: the global counter and what each CPU has not added yet (mm/vmstat.c).

    :return: ``global``, ``remainder`` and ``exact``, in pages
    """
    from drgn.helpers.linux.cpumask import for_each_online_cpu
    from drgn.helpers.linux.mmzone import for_each_online_pgdat
    from drgn.helpers.linux.percpu import per_cpu_ptr

    item = int(program.constant("NR_PAGETABLE"))
    total = int(program["vm_node_stat"][item].counter)
    remainder = sum(
        int(per_cpu_ptr(node.per_cpu_nodestats, cpu).vm_node_stat_diff[item])
        for node in for_each_online_pgdat(program)
        for cpu in for_each_online_cpu(program)
    )
    return {"global": total, "remainder": remainder, "exact": total + remainder}


def move_program_headers(path: Path) -> None:
    """
    Put the program headers of an ELF dump right behind its header, and drop the section headers.

    QEMU writes the section headers first, and makedumpfile then does not find the others.

    :raises LabError: if it is no 64-bit ELF file
    """
    path.chmod(0o600)
    with path.open("r+b") as stream:
        header = bytearray(stream.read(_HEADER_BYTES))
        if header[:5] != b"\x7fELF\x02":
            raise LabError(f"{path} is not a 64-bit ELF file")
        order = "<" if header[5] == 1 else ">"
        (table,) = struct.unpack_from(order + "Q", header, 32)
        entry_size, count = struct.unpack_from(order + "HH", header, 54)
        stream.seek(table)
        entries = stream.read(entry_size * count)
        struct.pack_into(order + "QQ", header, 32, len(header), 0)
        struct.pack_into(order + "HHH", header, 58, 0, 0, 0)
        stream.seek(0)
        stream.write(header + entries)
