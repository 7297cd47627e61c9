# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
s390: guest address spaces (gmaps), their lists and trees, and the address spaces that they are.

Up to 6.x a gmap belongs to the mm of the process that runs the machine (mm->context.gmap_list,
arch/s390/mm/gmap.c): its region and segment tables are its own, but its page tables are the
process's. From 7.0 on it belongs to KVM (kvm->arch.gmap, arch/s390/kvm/gmap/) and has tables of its
own down to the pages. Which of the two this kernel has is told by the members of struct gmap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from drgn import Architecture, FaultError, Object, Program, Type, offsetof
from drgn.helpers.linux.mm import page_to_pfn

from ptinspect.errors import PtinspectError, UsageError
from ptinspect.kernel.descriptor import byte_order, page_ptdesc, ptdesc_has_member, ptdesc_member
from ptinspect.kernel.paging import paging_of
from ptinspect.kernel.paging.model import object_or_none
from ptinspect.kernel.paging.s390x import S390Paging
from ptinspect.lists import ListWalk, walk_list_at
from ptinspect.memory import AddressArray, read_blocks
from ptinspect.radix import RadixWalk, walk_radix
from ptinspect.state.fields import architecture
from ptinspect.state.kvm import Vm, kvm_module_lacks_types, load_kvm_types, read_vm, type_or_none
from ptinspect.tables.scan import memmap_ranges
from ptinspect.tables.spaces import Found, Space, SpaceKind

#: More guest address spaces than any machine has.
GMAP_LIMIT = 1 << 16

#: How a person names one.
VM_HELP = "VM is the process ID of a machine's process, PID-FD, or gmap:ADDRESS."

_NO_TREE = RadixWalk({})


class Relation(Enum):
    """What has to hold between a guest address space and the rest, by a short name."""

    LIST = "list"
    RADIX = "radix"
    OWNER = "owner"
    ASCE = "asce"
    CRST_LIST = "crst-list"
    PT_LIST = "pt-list"
    INDEX = "index"
    HOST_TO_GUEST = "host-to-guest"
    GUEST_TO_HOST = "guest-to-host"
    HOST_TABLE = "host-table"
    SLOT = "slot"
    DESCRIPTOR = "descriptor"
    SHADOWED = "shadowed"
    HOST_PAGE = "host-page"
    SINGLE = "single"
    UCONTROL = "ucontrol"
    CACHE = "cache"


@dataclass(frozen=True)
class Disagreement:
    """Something about a guest address space that the kernel would not leave so."""

    relation: Relation
    #: Address of the ``struct gmap``, or of the mm whose list is broken.
    gmap: int
    #: What it is about: a table, an entry, a guest or host address.
    address: int
    text: str


@dataclass(frozen=True)
class ListedTable:
    """A table on a list of its gmap, by its descriptor."""

    ptdesc: int
    pfn: int
    #: What the descriptor gives as the guest address; ``None`` if it cannot be read.
    index: int | None
    #: The member that bears it.
    member: str


@dataclass(frozen=True)
class CachedTable:
    """A table that KVM keeps ready for a gmap (struct kvm_s390_mmu_cache, from 7.0)."""

    #: Addresses of the machine's ``struct kvm`` and ``struct gmap``.
    kvm: int
    gmap: int
    #: Address of the cache.
    cache: int
    #: Of the machine, or of one of its virtual CPUs.
    owner: str
    crst: bool
    pfn: int


