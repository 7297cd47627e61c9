# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages with several tables in them, as reports: powerpc's fragments and s390's halves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ptinspect.census import Census
from ptinspect.faces.racing import doubtful
from ptinspect.faces.report import Cell, Column, Kind, Report, Table
from ptinspect.reached import census_missing
from ptinspect.state.fragments import PAGE_PROBLEMS, UNKNOWN_LEVEL, Fragments
from ptinspect.state.halves import (
    BOTH,
    HALF_BYTES,
    HALF_PROBLEMS,
    LOWER,
    UPPER,
    Halves,
    half_name,
)


def no_fragments_report(reason: str, target: str) -> Report:
    """Say why a target has no page with several tables."""
    return Report("frags", target, (), notes=(f"Not applicable to {target}: {reason}",))


def frags_report(
    census: Census,
    target: str,
    *,
    racing: bool,
    problems: bool = False,
    space: int | None = None,
    limit: int | None = None,
) -> Report:
    """
    Lay out the pages that hold several tables.

    :param problems: Whether to list only pages in which something is wrong.
    :param space: Index of the only space that is wanted.
    :param limit: The most pages to list.
    :raises ValueError: if this kernel has no such pages
    """
    fragments, halves = census.stories.fragments, census.stories.halves
    story = halves if fragments is None else fragments
    if story is None:
        raise ValueError("this kernel has no pages with several tables")
    wanted = np.ones(len(story), np.bool_)
    if problems:
        wanted &= story.problem != 0
    if space is not None:
        wanted &= story.space == space
    rows = np.flatnonzero(wanted)[:limit]
    if fragments is not None:
        report = _fragments_report(fragments, rows, target)
    else:
        assert halves is not None
        report = _halves_report(halves, rows, target)
    findings, notes = doubtful(report.findings, racing=racing)
    missing = tuple(dict.fromkeys((*census_missing(census), *story.missing)))
    return replace(report, notes=[*report.notes, *notes], findings=findings, missing=missing)


def _level_name(fragments: Fragments, level: int) -> str | None:
    return None if level == UNKNOWN_LEVEL else fragments.tables.paging.levels[level].name


def _space_name(story: Fragments | Halves, space: int) -> str | None:
    return None if space < 0 else story.tables.spaces[space].name


def _fragments_report(fragments: Fragments, rows: npt.NDArray[np.intp], target: str) -> Report:
    return Report(
        "frags",
        target,
        (
            Table(
                "levels",
                (
                    Column("level"),
                    Column("fragment_bytes", Kind.COUNT),
                    Column("per_page", Kind.COUNT),
                    Column("pages", Kind.COUNT),
                    Column("linked", Kind.COUNT),
                    Column("deposited", Kind.COUNT),
                    Column("pending", Kind.COUNT),
                    Column("free", Kind.COUNT),
                    Column("free_KiB", Kind.COUNT),
                ),
                list(_fragment_levels(fragments)),
                f"Tables that share pages ({target})",
            ),
            Table(
                "pages",
                (
                    Column("pfn", Kind.HEX),
                    Column("level"),
                    Column("space"),
                    Column("linked", Kind.COUNT),
                    Column("deposited", Kind.COUNT),
                    Column("pending", Kind.COUNT),
                    Column("cache_at", Kind.COUNT),
                    Column("free", Kind.COUNT),
                    Column("refcount", Kind.COUNT),
                    Column("arithmetic"),
                    Column("problem"),
                ),
                _fragment_rows(fragments, rows),
                "Pages; the space is the first that has a table there",
            ),
            Table(
                "caches",
                (
                    Column("space"),
                    Column("mm", Kind.HEX),
                    Column("member"),
                    Column("pointer", Kind.HEX),
                    Column("pfn", Kind.HEX),
                    Column("fragment", Kind.COUNT),
                    Column("problem"),
                ),
                list(_cache_rows(fragments)),
                "Caches that are not empty: the next fragment that an mm gets",
            ),
        ),
        notes=(
            f"{len(rows)} of {len(fragments)} pages",
            "The count of a page is the fragments in use, and those from a cache's pointer on. "
            "Free ones that no cache leads to are lost until the whole page is free.",
        ),
        findings=list(_fragment_findings(fragments)),
    )


def _fragment_levels(fragments: Fragments) -> Iterator[Sequence[Cell]]:
    for level, shape in enumerate(fragments.shapes):
        here = (fragments.level == level) & ~fragments.boot
        free = int(fragments.free[here].sum())
        yield (
            _level_name(fragments, level),
            shape.size,
            shape.number,
            int(np.count_nonzero(here)),
            int(fragments.linked[here].sum()),
            int(fragments.deposited[here].sum()),
            int(fragments.pending[here].sum()),
            free,
            free * shape.size // 1024,
        )


