# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mapping (VMA) that a table entry belongs to, and the file behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from drgn import FaultError, Object, Program, container_of

from ptinspect.tables.spaces import Space
from ptinspect.tables.vmas import Areas, try_areas

#: inode.i_flags: the file's pages are device memory, mapped directly (include/linux/fs.h).
_S_DAX = 1 << 13

#: Directories and mounts: PATH_MAX is 4096 bytes (include/uapi/linux/limits.h).
_DEEPEST_PATH = 4096

#: What a mapping whose structures are damaged raises in drgn's helpers.
_DAMAGED = (FaultError, LookupError, AttributeError, TypeError, ValueError)


@dataclass(frozen=True)
class MappedFile:
    """A file that a process has mapped."""

    inode: int
    #: Address of its ``struct inode``.
    address: int
    #: As the process would see it; ``None`` if it cannot be read.
    path: str | None

    @property
    def name(self) -> str:
        """A name for people."""
        return f"inode {self.inode}" if self.path is None else f"{self.path} (inode {self.inode})"


class Mappings:
    """The mappings of spaces; those of one mm are read once."""

    def __init__(self, prog: Program) -> None:
        self._prog = prog
        #: By address of the mm; ``None`` if they cannot be read.
        self._areas: dict[int, Areas | None] = {}

    def at(self, space: Space, address: int) -> Object | None:
        """
        Get the mapping of an address.

        :return: ``struct vm_area_struct *``; ``None`` if there is none or it cannot be read.
        """
        if space.mm is None:
            return None
        mm = space.mm.address
        if mm not in self._areas:
            self._areas[mm] = try_areas(self._prog, space.mm.object(self._prog))[0]
        areas = self._areas[mm]
        if areas is None:
            return None
        place = int(areas.index_of(np.array([address], np.uint64))[0])
        if place < 0:
            return None
        return Object(self._prog, "struct vm_area_struct *", int(areas.objects[place]))


def is_dax(vma: Object) -> bool | None:
    """
    Whether a mapping is of a file on directly mapped device memory, as ``vma_is_dax()``.

    :param vma: ``struct vm_area_struct *``
    :return: ``None`` if that cannot be read.
    """
    try:
        file = vma.vm_file.read_()
        return bool(file and file.f_mapping.host.i_flags.value_() & _S_DAX)
    except _DAMAGED:
        return None


def is_hugetlb(vma: Object) -> bool | None:
    """
    Whether a mapping is of hugetlb pages.

    All of them have the operations of mm/hugetlb.c; the flag VM_HUGETLB is a macro.

    :param vma: ``struct vm_area_struct *``
    :return: ``None`` if that cannot be read.
    """
    try:
        operations = vma.vm_ops.value_()
        return bool(operations == vma.prog_["hugetlb_vm_ops"].address_of_().value_())
    except _DAMAGED:
        return None


def mapped_file(vma: Object) -> MappedFile | None:
    """
    Get the file that a mapping is of.

    :param vma: ``struct vm_area_struct *``
    :return: ``None`` if it is of no file, or if that cannot be read.
    """
    try:
        file = vma.vm_file.read_()
        if not file:
            return None
        inode = file.f_mapping.host.read_()
        number = int(inode.i_ino.value_())
    except _DAMAGED:
        return None
    try:
        path = _path(file.f_path)
    except _DAMAGED:
        path = None
    return MappedFile(number, int(inode.value_()), path)


def _path(path: Object) -> str | None:
    """
    Get a path from the root of all mounts, as drgn's ``d_path()``, but from damaged dentries too.

    Files that are in no directory (``anon_hugepage``, those of memfd_create()) have a name only.

    :param path: ``struct path``
    :return: ``None`` if the way up does not end.
    """
    dentry, mount = path.dentry.read_(), container_of(path.mnt, "struct mount", "mnt")
    names: list[str] = []
    for _ in range(_DEEPEST_PATH):
        parent = dentry.d_parent.read_()
        if dentry == mount.mnt.mnt_root:
            above = mount.mnt_parent.read_()
            if above == mount:
                return "/" + "/".join(reversed(names))
            dentry, mount = mount.mnt_mountpoint.read_(), above
            continue
        names.append(dentry.d_name.name.string_().decode("utf-8", "backslashreplace"))
        if dentry == parent:
            return "/".join(reversed(names))
        dentry = parent
    return None