@dataclass(frozen=True)
class Gmap:
    """A ``struct gmap``."""

    address: int
    #: Whether KVM owns all of its tables (from 7.0).
    kvm_owned: bool
    #: Address of the host's ``struct mm_struct``; 0 if there is none.
    mm: int
    #: Address of the gmap whose child it is; 0 for a virtual machine's own.
    parent: int
    #: Whether it shadows tables that the guest made for a guest of its own.
    shadow: bool
    asce: int
    references: int
    #: Names of what is set, in the kernel's words.
    flags: tuple[str, ...]
    #: The guest's ASCE that it shadows, 0 unless it is a shadow.
    guest_asce: int
    edat_level: int
    #: Last guest address (``asce_end``); ``None`` where only the ASCE tells.
    limit: int | None = None
    #: Address of the root table as the gmap has it beside the ASCE; ``None`` where it has not.
    table: int | None = None
    crst_list: tuple[ListedTable, ...] = ()
    pt_list: tuple[ListedTable, ...] = ()
    #: Guest segment (address >> 20) to host address.
    guest_to_host: RadixWalk = _NO_TREE
    #: Host segment (address >> 20) to the address of the guest's segment entry.
    host_to_guest: RadixWalk = _NO_TREE
    #: Page of the shadowed guest's memory to the address of the first reverse mapping.
    host_to_rmap: RadixWalk = _NO_TREE
    vm: Vm | None = None
    #: ``None`` if its ASCE names no table.
    space: Space | None = None

    @property
    def ucontrol_cpu(self) -> bool:
        """Whether it is a virtual CPU's of a user-controlled machine: a view of the machine's."""
        return self.kvm_owned and bool(self.parent) and not self.shadow

    @property
    def name(self) -> str:
        """A short name for people."""
        return f"gmap:{self.address:#x}"

    def is_called(self, name: str) -> bool:
        """Whether its machine has this name (PID-FD), or is run by the process of this ID."""
        if self.vm is not None and self.vm.name == name:
            return True
        tasks = () if self.space is None else self.space.tasks
        return any(str(task.pid) == name for task in tasks)

    def host_address(self, guest: int) -> int | None:
        """
        Translate a guest address to one of the process.

        :return: ``None`` also for a shadow and for a user-controlled virtual CPU, which have no
            mapping of their own (:meth:`GmapStory.host_address`).
        """
        if self.shadow or self.ucontrol_cpu:
            return None
        if self.kvm_owned:
            return None if self.vm is None else self.vm.host_address(guest)
        segment = self.guest_to_host.entries.get(guest >> 20)
        return None if segment is None else segment | guest & 0xFFFFF


@dataclass(frozen=True)
class Gmaps:
    """All guest address spaces of a target."""

    gmaps: tuple[Gmap, ...]
    #: Why there are none, or ``None`` if there are.
    absent: str | None
    disagreements: tuple[Disagreement, ...] = ()
    caches: tuple[CachedTable, ...] = ()
    #: What could not be read, in sentences.
    missing: tuple[str, ...] = ()

    @property
    def spaces(self) -> tuple[Space, ...]:
        """Their address spaces."""
        return tuple(gmap.space for gmap in self.gmaps if gmap.space is not None)

    def named(self, name: str) -> Gmap:
        """
        Find the guest address space that a person named (:data:`VM_HELP`).

        :raises UsageError: if there is none, or more than one
        """
        if name.startswith(("gmap:", "0x")):
            try:
                address = int(name.removeprefix("gmap:"), 16)
            except ValueError:
                raise UsageError(f"{name!r} is no address; {VM_HELP}") from None
            found = [gmap for gmap in self.gmaps if gmap.address == address]
        else:
            found = [gmap for gmap in self.gmaps if not gmap.parent and gmap.is_called(name)]
        if len(found) == 1:
            return found[0]
        if found:
            several = ", ".join(gmap.name for gmap in found)
            raise UsageError(
                f"{name} has {len(found)} guest address spaces: choose one of {several}"
            )
        known = ", ".join(gmap.name for gmap in self.gmaps) or "none"
        raise UsageError(f"{name!r} is no guest address space; {VM_HELP} There are: {known}")

    @property
    def held_pfns(self) -> AddressArray:
        """uint64: first page frames of the tables on lists and in caches."""
        pfns = [table.pfn for gmap in self.gmaps for table in (*gmap.crst_list, *gmap.pt_list)]
        return np.array(pfns + [table.pfn for table in self.caches], np.uint64)


