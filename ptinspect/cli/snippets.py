# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What a command does, as a few lines of Python: what ``--drgn`` prints in drgn's shell.

Each function takes drgn's code builder and the command's own parameters, and appends code that runs
in drgn's shell as it stands.
"""

from __future__ import annotations

import re
from typing import Any, Callable

from drgn.commands import DrgnCodeBuilder

from ptinspect.cli.gmap import check_question, guest_address
from ptinspect.cli.spaces import SPACE_HELP
from ptinspect.errors import UsageError
from ptinspect.listing import DEFAULT_COLUMNS, SCAN_COLUMNS

Snippet = Callable[..., None]

_SPACE = re.compile(r"(?:mm:(?:0[xX])?([0-9a-fA-F]+)|([0-9]+))(:kpti)?")
_TABLES = re.compile(r"(gmap|asce):(?:0[xX])?([0-9a-fA-F]+)")


def _summary(code: DrgnCodeBuilder, **_: Any) -> None:
    code.add_from_import("ptinspect", "scan_memmap", "summarise")
    code.append(
        """\
scan = scan_memmap(prog)
summary = summarise(prog, scan)
for count in summary.typed:
    print(count.node, count.order, count.descriptors, count.pages)
print(summary.counted_pages, summary.difference)
"""
    )


def _list(
    code: DrgnCodeBuilder,
    *,
    walk: bool,
    conditions: tuple[str, ...],
    columns: str | None,
    sort: str | None,
    limit: int | None,
    space: str | None,
    **given: Any,
) -> None:
    conditions += tuple(
        f"{name} = {given[name]}"
        for name in ("node", "order", "level")
        if given.get(name) is not None
    )
    conditions += tuple(f"flags & {flag}" for flag in given.get("flags", ()))
    if given.get("orphan"):
        conditions += ("holder = unexplained",)
    code.add_from_import("ptinspect", "Listing")
    if walk:
        code.add_from_import("ptinspect", "take_census")
        code.append("census = take_census(prog)\n")
        code.append("listing = Listing(prog, census.scan, census)\n")
    else:
        code.add_from_import("ptinspect", "scan_memmap")
        code.append("listing = Listing(prog, scan_memmap(prog))\n")
    arguments = [repr(list(conditions))]
    if sort is not None:
        arguments.append(f"sort={sort!r}")
    if limit is not None:
        arguments.append(f"limit={limit}")
    if space is not None:
        code.append(f"space = {_space_of(code, 'census.spaces', space)}\n")
        arguments.append("within=census.reached_by(space)")
    code.append(f"rows = listing.select({', '.join(arguments)})\n")
    names: tuple[str, ...] = DEFAULT_COLUMNS if walk else SCAN_COLUMNS
    if columns is not None:
        names = tuple(name.strip() for name in columns.split(",") if name.strip())
    code.append(
        f"""\
for name in {names!r}:
    column = listing.column(name)
    # Where a row has no such value, column.present is False.
    print(name, column.values[rows])
"""
    )


def _show(code: DrgnCodeBuilder, *, address: str, level: str | None, **_: Any) -> None:
    code.add_from_import("ptinspect", "describe_ptdesc", "locate_ptdesc")
    code.append(f"pt = locate_ptdesc(prog, {address!r}).ptdesc\n")
    code.append(f"descriptor = describe_ptdesc(pt{f', {level!r}' if level else ''})\n")
    code.append(
        """\
for field in descriptor.fields:
    print(field.offset, field.name, field.state.value, field.text)
"""
    )


def _walk(code: DrgnCodeBuilder, *, space_name: str, address_text: str, **_: Any) -> None:
    code.add_from_import("ptinspect", "find_spaces", "paging_of", "walk_address")
    try:
        address = f"{int(address_text, 16):#x}"
    except ValueError:
        address = f"prog.symbol({address_text!r}).address"
    code.append(f"space = {_space_of(code, 'find_spaces(prog)', space_name)}\n")
    options = (
        "kvm_owned=space.kvm_owned" if space_name.startswith("gmap:") else "kernel=space.kernel"
    )
    code.append(
        f"""\
found = walk_address(prog, paging_of(prog), space.root, {address}, {options})
for step in found.steps:
    print(step.level, hex(step.table), step.index, step.value, step.kind)
print(found.outcome, found.physical, found.permissions)
"""
    )


def _map(code: DrgnCodeBuilder, *, space_name: str, **_: Any) -> None:
    code.add_from_import("ptinspect", "find_spaces", "map_space", "paging_of")
    code.append(f"space = {_space_of(code, 'find_spaces(prog)', space_name)}\n")
    code.append(
        """\
for area in map_space(prog, paging_of(prog), space).ranges:
    print(hex(area.start), hex(area.end), area.page_bytes, area.permissions)
"""
    )


def _owner(code: DrgnCodeBuilder, *, address: str, **_: Any) -> None:
    code.add_from_import(
        "ptinspect", "locate_physical", "page_owners", "table_owners", "tables_within"
    )
    code.add_from_import("ptinspect", "take_census")
    code.append(
        f"""\
