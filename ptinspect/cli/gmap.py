# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect gmap``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click
import numpy as np
from drgn import FaultError, Program
from drgn.helpers.linux.mm import compound_head, pfn_to_page

from ptinspect.census import Census, take_census
from ptinspect.cli.output import ProgressLine, emit, format_option, target_heading
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.errors import UsageError
from ptinspect.faces.gmap import (
    GuestWalk,
    TreeRow,
    absent_report,
    asces_report,
    gmaps_report,
    tree_report,
    walk_report,
)
from ptinspect.kernel.descriptor import page_is_pgtable, page_ptdesc
from ptinspect.state.gmap import VM_HELP, Gmap, ptdesc_gaddr
from ptinspect.state.pgste import Pgste, read_pgstes
from ptinspect.tables.lookup import walk_address
from ptinspect.tables.physical import physical_ranges
from ptinspect.tables.steps import DescribedStep, describe_steps
from ptinspect.target import open_target


@click.command("gmap", short_help="s390: guest address spaces of KVM and their tables.")
@target_options
@click.argument("vm", required=False)
@click.argument("gaddr", required=False)
@click.option("--asce", is_flag=True, help="Instead, the ASCEs of all mms and CPUs.")
@click.option("--pgste", is_flag=True, help="Also the page status table entries.")
@format_option
def command(vm: str | None, gaddr: str | None, asce: bool, pgste: bool, output_format: str) -> int:
    """
    s390: guest address spaces of KVM, their tables and what these say of the guest.

    Without VM, all of them with their memory slots. With VM (the process ID of its process, PID-FD,
    or gmap:ADDRESS) the tables of one, with guest addresses. With GADDR (hexadecimal) the way of
    that guest address to its page, and the process's way to the same page. With --asce, the
    address-space-control elements: those of mms beside pgd and limit, and those of each CPU.

    \b
    Examples:
      ptinspect --sample s390x-6.12 gmap
      ptinspect --sample s390x-6.12 gmap 64
      ptinspect --sample s390x-6.12 gmap 64 140000305000 --pgste
    """
    check_question(vm, asce=asce, pgste=pgste)
    with open_target(chosen_target()) as target:
        prog, heading = target.prog, target_heading(target)
        progress = ProgressLine("Walking all address spaces")
        try:
            census = take_census(prog, scan_progress=progress)
        finally:
            progress.close()
        story = census.stories.gmaps
        if target.racing and story.disagreements and not asce:
            again = take_census(prog, leaf_counts=False).stories.gmaps
            story = story.persisting(again)
        if asce:
            report = asces_report(census.stories.asces, heading)
        elif not story.gmaps.gmaps and not story.disagreements:
            report = absent_report(story, heading)
        elif vm is None:
            report = gmaps_report(story, census, heading)
        else:
            gmap = story.gmaps.named(vm)
            if gaddr is None:
                rows = list(_tree(prog, census, gmap))
                found, missing = _pgstes(prog, census, gmap, rows) if pgste else (None, [])
                missing = [*story.missing, *missing]
                report = tree_report(story, gmap, census, rows, found, missing, heading)
            else:
                walked = _walk(prog, census, gmap, guest_address(gaddr), pgste)
                report = walk_report(story, gmap, census, walked, heading)
    return emit(report, output_format)


def check_question(vm: str | None, *, asce: bool, pgste: bool) -> None:
    """
    Refuse what does not go together.

    :raises UsageError: with what to do instead
    """
    if pgste and vm is None:
        raise UsageError(f"--pgste needs a VM: {VM_HELP}")
    if asce and vm is not None:
        raise UsageError("--asce shows all mms and CPUs: leave out the VM")


def guest_address(text: str) -> int:
    """
    Read a guest address: hexadecimal digits, ``0x`` is optional.

    :raises UsageError: if it is none
    """
    try:
        value = int(text, 16)
    except ValueError:
        raise UsageError(f"{text!r} is no guest address: hexadecimal digits are") from None
    if not 0 <= value < 1 << 64:
        raise UsageError(f"{text!r} does not fit in 64 bits")
    return value


