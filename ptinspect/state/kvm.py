# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
KVM's virtual machines, as far as their guest memory goes: who they are and their memory slots.

The types are kvm.ko's where KVM is a module, so all of this can be unknown while the rest is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from drgn import (
    FaultError,
    MissingDebugInfoError,
    Object,
    Program,
    RelocatableModule,
    Type,
    offsetof,
)

from ptinspect.kernel.paging.model import object_or_none
from ptinspect.lists import walk_list

#: More slots than any machine has (KVM_USER_MEM_SLOTS is 32767).
SLOT_LIMIT = 1 << 16


@dataclass(frozen=True)
class Slot:
    """A memory slot: guest memory that lies at one place of a process (struct kvm_memory_slot)."""

    id: int
    #: Guest address.
    guest: int
    size: int
    #: Address in the process.
    host: int


@dataclass(frozen=True)
class Vm:
    """A ``struct kvm``."""

    address: int
    #: Address of the process's ``struct mm_struct``.
    mm: int
    #: PID-FD, as debugfs calls it; ``None`` if that cannot be told.
    name: str | None
    #: In order of the guest address.
    slots: tuple[Slot, ...]
    #: What could not be read, in sentences.
    missing: tuple[str, ...]
    #: Whether slots_lock is held: slots come into use before the guest's address space follows, and
    #: SRCU readers are waited for in between (kvm_set_memory_region(), kvm_commit_memory_region()).
    changing: bool = False

    def host_address(self, guest: int) -> int | None:
        """Translate a guest address to one of the process, by the memory slots."""
        for slot in self.slots:
            if slot.guest <= guest < slot.guest + slot.size:
                return slot.host + guest - slot.guest
        return None


def type_or_none(prog: Program, name: str) -> Type | None:
    """Get a type of the kernel or of a loaded module, or ``None`` if it is not known."""
    try:
        return prog.type(name)
    except LookupError:
        return None


def kvm_module_lacks_types(prog: Program) -> bool:
    """Tell whether KVM is a loaded module whose types are not known."""
    if type_or_none(prog, "struct kvm_vcpu_arch") is not None:
        return False
    head = object_or_none(prog, "modules")
    if head is None:
        return False
    offset = offsetof(prog.type("struct module"), "list")
    for node in walk_list(head.address_of_(), back_links=False).nodes:
        try:
            name = Object(prog, "struct module *", node - offset).name.string_()
        except FaultError:
            continue
        if name == b"kvm":
            return True
    return False


def load_kvm_types(prog: Program) -> bool:
    """
    Have drgn look for kvm.ko's debug information where it looks for a module's.

    :return: Whether it was found.
    """
    try:
        for module, _ in prog.loaded_modules():
            if isinstance(module, RelocatableModule) and module.name == "kvm":
                prog.load_module_debug_info(module)
                return True
    except (FaultError, LookupError, ValueError, MissingDebugInfoError):
        # Not found, or for another build; whoever asked says what is missing.
        pass
    return False


def read_vm(prog: Program, address: int) -> Vm:
    """
    Read a virtual machine.

    :param address: Of the ``struct kvm``.
    :raises FaultError: if the structure itself cannot be read
    :raises LookupError: if its type is not known
    """
    kvm = Object(prog, "struct kvm *", address)
    missing: list[str] = []
    mm = int(kvm.mm.value_())
    slots: list[Slot] = []
    try:
        for slot in _slots(kvm):
            slots.append(slot)
            if len(slots) > SLOT_LIMIT:
                missing.append(f"struct kvm {address:#x}: more than {SLOT_LIMIT} memory slots")
                break
    except (FaultError, LookupError, AttributeError, ValueError) as error:
        missing.append(f"struct kvm {address:#x}: not all memory slots can be read: {error}")
    slots.sort(key=lambda slot: slot.guest)
    return Vm(address, mm, _name(kvm), tuple(slots), tuple(missing), _locked(kvm))


def _locked(kvm: Object) -> bool:
    """Whether somebody has ``slots_lock``."""
    try:
        lock = kvm.slots_lock
        if lock.type_.has_member("rtmutex"):  # PREEMPT_RT
            return bool(lock.rtmutex.owner)
        return bool(lock.owner.counter.value_())
    except (FaultError, LookupError, AttributeError):
        return False


def _slots(kvm: Object) -> Iterator[Slot]:
    """
    Visit the tree of slots by guest frame (gfn_tree since 5.17), no node twice.

    :raises ValueError: if the tree leads to a node again
    """
    prog = kvm.prog_
    memslots = kvm.memslots[0].read_()
    # The set in use is one of two; each slot is a node of both.
    member = f"gfn_node[{int(memslots.node_idx.value_())}]"
    node_offset = offsetof(prog.type("struct kvm_memory_slot"), member)
    page = int(prog["PAGE_SIZE"].value_())
    pending = [int(memslots.gfn_tree.rb_node.value_())]
    seen: set[int] = set()
    while pending:
        address = pending.pop()
        if not address:
            continue
        if address in seen:
            raise ValueError(f"the tree leads to node {address:#x} twice")
        seen.add(address)
        node = Object(prog, "struct rb_node *", address)
        pending += (int(node.rb_left.value_()), int(node.rb_right.value_()))
        slot = Object(prog, "struct kvm_memory_slot *", address - node_offset)
        yield Slot(
            int(slot.id.value_()),
            int(slot.base_gfn.value_()) * page,
            int(slot.npages.value_()) * page,
            int(slot.userspace_addr.value_()),
        )


def _name(kvm: Object) -> str | None:
    """Get the name of the machine's folder in debugfs: PID-FD (kvm_create_vm_debugfs())."""
    try:
        dentry = kvm.debugfs_dentry.read_()
        return str(dentry.d_name.name.string_().decode(errors="replace")) if dentry else None
    except (FaultError, LookupError, AttributeError):
        return None
