# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``ptinspect walk``, ``map`` and ``owner``."""

from __future__ import annotations

import click

from ptinspect.census import take_census
from ptinspect.cli.output import ProgressLine, emit, format_option, target_heading
from ptinspect.cli.spaces import choose_space, parse_virtual_address
from ptinspect.cli.target_options import chosen_target, target_options
from ptinspect.faces.translate import map_report, owner_report, walk_report
from ptinspect.kernel.paging import EntryClass, paging_of
from ptinspect.locate import locate_physical
from ptinspect.tables.lookup import page_owners, table_owners, tables_within, walk_address
from ptinspect.tables.physical import physical_ranges
from ptinspect.tables.ranges import map_space
from ptinspect.tables.steps import describe_steps
from ptinspect.target import open_target


@click.command("walk", short_help="One virtual address through every level.")
@target_options
@click.argument("space_name", metavar="SPACE")
@click.argument("address_text", metavar="VA")
@format_option
def walk_command(space_name: str, address_text: str, output_format: str) -> int:
    """
    One virtual address through every level, with each level's descriptor.

    SPACE is a process ID, `kernel`, `efi`, mm:ADDRESS, or PID:kpti for the half that user mode
    runs on. VA is hexadecimal, or the name of a kernel symbol.

    \b
    Examples:
      ptinspect --sample x86_64-7.3 walk kernel init_task
      ptinspect walk 1 400000
    """
    with open_target(chosen_target()) as target:
        prog = target.prog
        space = choose_space(prog, space_name)
        address = parse_virtual_address(prog, address_text)
        paging = paging_of(prog)
        translation = walk_address(
            prog,
            paging,
            space.root,
            address,
            memory=physical_ranges(prog),
            kernel=space.kernel,
            kvm_owned=space.kvm_owned,
        )
        report = walk_report(
            paging, space, translation, describe_steps(prog, translation), target_heading(target)
        )
    return emit(report, output_format)


@click.command("map")
@target_options
@click.argument("space_name", metavar="SPACE")
@click.option("--all", "everything", is_flag=True, help="Also what is swapped or otherwise absent.")
@click.option(
    "--fold/--no-fold",
    default=None,
    help="Write what maps the same memory at equal distances as one row (the default in text).",
)
@format_option
def map_command(space_name: str, everything: bool, fold: bool | None, output_format: str) -> int:
    """
    An address space as merged ranges with whole-path permissions.

    SPACE is as for `walk`.

    Example: ptinspect --sample x86_64-7.3 map kernel
    """
    with open_target(chosen_target()) as target:
        prog = target.prog
        space = choose_space(prog, space_name)
        paging = paging_of(prog)
        kinds = [EntryClass.LEAF, EntryClass.PROT_NONE, EntryClass.BAD]
        if everything:
            kinds = [kind for kind in EntryClass if kind not in (EntryClass.NONE, EntryClass.TABLE)]
        mapped = map_space(prog, paging, space, kinds=kinds, memory=physical_ranges(prog))
        if fold is None:
            fold = output_format == "text"
        report = map_report(paging, mapped, target_heading(target), fold=fold)
    return emit(report, output_format)


@click.command("owner", short_help="Which spaces and addresses reach a table or a page.")
@target_options
@click.argument("address", metavar="ADDR")
@format_option
def owner_command(address: str, output_format: str) -> int:
    """
    Which spaces and addresses reach a page: as a table, or as memory that they map.

    ADDR is as for `show`: a page frame number, or a physical, direct-map or struct page address.

    Example: ptinspect --sample x86_64-7.3 owner pfn:0x105
    """
    with open_target(chosen_target()) as target:
        prog = target.prog
        physical, size = locate_physical(prog, address)
        progress = ProgressLine("Walking all address spaces")
        try:
            census = take_census(prog, leaf_counts=False, scan_progress=progress)
        finally:
            progress.close()
        # A page frame may hold several tables (powerpc's fragments, s390's halves).
        tables = [
            owner
            for table in tables_within(census.tables, physical, physical + size)
            for owner in table_owners(census.tables, table)
        ]
        pages = page_owners(prog, census.tables, physical)
        report = owner_report(census, physical, tables, pages, target_heading(target))
    return emit(report, output_format)
