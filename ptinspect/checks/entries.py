# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Single entries: the bits that each architecture gives them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ptinspect.checks.context import Context, Rows
from ptinspect.checks.leaves import Batch, leaf_findings, question, suspects
from ptinspect.checks.model import Finding, NotApplicableError, Severity, Tally
from ptinspect.checks.registry import invariant
from ptinspect.kernel.paging import EntryClass, Paging
from ptinspect.memory import BoolArray


def _value_findings(
    context: Context,
    rows: Rows,
    slots: npt.NDArray[np.int64],
    values: npt.NDArray[np.uint64],
    message: str,
    **evidence: int,
) -> Iterator[Finding]:
    for row, slot, value in zip(rows.tolist(), slots.tolist(), values.tolist()):
        yield context.slot_finding(row, slot, value, message, **evidence)


#: Bits of x86 entries (arch/x86/include/asm/pgtable_types.h).
_X86_TABLE = 0x63
_X86_USER, _X86_NX, _X86_NOPTISHADOW = 1 << 2, 1 << 63, 1 << 58
_X86_ACCESSED = 1 << 5


def _x86_allowed(context: Context, level: int, user: bool) -> tuple[int, int]:
    """Get which bits a table entry may have, and which it must have."""
    paging = context.paging
    address = paging.levels[level].table_address[0].mask
    encryption = (1 << 52) - 4096 & ~address
    bits = _x86_phys_bits(context)
    if bits is not None:
        address &= (1 << bits) - 1
    allowed = address | encryption | _X86_TABLE | _X86_USER
    top = len(paging.levels) - 1
    if not user:
        # espfix tables are read-only and not executable (arch/x86/kernel/espfix_64.c).
        return allowed | _X86_NX | _X86_NOPTISHADOW, 1
    if level == top:
        # Page-table isolation makes user entries of the kernel's PGD not executable.
        allowed |= _X86_NX | _X86_NOPTISHADOW
    # pmd_bad() wants just these; p4d_bad() and pud_bad() none but these.
    return allowed, _X86_TABLE & ~_X86_ACCESSED if level == 1 else 1


def _x86_phys_bits(context: Context) -> int | None:
    try:
        bits = int(context.prog["boot_cpu_data"].x86_phys_bits.value_())
    except (LookupError, AttributeError):
        return None
    return bits if 32 <= bits <= 52 else None


_ARM64_ATTRIBUTES = 3 | 1 << 10 | 1 << 59 | 1 << 60
#: nG, which page-table isolation adds to what the kernel has mapped before it knew of it, entries
#: for tables included (kpti_mk_tbl_ng in arch/arm64/mm/proc.S).
_ARM64_NOT_GLOBAL = 1 << 11
_RISCV_PFN = (1 << 54) - (1 << 10)


def _table_bits(context: Context, level: int, user: bool) -> tuple[int, int]:
    """Get which bits an entry that points to a table may have, and which it must have."""
    if context.arch == "x86_64":
        return _x86_allowed(context, level, user)
    fields = context.paging.levels[level].table_address
    address = 0
    for field in fields:
        address |= field.mask
    if context.arch == "arm64":
        return address | _ARM64_ATTRIBUTES | (0 if user else _ARM64_NOT_GLOBAL), 3
    return _RISCV_PFN | 1, 1


