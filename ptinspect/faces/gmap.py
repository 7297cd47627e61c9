# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guest address spaces of s390: the list of them, one as a tree, one guest address."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ptinspect.census import Census
from ptinspect.faces.report import Cell, Column, Kind, Report, Table
from ptinspect.faces.translate import kind_name, level_name, permission_letters
from ptinspect.kernel.paging import EntryClass
from ptinspect.state.asce import Asces
from ptinspect.state.gmap import Gmap
from ptinspect.state.gmap_relations import GmapStory
from ptinspect.state.pgste import Pgste
from ptinspect.tables.lookup import Outcome, Translation
from ptinspect.tables.steps import DescribedStep


@dataclass(frozen=True)
class TreeRow:
    """One table of a guest address space."""

    #: Row of the walk.
    row: int
    #: Address of the descriptor, and whether it is typed; ``None`` if it cannot be read.
    ptdesc: int | None
    typed: bool | None
    #: The guest address that the descriptor bears; ``None`` where it bears none.
    index: int | None
    #: Whose table it is: ``own``, ``host`` or ``shared``.
    owner: str
    #: Where the process has the memory that the table translates.
    host: int | None


def absent_report(story: GmapStory, target: str) -> Report:
    """Say why there is nothing to show."""
    notes = [f"Not applicable: {story.gmaps.absent}."] if story.gmaps.absent else []
    return Report("gmap", target, (), notes=notes, missing=story.missing)


def asces_report(asces: Asces, target: str) -> Report:
    """Lay out the ASCEs of mms and CPUs."""
    if asces.absent is not None:
        return Report("gmap", target, (), notes=[f"Not applicable: {asces.absent}."])
    return Report(
        "gmap",
        target,
        (
            Table(
                "asces",
                (
                    Column("of"),
                    Column("name"),
                    Column("asce", Kind.HEX),
                    Column("root"),
                    Column("limit", Kind.HEX),
                    Column("pgd", Kind.HEX),
                    Column("problems"),
                ),
                [
                    (
                        asce.kind,
                        asce.name,
                        asce.value,
                        asce.level,
                        asce.limit,
                        asce.pgd,
                        "; ".join(asce.problems),
                    )
                    for asce in asces.asces
                ],
                f"Address-space-control elements ({target})",
            ),
        ),
        missing=asces.missing,
        findings=[
            f"asce: {asce.kind} {asce.name}: {problem}"
            for asce in asces.asces
            for problem in asce.problems
        ],
    )


def gmaps_report(story: GmapStory, census: Census, target: str) -> Report:
    """Lay out all guest address spaces."""
    gmaps = story.gmaps.gmaps
    return Report(
        "gmap",
        target,
        (
            Table(
                "gmaps",
                (
                    Column("gmap", Kind.HEX),
                    Column("process"),
                    Column("vm"),
                    Column("kind"),
                    Column("asce", Kind.HEX),
                    Column("root"),
                    Column("tables", Kind.COUNT),
                    Column("page_tables", Kind.COUNT),
                    Column("guest_KiB", Kind.COUNT),
                    Column("references", Kind.COUNT),
                    Column("parent", Kind.HEX),
                    Column("shadows", Kind.HEX),
                    Column("edat", Kind.COUNT),
                    Column("flags"),
                ),
                [_gmap_row(gmap, census) for gmap in gmaps],
                f"Guest address spaces ({target})",
            ),
            *_slots(gmaps),
            *_caches(story),
        ),
        notes=(
            "guest_KiB: guest memory by memory slots or, without slots, by mapped segments. "
            "page_tables: those that the tree reaches, its own or the process's.",
            *_vanished(story),
        ),
        missing=story.missing,
        findings=_findings(story, None),
    )


def _gmap_row(gmap: Gmap, census: Census) -> Sequence[Cell]:
    levels = _levels(gmap, census)
    root = None if gmap.space is None else census.paging.levels[gmap.space.root.level].own_name
    return (
        gmap.address,
        _process(gmap),
        None if gmap.vm is None else gmap.vm.name,
        _kind(gmap),
        gmap.asce,
        root,
        int(np.count_nonzero(levels > 0)),
        int(np.count_nonzero(levels == 0)),
        _guest_kib(gmap),
        gmap.references,
        gmap.parent or None,
        gmap.guest_asce if gmap.shadow else None,
        gmap.edat_level if gmap.shadow else None,
        " ".join(gmap.flags),
    )


def _levels(gmap: Gmap, census: Census) -> npt.NDArray[np.uint8]:
    tables = census.tables
    for number, space in enumerate(tables.spaces):
        if space.gmap == gmap.address:
            return tables.level[tables.rows_of_space(number)]
    return tables.level[:0]


