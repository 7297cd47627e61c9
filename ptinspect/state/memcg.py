# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Which memory cgroup each table is charged to.

``pt_memcg_data`` holds the address of a ``struct obj_cgroup`` and flags in its low bits
(include/linux/memcontrol.h). The obj_cgroup names the memory cgroup; when that goes away, it names
the parent from then on. Tables of the kernel, and of tasks in the root cgroup, are charged to none.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from drgn import FaultError, Object, Program
from drgn.helpers.linux.kernfs import kernfs_name, kernfs_parent

from ptinspect.errors import UsageError
from ptinspect.kernel.descriptor import ptdesc_has_member
from ptinspect.tables.scan import MemmapScan

#: MEMCG_DATA_KMEM, and the bits that no address of a structure has.
_KMEM = 2
_FLAG_BITS = 7

#: More levels of cgroups than any kernel has.
_MOST_LEVELS = 4096

#: Index of a descriptor that is charged to no cgroup, and of one whose cgroup cannot be told.
NOT_CHARGED = -1
UNKNOWN = -2


@dataclass(frozen=True)
class Memcgs:
    """The memory cgroups that tables are charged to."""

    #: Paths in the cgroup file system, sorted, each once; bytes that are no UTF-8 as ``\\xNN``.
    paths: tuple[str, ...]
    #: int32, by descriptor: index into paths, :data:`NOT_CHARGED`, or :data:`UNKNOWN`.
    index: npt.NDArray[np.int32]
    #: What could not be told, in sentences.
    missing: tuple[str, ...]


@dataclass(frozen=True)
class MemcgUsage:
    """Page tables that are charged to one memory cgroup."""

    #: ``None``: to no cgroup.
    path: str | None
    descriptors: int
    pages: int
    #: With those of the cgroups below it, as memory.stat counts.
    pages_with_below: int


def read_memcgs(prog: Program, scan: MemmapScan) -> Memcgs:
    """
    Find the memory cgroup of every descriptor, following each obj_cgroup once.

    :param prog: The kernel.
    :param scan: What :func:`scan_memmap` found in it.
    :return: For each row of the scan, its memory cgroup.
    :raises UsageError: if this kernel has no memory cgroups
    """
    if not ptdesc_has_member(prog, "pt_memcg_data"):
        raise UsageError("this kernel's descriptors name no memory cgroup (no CONFIG_MEMCG)")
    words, rows = np.unique(scan.descriptors["pt_memcg_data"], return_inverse=True)
    rows = rows.reshape(-1)
    found: dict[int, str] = {}
    missing = []
    for number, word in enumerate(words.tolist()):
        if not word:
            continue
        try:
            found[number] = memcg_path(prog, word)
        except (FaultError, LookupError, ValueError) as error:
            tables = int(np.count_nonzero(rows == number))
            missing.append(
                f"the memory cgroup of {tables} descriptors with pt_memcg_data {word:#x} cannot be "
                f"told: {error}"
            )
            found[number] = ""
    paths = sorted({path for path in found.values() if path})
    places = {path: place for place, path in enumerate(paths)}
    index = np.full(len(words), NOT_CHARGED, np.int32)
    for number, path in found.items():
        index[number] = places.get(path, UNKNOWN)
    return Memcgs(tuple(paths), index[rows].astype(np.int32), tuple(missing))


def memcg_path(prog: Program, memcg_data: int) -> str:
    """
    Get the path of the memory cgroup that a descriptor's ``pt_memcg_data`` names.

    :param prog: The kernel.
    :param memcg_data: Not 0.
    :return: The path below the root of the cgroup hierarchy.
    :raises ValueError: if it names no memory cgroup
    :raises FaultError: if what it names cannot be read
    """
    pointer = memcg_data & ~_FLAG_BITS
    if memcg_data & _FLAG_BITS != _KMEM:
        raise ValueError("it has not the flags of kernel memory")
    memcg = Object(prog, "struct obj_cgroup *", pointer).memcg.read_()
    if memcg.css.ss != prog["memory_cgrp_subsys"].address_of_():
        raise ValueError(f"{memcg.value_():#x} is no memory cgroup")
    return _cgroup_path(memcg.css.cgroup)


def _cgroup_path(cgroup: Object) -> str:
    """:func:`drgn.helpers.linux.cgroup.cgroup_path`, but for data that may go in circles."""
    names: list[bytes] = []
    node = cgroup.kn.read_()
    while node:
        parent = kernfs_parent(node)
        if not parent:
            path = b"/" + b"/".join(reversed(names))
            return path.decode("utf-8", "backslashreplace")
        names.append(kernfs_name(node))
        node = parent
        if len(names) > _MOST_LEVELS:
            raise ValueError("its path has no end")
    raise ValueError("it has no directory")


def memcg_usage(scan: MemmapScan, memcgs: Memcgs) -> list[MemcgUsage]:
    """
    Add up descriptors and their pages by memory cgroup, the largest first.

    :param scan: What :func:`scan_memmap` found.
    :param memcgs: What :func:`read_memcgs` says of it.
    :return: One for each memory cgroup that is charged, and one for what is charged to none.
    """
    pages = np.left_shift(np.int64(1), scan.orders.astype(np.int64))
    usage = []
    own: dict[str, tuple[int, int]] = {}
    for place, path in enumerate(memcgs.paths):
        ours = memcgs.index == place
        own[path] = (int(np.count_nonzero(ours)), int(pages[ours].sum()))
    below: Counter[str] = Counter()
    for path, (_, count) in own.items():
        here = path
        while True:
            below[here] += count
            if here == "/":
                break
            here = here.rpartition("/")[0] or "/"
    for path, total in below.items():
        descriptors, count = own.get(path, (0, 0))
        usage.append(MemcgUsage(path, descriptors, count, total))
    usage.sort(key=lambda each: (-each.pages_with_below, each.path or ""))
    free = memcgs.index == NOT_CHARGED
    number = int(np.count_nonzero(free))
    count = int(pages[free].sum())
    usage.append(MemcgUsage(None, number, count, count))
    return usage