def gaddr_member(prog: Program) -> str:
    """
    Get the member in which the descriptor of a gmap's table bears its guest address.

    A kernel whose ``struct ptdesc`` has ``_pt_s390_gaddr`` (the type's first proposal, June 2023)
    keeps it there; all others keep it in ``pt_index`` (``page->index``).
    """
    return "_pt_s390_gaddr" if ptdesc_has_member(prog, "_pt_s390_gaddr") else "pt_index"


def ptdesc_gaddr(pt: Object) -> int:
    """
    Get the guest address that the descriptor of a gmap's table bears.

    :param pt: ``struct ptdesc *``
    :raises FaultError: if it cannot be read
    """
    return int(ptdesc_member(pt, gaddr_member(pt.prog_)).value_())


def read_gmaps(prog: Program, spaces: Sequence[Space]) -> Gmaps:
    """
    Read every guest address space.

    :param spaces: Those of the processes; others are passed over.
    """
    if architecture(prog) != Architecture.S390X:
        return Gmaps((), "only s390 has guest address spaces of this kind")
    paging = paging_of(prog)
    assert isinstance(paging, S390Paging)
    type_ = type_or_none(prog, "struct gmap")
    if type_ is None and kvm_module_lacks_types(prog) and load_kvm_types(prog):
        type_ = type_or_none(prog, "struct gmap")
    if type_ is None:
        if kvm_module_lacks_types(prog):
            release = prog["UTS_RELEASE"].string_().decode(errors="replace")
            what = (
                "kvm.ko is loaded in the target, but its debug information, which has struct gmap, "
                f"was not found: install that of {release} (on Debian linux-image-{release}-dbg), "
                "or give its file with -s kvm.ko beside that of vmlinux"
            )
            return Gmaps((), None, missing=(what,))
        return Gmaps((), "KVM is neither in the kernel nor loaded")
    hosts = {
        space.mm.address: space
        for space in spaces
        if space.kind is SpaceKind.USER and space.mm is not None
    }
    if type_.has_member("crst_list"):
        return _MmReader(prog, paging, type_, hosts).read()
    return _KvmReader(prog, paging, type_, hosts).read()


def try_gmaps(prog: Program, spaces: Sequence[Space]) -> Gmaps:
    """Read every guest address space; if that fails, say so in *missing*."""
    try:
        return read_gmaps(prog, spaces)
    except (FaultError, LookupError, PtinspectError) as error:
        return Gmaps((), None, missing=(f"guest address spaces could not be read: {error}",))


class _Reader:
    """What both generations have in common."""

    def __init__(
        self, prog: Program, paging: S390Paging, type_: Type, hosts: dict[int, Space]
    ) -> None:
        self.prog = prog
        self.paging = paging
        self.hosts = hosts
        self.type = type_
        self.gmaps: list[Gmap] = []
        self.disagreements: list[Disagreement] = []
        self.missing: list[str] = []
        self._seen: set[int] = set()
        self._list_offset = offsetof(type_, "list")

    def _result(self, absent: str, caches: Sequence[CachedTable] = ()) -> Gmaps:
        return Gmaps(
            tuple(self.gmaps),
            None if self.gmaps or self.missing or self.disagreements else absent,
            tuple(self.disagreements),
            tuple(caches),
            tuple(self.missing),
        )

    def _disagree(self, relation: Relation, gmap: int, address: int, text: str) -> None:
        self.disagreements.append(Disagreement(relation, gmap, address, text))

    def _walk(self, gmap: int, head: int, name: str) -> ListWalk:
        """Walk a list of a gmap (or of an mm), and tell if it breaks."""
        walk = walk_list_at(self.prog, head, limit=GMAP_LIMIT)
        if walk.broken is not None:
            self._disagree(Relation.LIST, gmap, walk.broken.node, f"{name}: {walk.broken}")
        return walk

    def _on_list(self, owner: int, head: int, name: str) -> list[int]:
        """Get the addresses of the gmaps on a list; those that were seen before are told."""
        found = []
        for node in self._walk(owner, head, name).nodes:
            gmap = node - self._list_offset
            if gmap in self._seen:
                self._disagree(Relation.LIST, owner, gmap, f"{name}: {gmap:#x} is on two lists")
                continue
            self._seen.add(gmap)
            found.append(gmap)
        return found

    def _radix(self, gmap: Object, name: str) -> RadixWalk:
        address = int(gmap.value_())
        walk = walk_radix(self.prog, address + offsetof(self.type, name))
        for text in walk.broken:
            self._disagree(Relation.RADIX, address, address, f"{name}: {text}")
        return walk

    def _with_space(self, gmap: Gmap, found: Found) -> Gmap:
        """Add the address space that the ASCE names."""
        host = self.hosts.get(gmap.mm)
        try:
            root = self.paging.root_of_asce(gmap.asce)
        except ValueError as error:
            self._disagree(Relation.ASCE, gmap.address, gmap.asce, str(error))
            return gmap
        space = Space(
            SpaceKind.GMAP,
            root,
            (found,),
            None if host is None else host.mm,
            () if host is None else host.tasks,
            gmap=gmap.address,
            kvm_owned=gmap.kvm_owned,
        )
        return replace(gmap, space=space)

    def _vm(self, address: int) -> Vm | None:
        if not address:
            return None
        try:
            vm = read_vm(self.prog, address)
        except LookupError:
            # KVM is a module whose types are not loaded: its names and slots are not known.
            return None
        except FaultError as error:
            self.missing.append(f"struct kvm {address:#x} cannot be read: {error}")
            return None
        self.missing.extend(vm.missing)
        return vm