census = take_census(prog, leaf_counts=False)
start, size = locate_physical(prog, {address!r})
for table in tables_within(census.tables, start, start + size):
    for owner in table_owners(census.tables, table):
        print("table", census.spaces.spaces[owner.space].name, hex(owner.va))
for owner in page_owners(prog, census.tables, start):
    print("page", census.spaces.spaces[owner.space].name, hex(owner.va))
"""
    )


def _ps(code: DrgnCodeBuilder, *, no_slab: bool, **_: Any) -> None:
    code.add_from_import("ptinspect", "find_spaces", "paging_of", "space_usage", "walk_spaces")
    code.add_from_import("ptinspect.state.gmap", "read_gmaps")
    code.append(
        f"""\
spaces = find_spaces(prog{", slab=False" if no_slab else ""})
guests = read_gmaps(prog, spaces.spaces).spaces  # s390
spaces = (*spaces.spaces, *guests)
usage = space_usage(walk_spaces(prog, paging_of(prog), spaces))
for number, space in enumerate(spaces):
    print(space.name, usage.table_bytes[number], usage.empty_bytes[number])
"""
    )


def _lists(code: DrgnCodeBuilder, *, pgd: bool, **_: Any) -> None:
    _stories(code)
    if pgd:
        code.append(
            """\
for owner in stories.owners.pgds:
    print(hex(owner.table), owner.position, owner.pt_mm, owner.verdict.value)
"""
        )
        return
    code.append(
        """\
print(len(stories.lists.lists), "lists")
for found in stories.lists.lists:
    print(found.name, hex(found.head), [hex(pt) for pt in found.ptdescs], found.problems)
"""
    )


def _deposits(code: DrgnCodeBuilder, **_: Any) -> None:
    _stories(code)
    code.append(
        """\
print(len(stories.deposits.rings), "rings")
for ring in stories.deposits.rings:
    print(hex(ring.pmd_tables[0]), [hex(t) for t in ring.tables], ring.needed, ring.problem)
"""
    )


def _sharing(code: DrgnCodeBuilder, **_: Any) -> None:
    _stories(code)
    code.append(
        """\
print(len(stories.sharing.tables), "shared tables")
for shared in stories.sharing.tables:
    names = [census.tables.spaces[sharer.space].name for sharer in shared.sharers]
    print(hex(shared.table), shared.count, names, [file.path for file in shared.files])
"""
    )


def _frags(code: DrgnCodeBuilder, **_: Any) -> None:
    _stories(code)
    code.append(
        """\
fragments, halves = stories.fragments, stories.halves
if fragments is not None:  # powerpc
    for row in range(len(fragments)):
        print(hex(fragments.pfn[row]), fragments.refcount[row], fragments.arithmetic(row))
if halves is not None:  # s390 as of 6.1
    for row in range(len(halves)):
        print(hex(halves.pfn[row]), hex(halves.bits[row]), halves.linked[row])
if fragments is None and halves is None:
    print("no page holds several tables here")
"""
    )


def _locks(code: DrgnCodeBuilder, **_: Any) -> None:
    _stories(code)
    code.append(
        """\
locks = stories.locks
print(locks.home.value, len(locks), "locks")
for row in locks.notable():
    print(hex(locks.address[row]), hex(locks.word[row]), locks.holding(row))
"""
    )


def _pending(code: DrgnCodeBuilder, *, each_table: bool, **_: Any) -> None:
    _stories(code)
    code.append(
        """\
pending = stories.pending
print(len(pending.pfns), "tables wait,", pending.typed.sum(), "of them typed")
for free, count in zip(pending.frees, pending.table_counts()):
    print(free.way.value, free.segment, free.cpu, hex(free.address), free.function, count)
"""
    )
    if each_table:
        code.append(
            """\
for address, number in zip(pending.addresses, pending.free):
    print(hex(address), hex(pending.frees[number].address))
"""
        )


def _gmap(
    code: DrgnCodeBuilder,
    *,
    vm: str | None,
    gaddr: str | None,
    asce: bool,
    pgste: bool,
    **_: Any,
) -> None:
    check_question(vm, asce=asce, pgste=pgste)
    address = None if gaddr is None else guest_address(gaddr)
    _stories(code)
    if asce:
        code.append(
            """\
print(stories.asces.absent or "")
for asce in stories.asces.asces:
    print(asce.kind, asce.name, hex(asce.value), asce.level, asce.problems)
"""
        )
        return
    code.append("story = stories.gmaps\n")
    if vm is None:
        code.append(
            """\
print(story.gmaps.absent or "")
for gmap in story.gmaps.gmaps:
    print(gmap.name, gmap.vm and gmap.vm.name, gmap.shadow, hex(gmap.asce))
for found in story.disagreements:
    print(found.relation.value, found.text)
"""
        )
        return
    code.append(f"gmap = story.gmaps.named({vm!r})\n")
    if address is None:
        code.append(
            """\