@invariant(
    "entry-reserved-bits",
    severity=Severity.CORRUPTION,
    applies="entries above the lowest level; x86_64, arm64, riscv64",
    source="pmd_bad(), pud_bad(), p4d_bad() (arch/x86/include/asm/pgtable.h); "
    "arch/arm64/include/asm/pgtable-hwdef.h, arch/arm64/mm/proc.S; "
    "arch/riscv/include/asm/pgtable-64.h",
    false_positives="none known: entries are written at once",
    breaks="a bit flipped in memory, a stray write into an upper table",
)
def entry_reserved_bits(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Entries that point to tables have no bits but those that the kernel gives them.

    Reserved bits fault in the hardware; others change what all that lies below may do. An entry
    above the lowest level that is neither empty, table, huge page nor swap is also found here.
    """
    if context.arch in ("s390x", "ppc64"):
        which = {"s390x": "s390-crst-type", "ppc64": "radix-nls-and-bits"}[context.arch]
        raise NotApplicableError(f"{which} checks the entries of this architecture")
    context.miss_unread(tally)
    for level in range(1, len(context.paging.levels)):
        entries = context.upper[level]
        tally.examine(len(entries.row))
        bad = entries.kind == EntryClass.BAD
        yield from _value_findings(
            context,
            entries.row[bad],
            entries.slot[bad],
            entries.value[bad],
            "no kernel writes such an entry",
        )
        table = entries.kind == EntryClass.TABLE
        of_user = context.user_space[context.tables.space[entries.row]]
        for user in (False, True):
            allowed, needed = _table_bits(context, level, user)
            wrong = (entries.value & np.uint64(~allowed & (1 << 64) - 1)) != 0
            wrong |= (entries.value & np.uint64(needed)) != np.uint64(needed)
            wrong &= table & (of_user == user)
            yield from _value_findings(
                context,
                entries.row[wrong],
                entries.slot[wrong],
                entries.value[wrong],
                "bits that an entry for a table does not have",
                allowed=allowed,
                needed=needed,
            )


#: RADIX_PMD_BAD_BITS and its like (arch/powerpc/include/asm/book3s/64/radix.h).
_RADIX_BAD = 0x60000000000000E0


@invariant(
    "radix-nls-and-bits",
    severity=Severity.CORRUPTION,
    applies="entries above the lowest level; ppc64 with the radix MMU",
    source="RADIX_PMD_BAD_BITS, RADIX_PMD_VAL_BITS (asm/book3s/64/radix*.h)",
    false_positives="none known: entries are written at once",
    breaks="a bit flipped in memory, a stray write into an upper table",
)
def radix_nls_and_bits(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A directory entry names the size of the table below it, and has no reserved bits.

    With another size the hardware takes another part of the address as index.
    """
    if context.arch != "ppc64":
        raise NotApplicableError("ppc64 only")
    context.miss_unread(tally)
    for level in range(1, len(context.paging.levels)):
        entries = context.upper[level]
        tally.examine(len(entries.row))
        size = context.paging.levels[level - 1].entries.bit_length() - 1
        bad = entries.kind == EntryClass.BAD
        yield from _value_findings(
            context,
            entries.row[bad],
            entries.slot[bad],
            entries.value[bad],
            "neither a page nor a table of the level below",
            size_below=size,
        )
        wrong = (entries.kind == EntryClass.TABLE) & ((entries.value & np.uint64(_RADIX_BAD)) != 0)
        yield from _value_findings(
            context,
            entries.row[wrong],
            entries.slot[wrong],
            entries.value[wrong],
            "reserved bits are set",
            reserved=_RADIX_BAD,
        )


#: Of s390 region and segment entries (arch/s390/include/asm/pgtable.h).
_S390_INVALID, _S390_TYPE, _S390_LARGE = 0x20, 0x0C, 0x400
_S390_LENGTH, _S390_OFFSET, _S390_COMMON = 0x03, 0xC0, 0x10
_S390_SWAP = 0x10
#: _SEGMENT_ENTRY_BITS without protection, no-execute and the type, beside the origin.
_S390_SEGMENT_TABLE = (1 << 64) - 0x800 | 0x200 | 0x20 | 0x0C | 0x03


@invariant(
    "s390-crst-type",
    severity=Severity.CORRUPTION,
    applies="every entry of the region and segment tables of s390, the empty ones too",
    source="crst_table_init(), pud_bad(), pmd_bad(), _REGION3_ENTRY_EMPTY and its like "
    "(arch/s390/include/asm/pgtable.h, pgalloc.h)",
    false_positives="none known: entries are written at once",
    breaks="a bit flipped in memory, a table used at another level",
)
def s390_crst_type(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    Every entry of a region or segment table says of which level it is, and of what length.

    With the wrong type or length the hardware raises an exception that no handler expects, or
    does not see the upper part of the table below.
    """
    if context.arch != "s390x":
        raise NotApplicableError("s390 only")
    context.miss_unread(tally)
    for level in range(1, len(context.paging.levels)):
        shape = context.paging.levels[level]
        kind = (level - 1) << 2
        for rows, raw in context.read_tables(level):
            values = context.paging.values(raw)
            own = np.zeros(values.shape, np.bool_)
            for place, row in enumerate(rows.tolist()):
                ranges: tuple[tuple[int, int], ...] = ((0, shape.entries),)
                if int(context.tables.parent[row]) < 0:
                    ranges = context.space_of(row).root.entries
                for begin, end in ranges:
                    own[place, begin:end] = True
            tally.examine(np.count_nonzero(own))
            wrong = own & _s390_wrong(values, level, kind)
            kvm = [context.space_of(row).kvm_owned for row in rows.tolist()]
            if any(kvm):
                wrong[kvm] &= _kvm_wrong(context.paging, values[kvm], level, kind)
            places, slots = np.nonzero(wrong)
            yield from _value_findings(
                context,
                rows[places],
                slots.astype(np.int64),
                values[places, slots],
                "not an entry of this level",
                expected_type=kind,
            )


def _kvm_wrong(paging: Paging, values: npt.NDArray[np.uint64], level: int, kind: int) -> BoolArray:
    """
    The same in tables of KVM's own (arch/s390/kvm/gmap/dat.h), which may say more.

    Invalid entries bear tokens or segments of a user-controlled machine, and _crste_fc0() gives
    every entry a table length.
    """
    if level == 1:
        values = np.where(values & np.uint64(_S390_INVALID), values, values & ~np.uint64(3))
    known = np.isin(paging.classify(values, level), (EntryClass.NONE, EntryClass.MARKER))
    wrong: BoolArray = ~known & _s390_wrong(values, level, kind)
    return wrong


def _s390_wrong(values: npt.NDArray[np.uint64], level: int, kind: int) -> BoolArray:
    def bits(mask: int) -> npt.NDArray[np.uint64]:
        masked: npt.NDArray[np.uint64] = values & np.uint64(mask)
        return masked

    wrong: BoolArray = bits(_S390_TYPE) != kind
    large = bits(_S390_LARGE) != 0 if level <= 2 else np.zeros(values.shape, np.bool_)
    invalid = bits(_S390_INVALID) != 0
    swapped = invalid & ~large & (bits(_S390_SWAP) != 0) if level <= 2 else np.False_
    empty = values == np.uint64(_S390_INVALID | kind)
    wrong |= invalid & ~large & ~empty & ~swapped
    table = ~invalid & ~large
    if level > 1:
        wrong |= table & ((bits(_S390_LENGTH) != 3) | (bits(_S390_OFFSET) != 0))
    else:
        wrong |= table & (bits((1 << 64) - 1 & ~_S390_SEGMENT_TABLE) != 0)
    return wrong


@question("cont-blocks")
def _cont_entries(batch: Batch) -> tuple[int, BoolArray]:
    joined = batch.context.paging.levels[batch.level].contiguous
    if joined is None or not len(batch.row):
        return 0, np.zeros(len(batch.row), np.bool_)
    count, hint = joined
    marked = ((batch.value & np.uint64(hint)) != 0) & (batch.kind == EntryClass.LEAF)
    places = np.flatnonzero(marked)
    if not len(places):
        return 0, np.zeros(len(batch.row), np.bool_)
    # Entries come in order of table and slot: those of one block follow each other.
    span = np.uint64(batch.context.paging.levels[batch.level].entry_span)
    block = batch.row[places] * (1 << 20) + batch.slot[places] // count
    base = batch.context.paging.leaf_targets(batch.value[places], batch.level, batch.slot[places])
    start = base - (batch.slot[places] % count).astype(np.uint64) * span
    _, first, back, sizes = np.unique(
        block, return_index=True, return_inverse=True, return_counts=True
    )
    whole = np.uint64(span * np.uint64(count))
    wrong = (sizes[back] != count) | (start != start[first][back]) | (start % whole != 0)
    suspect = np.zeros(len(batch.row), np.bool_)
    suspect[places] = wrong
    return len(places), suspect


@invariant(
    "arm64-cont-blocks",
    severity=Severity.SUSPICIOUS,
    applies="entries with the contiguous hint; arm64",
    source="arch/arm64/mm/contpte.c, hugetlbpage.c; Arm ARM, the Contiguous bit",
    false_positives="contpte folds or unfolds a block just now (the table's lock is held)",
    breaks="one entry of a block changed without unfolding it",
)
def arm64_cont_blocks(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    A contiguous hint is set in all entries of its block, and their pages follow each other.

    The hardware keeps one translation for the block: which of several, nobody knows.
    """
    if context.arch != "arm64":
        raise NotApplicableError("only entries of arm64 have the contiguous hint")
    batches = suspects(context, tally, "cont-blocks")
    yield from leaf_findings(context, batches, "its contiguous block is not whole")


@question("swap-valid")
def _swap_entries(batch: Batch) -> tuple[int, BoolArray]:
    context = batch.context
    asked = context.user_space[batch.space] & (batch.kind == EntryClass.SWAP)
    places = np.flatnonzero(asked)
    suspect = np.zeros(len(asked), np.bool_)
    if len(places):
        shift = np.uint64(context.paging.levels[batch.level].swap_type_shift)
        types = batch.value[places] >> shift & np.uint64(31)
        suspect[places] = types >= _swap_files(context)
    return int(np.count_nonzero(context.user_space[batch.space])), suspect


def _swap_files(context: Context) -> int:
    try:
        return int(context.prog["nr_swapfiles"].value_())
    except LookupError:
        # Without CONFIG_SWAP there is none.
        return 0


@invariant(
    "swap-entry-valid",
    severity=Severity.SUSPICIOUS,
    applies="entries of processes",
    source="swp_type() < nr_swapfiles (mm/swapfile.c)",
    false_positives="live: swapoff() in progress",
    breaks="a stray write into a table",
)
def swap_entry_valid(context: Context, tally: Tally) -> Iterator[Finding]:
    """
    An entry without a page that is not empty names a swap area that there is, or a special type.

    The next fault on any other entry kills the process, or reads what is not its own.
    """
    batches = suspects(context, tally, "swap-valid")
    for batch in batches:
        yield from _value_findings(
            context,
            batch.row.astype(np.intp),
            batch.slot,
            batch.value,
            "names no swap area",
            swap_areas=_swap_files(context),
        )