def _fragment_rows(fragments: Fragments, rows: npt.NDArray[np.intp]) -> Iterator[Sequence[Cell]]:
    free = fragments.free
    for row in rows.tolist():
        cached = int(fragments.cached[row])
        readable, boot = bool(fragments.readable[row]), bool(fragments.boot[row])
        problem = int(fragments.problem[row])
        yield (
            int(fragments.pfn[row]),
            _level_name(fragments, int(fragments.level[row])),
            _space_name(fragments, int(fragments.space[row])),
            int(fragments.linked[row]),
            int(fragments.deposited[row]),
            int(fragments.pending[row]),
            None if cached < 0 else cached,
            None if boot else int(free[row]),
            int(fragments.refcount[row]) if readable else None,
            fragments.arithmetic(row),
            PAGE_PROBLEMS[problem] or None,
        )


def _cache_rows(fragments: Fragments) -> Iterator[Sequence[Cell]]:
    for cache in fragments.caches:
        mm = fragments.tables.spaces[cache.space].mm
        yield (
            _space_name(fragments, cache.space),
            None if mm is None else mm.address,
            "pte_frag" if cache.level == 0 else "pmd_frag",
            cache.pointer,
            cache.pfn,
            cache.fragment,
            "none: the mm exits or is new" if cache.dropped else cache.problem or None,
        )


def _fragment_findings(fragments: Fragments) -> Iterator[str]:
    for row in np.flatnonzero(fragments.problem).tolist():
        yield (
            f"page {int(fragments.pfn[row]):#x}: {PAGE_PROBLEMS[int(fragments.problem[row])]}: "
            f"pt_frag_refcount {int(fragments.refcount[row])}, {fragments.arithmetic(row)}"
        )
    for cache in fragments.caches:
        if cache.problem:
            member = "pte_frag" if cache.level == 0 else "pmd_frag"
            name = _space_name(fragments, cache.space)
            yield f"{member} of {name} ({cache.pointer:#x}) {cache.problem}"


def _halves_report(halves: Halves, rows: npt.NDArray[np.intp], target: str) -> Report:
    on_the_way = int(np.count_nonzero(halves.on_the_way))
    notes = [
        f"{len(rows)} of {len(halves)} pages",
        "bits: the upper byte of _refcount; 01 and 02: lower and upper half allocated, 10 and 20: "
        "waiting to be freed.",
    ]
    if on_the_way:
        notes.append(f"{on_the_way} pages: {HALF_PROBLEMS[-1]}.")
    return Report(
        "frags",
        target,
        (
            Table(
                "states",
                (
                    Column("bits", Kind.HEX),
                    Column("lower"),
                    Column("upper"),
                    Column("pages", Kind.COUNT),
                    Column("free_KiB", Kind.COUNT),
                ),
                list(_half_states(halves)),
                f"Page tables that share pages ({target})",
            ),
            Table(
                "pages",
                (
                    Column("pfn", Kind.HEX),
                    Column("space"),
                    Column("bits", Kind.HEX),
                    Column("lower"),
                    Column("upper"),
                    Column("linked"),
                    Column("pgste"),
                    Column("on_list_of"),
                    Column("problem"),
                ),
                _half_rows(halves, rows),
                "Pages; the space is the first that has a table there, or whose list it is on",
            ),
            Table(
                "lists",
                (
                    Column("space"),
                    Column("pages", Kind.COUNT),
                    Column("whole"),
                ),
                [
                    (_space_name(halves, found.space), found.pages, found.broken is None)
                    for found in halves.lists
                ],
                "context.pgtable_list of each mm: pages with one half allocated",
            ),
        ),
        notes=notes,
        findings=list(_half_findings(halves)),
    )


def _half_states(halves: Halves) -> Iterator[Sequence[Cell]]:
    for bits, pages in halves.states().items():
        used = bits | bits >> 4
        free = 2 - bin(used & BOTH).count("1")
        kib = pages * free * HALF_BYTES // 1024
        yield bits, half_name(LOWER, bits), half_name(UPPER, bits), pages, kib


def _half_rows(halves: Halves, rows: npt.NDArray[np.intp]) -> Iterator[Sequence[Cell]]:
    names = {0: "none", LOWER: "lower", UPPER: "upper", BOTH: "both"}
    for row in rows.tolist():
        bits = int(halves.bits[row])
        readable = bool(halves.readable[row])
        yield (
            int(halves.pfn[row]),
            _space_name(halves, int(halves.space[row])),
            bits if readable else None,
            half_name(LOWER, bits) if readable else None,
            half_name(UPPER, bits) if readable else None,
            names[int(halves.linked[row])],
            bool(halves.pgste[row]),
            _space_name(halves, int(halves.listed[row])),
            HALF_PROBLEMS[int(halves.problem[row])] or None,
        )


def _half_findings(halves: Halves) -> Iterator[str]:
    for found in halves.lists:
        if found.broken is not None and not found.lost:
            yield f"pgtable_list of {_space_name(halves, found.space)} breaks: {found.broken}"
    for row in np.flatnonzero(halves.contradicts).tolist():
        refcount = int(halves.bits[row]) << 24 | int(halves.count[row])
        yield (
            f"page {int(halves.pfn[row]):#x}: {HALF_PROBLEMS[int(halves.problem[row])]}: "
            f"_refcount {refcount:#010x}"
        )