tables = census.tables
rows = tables.rows_of_space(tables.spaces.index(gmap.space))
for row in rows:
    level = tables.paging.levels[tables.level[row]].name
    print(level, hex(tables.va[row]), hex(tables.address[row]))
"""
        )
        lowest = """\
lowest = rows[tables.level[rows] == 0]
addresses, guests = tables.address[lowest], tables.va[lowest]
"""
        wanted = ""
    else:
        code.add_from_import("ptinspect", "walk_address")
        code.append(
            f"""\
paging = census.paging
guest = walk_address(prog, paging, gmap.space.root, {address:#x}, kvm_owned=gmap.kvm_owned)
for step in guest.steps:
    print(step.level, hex(step.table), step.index, step.value, step.kind)
host = story.host_address(gmap, {address:#x})
print(guest.outcome, guest.physical, host)
mm = census.spaces.of_mm(gmap.mm)
if host is not None and mm is not None:
    print(walk_address(prog, paging, mm.root, host).physical)
"""
        )
        # A page table of s390 maps a segment.
        lowest = f"""\
addresses = numpy.array([step.table for step in guest.steps if step.level == 0], numpy.uint64)
guests = numpy.full(len(addresses), {address & ~0xFFFFF:#x}, numpy.uint64)
"""
        wanted = f" if pgste.guest == {address & ~0xFFF:#x}"
    if pgste:
        if address is not None:
            code.add_import("numpy")
        code.add_from_import("ptinspect.state.pgste", "read_pgstes")
        code.append(
            f"""\
{lowest}\
pgstes, readable = read_pgstes(
    prog, census.paging, addresses, guests, kvm_owned=gmap.kvm_owned
)
for pgste in (pgste for pgste in pgstes{wanted}):
    print(hex(pgste.guest), hex(pgste.value), pgste.usage, pgste.flags)
"""
        )


def _stories(code: DrgnCodeBuilder) -> None:
    code.add_from_import("ptinspect", "take_census")
    code.append("census = take_census(prog, leaf_counts=False)\nstories = census.stories\n")


def _layout(code: DrgnCodeBuilder, **_: Any) -> None:
    code.add_from_import("ptinspect", "ptdesc_layout")
    code.append(
        """\
layout = ptdesc_layout(prog)
for member in layout.ptdesc_members:
    print(member.offset, member.size, member.name, member.type_name)
for match in layout.matches:
    print(match.page_member, match.ptdesc_member, match.verdict)
"""
    )


def _check(
    code: DrgnCodeBuilder, *, only: tuple[str, ...], skip: tuple[str, ...], **_: Any
) -> None:
    code.add_from_import("ptinspect.checks", "run_checks")
    arguments = "".join(
        f", {name}={list(ids)!r}" for name, ids in (("only", only), ("skip", skip)) if ids
    )
    code.append(
        f"""\
results = run_checks(prog{arguments})
for result in results.results:
    print(result.invariant.id, result.verdict.value, result.examined)
for finding in results.findings:
    print(finding.invariant, hex(finding.address), finding.message)
"""
    )


def _space_of(code: DrgnCodeBuilder, spaces: str, name: str) -> str:
    """Write the expression that finds a space by the name that a person gave it."""
    if name == "kernel":
        return f"{spaces}.kernel"
    if name == "efi":
        return f'next(s for s in {spaces}.spaces if s.kind.name == "EFI")'
    tables = _TABLES.fullmatch(name)
    if tables is not None and tables[1] == "asce":
        code.add_from_import("ptinspect.tables.spaces", "Space", "SpaceKind")
        code.add_from_import("ptinspect", "paging_of")
        return f"Space(SpaceKind.ASCE, paging_of(prog).root_of_asce({int(tables[2], 16):#x}))"
    if tables is not None:
        code.add_from_import("ptinspect.state.gmap", "read_gmaps")
        gmaps = f"read_gmaps(prog, {spaces}.spaces)"
        return f"{gmaps}.named({name!r}).space"
    match = _SPACE.fullmatch(name)
    if match is None:
        raise UsageError(f"{name!r} is no address space; {SPACE_HELP}")
    mm, pid, isolated = match.groups()
    if isolated:
        test = (
            f"s.mm.address == {int(mm, 16):#x}"
            if mm
            else f"any(task.pid == {int(pid)} for task in s.tasks)"
        )
        return f'next(s for s in {spaces}.spaces if s.kind.name == "ISOLATED" and {test})'
    return f"{spaces}.of_mm({int(mm, 16):#x})" if mm else f"{spaces}.of_pid({int(pid)})"


#: By the command's name: every command that answers in drgn's shell.
SNIPPETS: dict[str, Snippet] = {
    "check": _check,
    "deposits": _deposits,
    "frags": _frags,
    "gmap": _gmap,
    "layout": _layout,
    "list": _list,
    "lists": _lists,
    "locks": _locks,
    "map": _map,
    "owner": _owner,
    "pending": _pending,
    "ps": _ps,
    "sharing": _sharing,
    "show": _show,
    "summary": _summary,
    "walk": _walk,
}
