# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What the swap type of an entry without a page means on this kernel.

The highest of the 32 types are not swap areas but migration entries, markers and the like; how many
of them there are depends on the configuration (include/linux/swap.h, MAX_SWAPFILES and before it).
"""

from __future__ import annotations

from drgn import Architecture, Program

from ptinspect.kernel.paging.model import (
    AddressField,
    EntryClass,
    SwapClasses,
    object_or_none,
)

#: 1 << MAX_SWAPFILES_SHIFT
_TYPES = 32
_MIGRATION_TYPES = 3
_DEVICE_TYPES = 4


def swap_classes(prog: Program) -> SwapClasses:
    """
    Get the class of each swap type.

    From MAX_SWAPFILES upwards come, each only if configured: hardware poison (1), migration (3),
    device memory (4; 3 in 7.3), and at least one marker. 6.1 has one more for swap-in errors,
    which later became a marker. MAX_SWAPFILES is the length of ``swap_info``.
    """
    poison = 1 if object_or_none(prog, "num_poisoned_pages") is not None else 0
    migration = _MIGRATION_TYPES if _has_function(prog, "migrate_pages") else 0
    swap_files = _max_swapfiles(prog)
    if swap_files is None:
        # No swap in this kernel, so nothing tells the number of special types, but then no
        # entry has a type below them either.
        device = _DEVICE_TYPES if _has_function(prog, "migrate_vma_setup") else 0
        markers = _markers_without_swap(prog)
        swap_files = _TYPES - poison - migration - device - markers
    else:
        rest = _TYPES - swap_files - poison - migration
        device = 0 if rest < _DEVICE_TYPES else min(rest - 1, _DEVICE_TYPES)
        markers = rest - device
    return (
        (EntryClass.SWAP,) * swap_files
        + (EntryClass.SPECIAL,) * poison
        + (EntryClass.MIGRATION,) * migration
        + (EntryClass.SPECIAL,) * device
        + (EntryClass.MARKER,) * max(0, markers)
    )


def swap_address(offset_shift: int, page_shift: int, physmem_bits: int) -> tuple[AddressField, ...]:
    """
    Get where entries that stand for a page have its address.

    The swap offset is the page frame, and above SWP_PFN_BITS whether the page is young and dirty
    (include/linux/swapops.h).

    :param offset_shift: Bit of the entry at which the swap offset begins.
    :param physmem_bits: MAX_PHYSMEM_BITS; 0 if that is not known.
    """
    if not physmem_bits:
        return ()
    mask = ((1 << (physmem_bits - page_shift)) - 1) << offset_shift
    return (AddressField(mask, page_shift - offset_shift),)


def _max_swapfiles(prog: Program) -> int | None:
    swap_info = object_or_none(prog, "swap_info")
    return None if swap_info is None else swap_info.type_.length


def _markers_without_swap(prog: Program) -> int:
    """
    Get the number of marker types where MAX_SWAPFILES cannot be seen.

    In 6.1 swap-in errors have a type of their own (later they are a marker), and
    markers exist only with userfaultfd write protection, which only x86 has there. DWARF does not
    show the difference, so this one decision is made by the release.
    """
    release = prog["UTS_RELEASE"].string_().decode(errors="replace").split(".")
    if (int(release[0]), int(release[1].split("-")[0])) >= (6, 2):
        return 1
    assert prog.platform is not None
    x86 = prog.platform.arch == Architecture.X86_64
    return 2 if x86 and _has_function(prog, "handle_userfault") else 1


def _has_function(prog: Program, name: str) -> bool:
    try:
        prog.function(name)
    except LookupError:
        return False
    return True