class _MmReader(_Reader):
    """Guest address spaces that belong to an mm (up to 6.x)."""

    def read(self) -> Gmaps:
        context = offsetof(self.prog.type("struct mm_struct"), "context.gmap_list")
        addresses = np.array(sorted(self.hosts), np.uint64) + np.uint64(context)
        blocks = read_blocks(self.prog, addresses, 16, physical=False)
        links = blocks.data.view(f"{byte_order(self.prog)}u8").astype(np.uint64)
        unreadable = int(np.count_nonzero(~blocks.readable))
        if unreadable:
            self.missing.append(f"the lists of guest address spaces of {unreadable} mms")
        used = blocks.readable & (links != addresses[:, None]).any(axis=1)
        # A list that was never initialised is init_mm's and that of other kernel mms.
        used &= (links != 0).any(axis=1)
        for head in addresses[used].tolist():
            self._of_mm(head - context, head)
        return self._result("no process has a guest address space")

    def _of_mm(self, mm: int, head: int) -> None:
        asces = []
        for address in self._on_list(mm, head, "context.gmap_list"):
            gmap = self._read(address, Found.GMAP_LIST)
            if gmap is None:
                continue
            asces.append(gmap.asce)
            if gmap.mm != mm:
                text = f"it is on the list of mm {mm:#x}, but names {gmap.mm:#x}"
                self._disagree(Relation.OWNER, address, gmap.mm, text)
            if gmap.parent:
                text = f"it is on the list of an mm, but has the parent {gmap.parent:#x}"
                self._disagree(Relation.OWNER, address, gmap.parent, text)
            children = address + offsetof(self.type, "children")
            for child in self._on_list(address, children, "children"):
                shadow = self._read(child, Found.CHILDREN)
                if shadow is not None and shadow.parent != address:
                    text = f"it is a child of {address:#x}, but names {shadow.parent:#x}"
                    self._disagree(Relation.OWNER, child, shadow.parent, text)
        # gmap_create(), gmap_remove(): nothing, the only one's, or all ones.
        said = int(Object(self.prog, "struct mm_struct *", mm).context.gmap_asce.value_())
        expected = (asces or [0])[0] if len(asces) < 2 else (1 << 64) - 1
        if said != expected:
            text = f"mm {mm:#x} has gmap_asce {said:#x} instead of {expected:#x}"
            self._disagree(Relation.ASCE, mm, mm, text)

    def _read(self, address: int, found: Found) -> Gmap | None:
        pointer = Object(self.prog, "struct gmap *", address)
        try:
            value = pointer[0].read_()
        except FaultError as error:
            self.missing.append(f"struct gmap {address:#x} cannot be read: {error}")
            return None
        parent = int(value.parent.value_())
        flags = [
            name for name in ("pfault_enabled", "removed", "initialized") if value.member_(name)
        ]
        if value.guest_handle:
            flags.append("protected")
        gmap = Gmap(
            address=address,
            kvm_owned=False,
            mm=int(value.mm.value_()),
            parent=parent,
            shadow=bool(parent),
            asce=int(value.asce.value_()),
            references=int(value.ref_count.refs.counter.value_()),
            flags=tuple(flags),
            guest_asce=int(value.orig_asce.value_()),
            edat_level=int(value.edat_level.value_()),
            limit=int(value.asce_end.value_()),
            table=int(value.table.value_()),
            crst_list=tuple(self._listed(address, "crst_list")),
            pt_list=tuple(self._listed(address, "pt_list")),
            guest_to_host=self._radix(pointer, "guest_to_host"),
            host_to_guest=self._radix(pointer, "host_to_guest"),
            host_to_rmap=self._radix(pointer, "host_to_rmap"),
            vm=self._vm(int(value.private.value_())),
        )
        gmap = self._with_space(gmap, found)
        self.gmaps.append(gmap)
        return gmap

    def _listed(self, gmap: int, name: str) -> Iterator[ListedTable]:
        """Get the tables on a list, whose nodes are page->lru (ptdesc->pt_list)."""
        node_offset = offsetof(self.prog.type("struct page"), "lru")
        known = memmap_ranges(self.prog)
        for node in self._walk(gmap, gmap + offsetof(self.type, name), name).nodes:
            page = Object(self.prog, "struct page *", node - node_offset)
            pfn = int(page_to_pfn(page).value_())
            if not any(part.start_pfn <= pfn < part.end_pfn for part in known):
                text = f"{name}: node {node:#x} is in no struct page"
                self._disagree(Relation.LIST, gmap, node, text)
                continue
            try:
                index: int | None = ptdesc_gaddr(page_ptdesc(page))
            except FaultError:
                index = None
                self.missing.append(f"the descriptor {int(page.value_()):#x} cannot be read")
            yield ListedTable(int(page.value_()), pfn, index, gaddr_member(self.prog))