def _process(gmap: Gmap) -> str | None:
    if gmap.space is None or not gmap.space.tasks:
        return f"mm {gmap.mm:#x}" if gmap.mm else None
    return f"{gmap.space.tasks[0].comm}/{gmap.space.tasks[0].pid}"


def _kind(gmap: Gmap) -> str:
    if gmap.shadow:
        return "shadow"
    return "child" if gmap.parent else "machine"


def _guest_kib(gmap: Gmap) -> int | None:
    if gmap.shadow or "is_ucontrol" in gmap.flags:
        # A user-controlled machine has a slot for show, which is all of the process.
        return None
    if gmap.vm is not None and gmap.vm.slots:
        return sum(slot.size for slot in gmap.vm.slots) // 1024
    return None if gmap.kvm_owned else len(gmap.guest_to_host.entries) * 1024


def _slots(gmaps: Sequence[Gmap]) -> Iterator[Table]:
    machines = {gmap.vm.address: gmap.vm for gmap in gmaps if gmap.vm is not None}
    rows = [
        (vm.name, slot.id, slot.guest, slot.size // 1024, slot.host)
        for vm in machines.values()
        for slot in vm.slots
    ]
    if rows:
        yield Table(
            "slots",
            (
                Column("vm"),
                Column("slot", Kind.COUNT),
                Column("guest", Kind.HEX),
                Column("KiB", Kind.COUNT),
                Column("host", Kind.HEX),
            ),
            rows,
            "Memory slots",
        )


def _caches(story: GmapStory) -> Iterator[Table]:
    machines = (gmap.vm for gmap in story.gmaps.gmaps if gmap.vm is not None)
    names = {vm.address: vm.name for vm in machines}
    if story.gmaps.caches:
        yield Table(
            "caches",
            (
                Column("vm"),
                Column("cache", Kind.HEX),
                Column("of"),
                Column("table"),
                Column("pfn", Kind.HEX),
            ),
            [
                (
                    names.get(table.kvm),
                    table.cache,
                    table.owner,
                    "crst" if table.crst else "page",
                    table.pfn,
                )
                for table in story.gmaps.caches
            ],
            "Tables that KVM keeps ready",
        )


def _vanished(story: GmapStory) -> list[str]:
    """Say what a running target no longer had at the second look."""
    if not story.vanished:
        return []
    return [f"{story.vanished} disagreements were gone at a second look: the target is running."]


def _findings(story: GmapStory, gmap: Gmap | None) -> list[str]:
    """Say what contradicts itself, of one gmap or of all."""
    return [
        f"{found.relation.value}: gmap:{found.gmap:#x}: {found.text}"
        for found in story.disagreements
        if gmap is None or found.gmap in (gmap.address, gmap.mm)
    ]


def tree_report(
    story: GmapStory,
    gmap: Gmap,
    census: Census,
    rows: Sequence[TreeRow],
    pgstes: Sequence[Pgste] | None,
    missing: Sequence[str],
    target: str,
) -> Report:
    """Lay out the tables of one guest address space, each below the one that points to it."""
    tables = census.tables
    parts = [
        Table(
            "gmap",
            (
                Column("gmap", Kind.HEX),
                Column("process"),
                Column("vm"),
                Column("kind"),
                Column("asce", Kind.HEX),
                Column("limit", Kind.HEX),
                Column("references", Kind.COUNT),
                Column("flags"),
                Column("host_segments", Kind.COUNT),
                Column("linked_segments", Kind.COUNT),
                Column("reverse_mapped_pages", Kind.COUNT),
            ),
            [
                (
                    gmap.address,
                    _process(gmap),
                    None if gmap.vm is None else gmap.vm.name,
                    _kind(gmap),
                    gmap.asce,
                    gmap.limit,
                    gmap.references,
                    " ".join(gmap.flags),
                    None if gmap.kvm_owned else len(gmap.guest_to_host.entries),
                    None if gmap.kvm_owned else len(gmap.host_to_guest.entries),
                    len(gmap.host_to_rmap.entries) if gmap.shadow else None,
                )
            ],
            f"{gmap.name} ({target})",
            single=True,
        ),
        Table(
            "tables",
            (
                Column("level"),
                Column("guest", Kind.HEX),
                Column("table", Kind.HEX),
                Column("ptdesc", Kind.HEX),
                Column("typed"),
                Column("index", Kind.HEX),
                Column("used", Kind.COUNT),
                Column("of"),
                Column("host", Kind.HEX),
            ),
            [
                (
                    level_name(tables.paging, int(tables.level[found.row])),
                    int(tables.va[found.row]),
                    int(tables.address[found.row]),
                    found.ptdesc,
                    found.typed,
                    found.index,
                    _used(census, found.row),
                    found.owner,
                    found.host,
                )
                for found in rows
            ],
            "Tables",
        ),
        *_slots([gmap]),
    ]
    notes = ["index: the guest address that the descriptor bears (pt_index).", *_vanished(story)]
    if pgstes is not None:
        parts.append(_pgste_table(pgstes))
        notes.append(_locked(pgstes))
    return Report("gmap", target, parts, notes, missing, _findings(story, gmap))


def _used(census: Census, row: int) -> int | None:
    tables = census.tables
    if not tables.counted[row]:
        return None
    counts = tables.counts[row]
    return int(counts.sum(dtype=np.int64)) - int(counts[EntryClass.NONE])


def _locked(pgstes: Sequence[Pgste]) -> str:
    return f"{sum(pgste.locked for pgste in pgstes)} PGSTEs are locked."


def _pgste_table(pgstes: Sequence[Pgste]) -> Table:
    return Table(
        "pgstes",
        (
            Column("guest", Kind.HEX),
            Column("entry_at", Kind.HEX),
            Column("entry", Kind.HEX),
            Column("kind"),
            Column("physical", Kind.HEX),
            Column("pgste", Kind.HEX),
            Column("key", Kind.COUNT),
            Column("usage"),
            Column("flags"),
        ),
        [
            (
                pgste.guest,
                pgste.entry_address,
                pgste.entry,
                kind_name(pgste.kind),
                pgste.physical,
                pgste.value,
                pgste.access,
                pgste.usage,
                " ".join(pgste.flags),
            )
            for pgste in pgstes
        ],
        "Pages and their PGSTEs",
    )


@dataclass(frozen=True)
class GuestWalk:
    """One guest address on both sides."""

    guest: Translation
    guest_steps: Sequence[DescribedStep]
    #: By step of the guest's side: the guest address that the descriptor bears.
    indices: Sequence[int | None]
    #: Address in the process; ``None`` if no slot or segment has it.
    host_address: int | None
    host: Translation | None
    host_steps: Sequence[DescribedStep]
    pgstes: Sequence[Pgste] | None

    @property
    def differs(self) -> bool:
        """Whether both sides lead to a page, but not to the same one."""
        theirs = None if self.host is None else self.host.physical
        mine = self.guest.physical
        return mine is not None and theirs is not None and mine != theirs


def walk_report(
    story: GmapStory, gmap: Gmap, census: Census, found: GuestWalk, target: str
) -> Report:
    """Lay out one guest address: its way to the page, and that of the process's address."""
    missing = [
        f"the table at {way.steps[-1].table:#x} cannot be read"
        for way in (found.guest, found.host)
        if way is not None and way.outcome is Outcome.UNREADABLE
    ]
    findings = _findings(story, gmap)
    if found.differs:
        assert found.host is not None
        findings.append(
            f"guest {found.guest.address:#x} is physical {found.guest.physical or 0:#x}, but the "
            f"process has {found.host.physical or 0:#x} at {found.host.address:#x}"
        )
    sides: list[Sequence[Cell]] = []
    for side, steps in (("guest", found.guest_steps), ("host", found.host_steps)):
        for number, described in enumerate(steps):
            step = described.step
            sides.append(
                (
                    side,
                    level_name(census.paging, step.level),
                    step.table,
                    described.ptdesc,
                    described.typed,
                    found.indices[number] if side == "guest" else None,
                    step.index,
                    step.entry_address,
                    step.value,
                    kind_name(step.kind),
                    permission_letters(step.permissions),
                )
            )
    parts = [
        Table(
            "steps",
            (
                Column("side"),
                Column("level"),
                Column("table", Kind.HEX),
                Column("ptdesc", Kind.HEX),
                Column("typed"),
                Column("index", Kind.HEX),
                Column("slot", Kind.COUNT),
                Column("entry_at", Kind.HEX),
                Column("entry", Kind.HEX),
                Column("kind"),
                Column("permits"),
            ),
            sides,
            f"{found.guest.address:#x} in {gmap.name} of {_process(gmap)} ({target})",
        ),
        Table(
            "result",
            (
                Column("guest", Kind.HEX),
                Column("outcome"),
                Column("physical", Kind.HEX),
                Column("host", Kind.HEX),
                Column("host_outcome"),
                Column("host_physical", Kind.HEX),
            ),
            [
                (
                    found.guest.address,
                    found.guest.outcome.value,
                    found.guest.physical,
                    found.host_address,
                    None if found.host is None else found.host.outcome.value,
                    None if found.host is None else found.host.physical,
                )
            ],
            single=True,
        ),
    ]
    notes = ["index: the guest address that the descriptor bears (pt_index).", *_vanished(story)]
    if found.pgstes is not None:
        parts.append(_pgste_table(found.pgstes))
        notes.append(_locked(found.pgstes))
    return Report("gmap", target, parts, notes, [*story.missing, *missing], findings)
