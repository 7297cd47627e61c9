# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel that is only drgn types and a piece of memory map, of any shape and byte order."""

from __future__ import annotations

from collections.abc import Iterable

from drgn import (
    Architecture,
    FaultError,
    FindObjectFlags,
    Object,
    Platform,
    PlatformFlags,
    Program,
    Type,
    TypeEnumerator,
    TypeKindSet,
    TypeMember,
)

PAGE_BYTES = 64
#: Where the mock's memory map begins, and the first page frame that it describes.
MEMMAP = 0xFFFFEA0000000000
FIRST_PFN = 0x100

PG_HEAD = 6
PAGE_FLAGS = ("locked", "referenced", "uptodate", "dirty", "lru", "active", "head", "reserved")


class MockKernel:
    """
    A program with ``struct page``, the page types of one kernel, and writable struct pages.

    :param shape: ``"7.3"`` (own struct ptdesc, byte page types), ``"6.12"`` (own struct ptdesc with
        the older names), ``"6.11"`` (enum pagetype with inverted bits), ``"6.1"`` (no ptdesc).
    """

    def __init__(
        self, shape: str, *, little_endian: bool = True, pages: int = 256, memory: bool = True
    ) -> None:
        flags = PlatformFlags.IS_64_BIT
        if little_endian:
            flags |= PlatformFlags.IS_LITTLE_ENDIAN
        self.byteorder = "little" if little_endian else "big"
        # An architecture without special rules, so that the tests below mean all of them.
        self.prog = Program(
            Platform(Architecture.AARCH64 if little_endian else Architecture.S390X, flags)
        )
        self.shape = shape
        self.memory = bytearray(pages * PAGE_BYTES if memory else 0)
        #: Byte ranges of the memory map that are "not in the dump".
        self.holes: list[tuple[int, int]] = []
        self.types: dict[str, Type] = {}
        self.constants: dict[str, Object] = {}
        # Where physical memory would be seen, had this kernel a direct map.
        self.prog.cache["ptinspect_direct_map"] = 0xFFFF888000000000
        self._make_types()
        self._make_constants(pages)
        self.prog.register_type_finder("mock", self._find_type, enable_index=0)
        self.prog.register_object_finder("mock", self._find_object, enable_index=0)
        self.prog.add_memory_segment(MEMMAP, pages * PAGE_BYTES, self._read)

    # Memory

    def _read(self, address: int, count: int, offset: int, physical: bool) -> bytes:
        for start, end in self.holes:
            if offset < end and start < offset + count:
                raise FaultError("not in the dump", address)
        return bytes(self.memory[offset : offset + count])

    def put(self, pfn: int, offset: int, value: int, size: int) -> None:
        """Write an integer into the struct page of a page frame."""
        start = (pfn - FIRST_PFN) * PAGE_BYTES + offset
        self.memory[start : start + size] = value.to_bytes(size, self.byteorder)  # type: ignore[arg-type]

    def page(self, pfn: int) -> Object:
        return Object(self.prog, "struct page *", value=MEMMAP + (pfn - FIRST_PFN) * PAGE_BYTES)

    # Types

    def _find_type(
        self, prog: Program, kinds: TypeKindSet, name: str, filename: str | None
    ) -> Type | None:
        type_ = self.types.get(name)
        return type_ if type_ is not None and type_.kind in kinds else None

    def _find_object(
        self, prog: Program, name: str, flags: FindObjectFlags, filename: str | None
    ) -> Object | None:
        return self.constants.get(name)

    def _struct(self, name: str | None, size: int, members: Iterable[TypeMember]) -> Type:
        type_ = self.prog.struct_type(name, size, list(members))
        if name is not None:
            self.types[name] = type_
        return type_

    def _make_types(self) -> None:
        prog = self.prog
        self.ulong = ulong = prog.int_type("unsigned long", 8, False)
        self.uint = uint = prog.int_type("unsigned int", 4, False)
        int_ = prog.int_type("int", 4, True)
        void_pointer = prog.pointer_type(prog.void_type())
        list_head = self._struct(
            "list_head",
            16,
            [TypeMember(void_pointer, "next", 0), TypeMember(void_pointer, "prev", 64)],
        )
        callback_head = self._struct(
            "callback_head",
            16,
            [TypeMember(void_pointer, "next", 0), TypeMember(void_pointer, "func", 64)],
        )
        counter = prog.struct_type(None, 4, [TypeMember(int_, "counter", 0)])
        atomic = prog.typedef_type("atomic_t", counter)
        mm = self._struct("mm_struct", 8, [TypeMember(void_pointer, "pgd", 0)])
        mm_pointer = prog.pointer_type(mm)
        pgtable = prog.typedef_type("pgtable_t", void_pointer)
        spinlock = prog.typedef_type(
            "spinlock_t", self._struct("spinlock", 4, [TypeMember(int_, "rlock", 0)])
        )
        flags = ulong
        if self.shape == "7.3":
            wrapper = prog.struct_type(None, 8, [TypeMember(ulong, "f", 0)])
            flags = prog.typedef_type("memdesc_flags_t", wrapper)
        page = [
            TypeMember(flags, "flags", 0),
            TypeMember(list_head, "lru", 8 * 8),
            TypeMember(callback_head, "callback_head", 8 * 8),
            TypeMember(void_pointer, "mapping", 24 * 8),
            TypeMember(ulong, "__folio_index" if self.shape == "7.3" else "index", 32 * 8),
            TypeMember(ulong, "private", 40 * 8),
            TypeMember(uint, "page_type", 48 * 8),
            TypeMember(atomic, "_refcount", 52 * 8),
            TypeMember(ulong, "memcg_data", 56 * 8),
            TypeMember(ulong, "compound_info" if self.shape == "7.3" else "compound_head", 8 * 8),
        ]
        if self.shape in ("6.1", "6.11"):
            page += [
                TypeMember(ulong, "_pt_pad_1", 8 * 8),
                TypeMember(pgtable, "pmd_huge_pte", 16 * 8),
                TypeMember(mm_pointer, "pt_mm", 32 * 8),
                TypeMember(atomic, "pt_frag_refcount", 32 * 8),
                TypeMember(spinlock, "ptl", 40 * 8),
            ]
        self._struct("page", PAGE_BYTES, page)
        self._struct("folio", 2 * PAGE_BYTES, [TypeMember(ulong, "_flags_1", 64 * 8)])
        if self.shape in ("7.3", "6.12"):
            self._make_ptdesc(
                flags, list_head, callback_head, pgtable, mm_pointer, atomic, spinlock
            )

    def _make_ptdesc(
        self,
        flags: Type,
        list_head: Type,
        callback_head: Type,
        pgtable: Type,
        mm_pointer: Type,
        atomic: Type,
        spinlock: Type,
    ) -> None:
        prog = self.prog
        inner = prog.struct_type(
            None,
            16,
            [TypeMember(self.ulong, "_pt_pad_1", 0), TypeMember(pgtable, "pmd_huge_pte", 64)],
        )
        first = prog.union_type(
            None,
            16,
            [
                TypeMember(callback_head, "pt_rcu_head", 0),
                TypeMember(list_head, "pt_list", 0),
                TypeMember(inner, None, 0),
            ],
        )
        second = prog.union_type(
            None,
            8,
            [
                TypeMember(self.ulong, "pt_index", 0),
                TypeMember(mm_pointer, "pt_mm", 0),
                TypeMember(atomic, "pt_frag_refcount", 0),
                TypeMember(atomic, "pt_share_count", 0),
            ],
        )
        self._struct(
            "ptdesc",
            PAGE_BYTES,
            [
                TypeMember(flags, "pt_flags" if self.shape == "7.3" else "__page_flags", 0),
                TypeMember(first, None, 8 * 8),
                TypeMember(self.ulong, "__page_mapping", 24 * 8),
                TypeMember(second, None, 32 * 8),
                TypeMember(spinlock, "ptl", 40 * 8),
                TypeMember(self.uint, "__page_type", 48 * 8),
                TypeMember(atomic, "__page_refcount", 52 * 8),
                TypeMember(self.ulong, "pt_memcg_data", 56 * 8),
            ],
        )

    # Constants and variables

    def _make_constants(self, pages: int) -> None:
        prog = self.prog
        enumerators = [TypeEnumerator(f"PG_{name}", bit) for bit, name in enumerate(PAGE_FLAGS)] + [
            TypeEnumerator("__NR_PAGEFLAGS", len(PAGE_FLAGS))
        ]
        self._add_enum("pageflags", enumerators)
        if self.shape in ("7.3", "6.12"):
            self._add_enum("pagetype", [TypeEnumerator("PGTY_table", 0xF2)])
        elif self.shape == "6.11":
            self._add_enum(
                "pagetype",
                [
                    TypeEnumerator("PG_table", 0x10000000),
                    TypeEnumerator("PAGE_TYPE_BASE", 0x80000000),
                ],
            )
        if self.shape == "7.3":
            self._add_enum("pt_flags", [TypeEnumerator("PT_kernel", 1)])
        for name, value in (
            ("PAGE_SHIFT", 12),
            ("PAGE_SIZE", 4096),
            ("ARCH_PFN_OFFSET", FIRST_PFN),
            ("max_mapnr", pages),
        ):
            self.constants[name] = Object(prog, self.ulong, value=value)
        self.constants["mem_map"] = Object(
            prog, prog.pointer_type(self.types["page"]), value=MEMMAP
        )

    def _add_enum(self, tag: str, enumerators: list[TypeEnumerator]) -> None:
        type_ = self.prog.enum_type(tag, self.uint, enumerators)
        self.types[tag] = type_
        for enumerator in enumerators:
            self.constants[enumerator.name] = Object(self.prog, type_, value=enumerator.value)


#: What the constructor writes into page_type, by shape.
CANONICAL_TYPE = {
    "7.3": 0xF2000000,
    "6.12": 0xF2000000,
    "6.11": 0xEFFFFFFF,
    "6.1": 0xFFFFFDFF,
}

NO_TYPE = 0xFFFFFFFF