#: Bits of gmap->flags (enum gmap_flags, arch/s390/kvm/gmap/gmap.h).
_FLAG_PREFIX = "GMAP_FLAG_"
#: The same in order, for debug information that has not kept the enumeration.
_FLAGS = (
    *("shadow", "owns_pagetables", "is_ucontrol", "allow_hpage_1m", "allow_hpage_2g"),
    *("pfault_enabled", "uses_skeys", "uses_cmm", "export_on_unmap"),
)


class _KvmReader(_Reader):
    """Guest address spaces that belong to KVM (from 7.0)."""

    def __init__(
        self, prog: Program, paging: S390Paging, type_: Type, hosts: dict[int, Space]
    ) -> None:
        super().__init__(prog, paging, type_, hosts)
        self.flags = self._flag_names()

    def _flag_names(self) -> dict[int, str]:
        flags = type_or_none(self.prog, "enum gmap_flags")
        if flags is None or not flags.enumerators:
            return dict(enumerate(_FLAGS))
        return {e.value: e.name[len(_FLAG_PREFIX) :].lower() for e in flags.enumerators}

    def read(self) -> Gmaps:
        caches: list[CachedTable] = []
        machines = object_or_none(self.prog, "vm_list")
        if machines is None:
            return self._result("KVM has no list of virtual machines")
        kvm_type = self.prog.type("struct kvm")
        offset = offsetof(kvm_type, "vm_list")
        for node in self._walk(0, int(machines.address_of_().value_()), "vm_list").nodes:
            self._of_machine(node - offset, caches)
        return self._result("there is no virtual machine", caches)

    def _of_machine(self, address: int, caches: list[CachedTable]) -> None:
        kvm = Object(self.prog, "struct kvm *", address)
        try:
            root = int(kvm.arch.gmap.value_())
        except FaultError as error:
            self.missing.append(f"struct kvm {address:#x} cannot be read: {error}")
            return
        vm = self._vm(address)
        pending = [(root, 0)] if root and root not in self._seen else []
        self._seen.add(root)
        while pending:
            here, parent = pending.pop(0)
            gmap = self._read(here, address, vm, parent)
            if gmap is None:
                continue
            children = here + offsetof(self.type, "children")
            pending += [(child, here) for child in self._on_list(here, children, "children")]
        self._caches(kvm, root, caches)

    def _read(self, address: int, kvm: int, vm: Vm | None, parent: int) -> Gmap | None:
        pointer = Object(self.prog, "struct gmap *", address)
        try:
            value = pointer[0].read_()
        except FaultError as error:
            self.missing.append(f"struct gmap {address:#x} cannot be read: {error}")
            return None
        word = int(value.flags.value_())
        names = tuple(name for bit, name in sorted(self.flags.items()) if word >> bit & 1)
        if value.invalidated:
            names += ("invalidated",)
        if int(value.kvm.value_()) != kvm:
            text = f"it is of struct kvm {kvm:#x}, but names {int(value.kvm.value_()):#x}"
            self._disagree(Relation.OWNER, address, int(value.kvm.value_()), text)
        if int(value.parent.value_()) != parent:
            text = f"its parent is {parent:#x}, but it names {int(value.parent.value_()):#x}"
            self._disagree(Relation.OWNER, address, int(value.parent.value_()), text)
        gmap = Gmap(
            address=address,
            kvm_owned=True,
            mm=0 if vm is None else vm.mm,
            parent=parent,
            shadow="shadow" in names,
            asce=int(value.asce.val.value_()),
            references=int(value.refcount.refs.counter.value_()),
            flags=names,
            guest_asce=int(value.guest_asce.val.value_()),
            edat_level=int(value.edat_level.value_()),
            host_to_rmap=self._radix(pointer, "host_to_rmap"),
            vm=vm,
        )
        gmap = self._with_space(gmap, Found.CHILDREN if parent else Found.VM_LIST)
        self.gmaps.append(gmap)
        return gmap

    def _caches(self, kvm: Object, gmap: int, caches: list[CachedTable]) -> None:
        """Read the tables that the machine and its virtual CPUs keep ready."""
        address = int(kvm.value_())
        try:
            owners = [("vm", int(kvm.arch.mc.value_()))]
            vcpus = walk_radix(self.prog, address + offsetof(kvm.type_.type, "vcpu_array"))
            for index, vcpu in vcpus.entries.items():
                cpu = Object(self.prog, "struct kvm_vcpu *", vcpu)
                owners.append((f"vcpu {index}", int(cpu.arch.mc.value_())))
            for owner, cache in owners:
                if cache:
                    caches.extend(self._cached(address, gmap, cache, owner))
        except (FaultError, ValueError) as error:
            self.missing.append(f"caches of struct kvm {address:#x} cannot be read: {error}")

    def _cached(self, kvm: int, gmap: int, address: int, owner: str) -> Iterator[CachedTable]:
        cache = Object(self.prog, "struct kvm_s390_mmu_cache *", address)[0].read_()
        shift = int(self.prog["PAGE_SHIFT"].value_())
        for array, number, crst in (
            (cache.crsts, cache.n_crsts, True),
            (cache.pts, cache.n_pts, False),
        ):
            length = array.type_.length or 0
            count = int(number.value_())
            if not 0 <= count <= length:
                text = f"the cache of {owner} says that it holds {count} of {length} tables"
                self._disagree(Relation.CACHE, gmap, address, text)
                continue
            for slot in range(count):
                table = int(array[slot].value_())
                physical = self.paging.virtual_to_physical(self.prog, table)
                yield CachedTable(kvm, gmap, address, owner, crst, physical >> shift)