def _tree(prog: Program, census: Census, gmap: Gmap) -> Iterator[TreeRow]:
    """Get the tables of a gmap, each below the one that points to it."""
    tables, story = census.tables, census.stories.gmaps
    numbers = [n for n, space in enumerate(tables.spaces) if space.gmap == gmap.address]
    rows = np.concatenate([tables.rows_of_space(n) for n in numbers] or [np.empty(0, np.intp)])
    order = np.lexsort((-tables.level[rows].astype(np.int64), tables.va[rows]))
    for row in rows[order].tolist():
        page_table = int(tables.level[row]) == 0
        # A page table of a machine whose gmap belongs to an mm is that mm's.
        host = page_table and not gmap.kvm_owned and not gmap.shadow
        shared = not host and int(tables.first[row]) >= 0
        bears = not gmap.kvm_owned and not host
        ptdesc, typed, index = _descriptor(prog, int(tables.address[row]), bears)
        yield TreeRow(
            row,
            ptdesc,
            typed,
            index,
            "host" if host else "shared" if shared else "own",
            story.host_address(gmap, int(tables.va[row])) if page_table else None,
        )


def _descriptor(
    prog: Program, physical: int, bears_index: bool
) -> tuple[int | None, bool | None, int | None]:
    """Read a table's descriptor: where it is, whether it is typed, its guest address."""
    shift = int(prog["PAGE_SHIFT"].value_())
    try:
        page = compound_head(pfn_to_page(prog, physical >> shift)).read_()
        index = ptdesc_gaddr(page_ptdesc(page)) if bears_index else None
        return int(page.value_()), page_is_pgtable(page), index
    except FaultError:
        return None, None, None


def _pgstes(
    prog: Program, census: Census, gmap: Gmap, rows: Sequence[TreeRow]
) -> tuple[list[Pgste], list[str]]:
    tables = census.tables
    lowest = np.array([row.row for row in rows if int(tables.level[row.row]) == 0], np.intp)
    addresses = tables.address[lowest]
    found, readable = read_pgstes(
        prog, census.paging, addresses, tables.va[lowest], kvm_owned=gmap.kvm_owned
    )
    missing = [
        f"the PGSTEs of the table at {address:#x} cannot be read"
        for address in addresses[~readable].tolist()
    ]
    return found, missing


def _walk(prog: Program, census: Census, gmap: Gmap, address: int, pgste: bool) -> GuestWalk:
    if gmap.space is None:
        raise UsageError(f"{gmap.name} has no tables")
    memory = physical_ranges(prog)
    guest = walk_address(
        prog, census.paging, gmap.space.root, address, memory=memory, kvm_owned=gmap.kvm_owned
    )
    steps = describe_steps(prog, guest)
    host_address = census.stories.gmaps.host_address(gmap, address)
    mm = None if host_address is None else census.spaces.of_mm(gmap.mm)
    host = None
    if mm is not None and host_address is not None:
        host = walk_address(prog, census.paging, mm.root, host_address, memory=memory)
    return GuestWalk(
        guest,
        steps,
        [_index(prog, gmap, step) for step in steps],
        host_address,
        host,
        () if host is None else describe_steps(prog, host),
        _pgste_of(prog, census, gmap, steps, address) if pgste else None,
    )


def _index(prog: Program, gmap: Gmap, described: DescribedStep) -> int | None:
    own = described.step.level > 0 or gmap.shadow
    if gmap.kvm_owned or not own or described.ptdesc is None:
        return None
    return _descriptor(prog, described.step.table, True)[2]


def _pgste_of(
    prog: Program, census: Census, gmap: Gmap, steps: Sequence[DescribedStep], address: int
) -> list[Pgste]:
    """Get the PGSTE of one guest page, if the walk came to a page table."""
    if not steps or steps[-1].step.level:
        return []
    page = census.paging.page_bytes
    first = address & ~(census.paging.levels[0].entries * page - 1)
    found, _ = read_pgstes(
        prog,
        census.paging,
        np.array([steps[-1].step.table], np.uint64),
        np.array([first], np.uint64),
        kvm_owned=gmap.kvm_owned,
    )
    return [pgste for pgste in found if pgste.guest == address & ~(page - 1)]
