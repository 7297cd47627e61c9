# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""All invariants, in the order of their families."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module

from ptinspect.checks.model import Check, Invariant, Severity, Unverified
from ptinspect.errors import UsageError

#: Modules of this folder that hold invariants.
FAMILIES = (
    "structure",
    "entries",
    "mappings",
    "roots",
    "descriptor",
    "lists",
    "accounting",
    "deposits",
    "locks",
    "fragments",
    "gmap",
    "layout",
)

_INVARIANTS: dict[str, Invariant] = {}
_UNVERIFIED: dict[str, Unverified] = {}


def invariant(
    id: str,
    *,
    severity: Severity,
    applies: str,
    source: str,
    false_positives: str,
    breaks: str,
) -> Callable[[Check], Check]:
    """
    Enter a function as an invariant.

    The first paragraph of its docstring is the claim, the rest says why it matters.

    :param applies: Where it applies, for people.
    :param source: Where the kernel sees to it.
    :param false_positives: When it may look broken on a healthy kernel.
    :param breaks: What usually breaks it.
    """

    def enter(check: Check) -> Check:
        claim, _, why = (check.__doc__ or "").strip().partition("\n\n")
        assert id not in _INVARIANTS, id
        _INVARIANTS[id] = Invariant(
            id=id,
            family=check.__module__.rpartition(".")[2],
            severity=severity,
            applies=applies,
            source=source,
            false_positives=false_positives,
            breaks=breaks,
            claim=" ".join(claim.split()),
            why=" ".join(why.split()),
            check=check,
        )
        return check

    return enter


def not_verified(id: str, claim: str, reason: str) -> None:
    """Enter an invariant that is not checked, with the reason."""
    _UNVERIFIED[id] = Unverified(id, claim, reason)


def invariants() -> tuple[Invariant, ...]:
    """Get every invariant."""
    return tuple(_INVARIANTS.values())


def unverified() -> tuple[Unverified, ...]:
    """Get the invariants that are not checked, with the reasons."""
    return tuple(_UNVERIFIED.values())


def select(only: Iterable[str] = (), skip: Iterable[str] = ()) -> tuple[Invariant, ...]:
    """
    Get some of the invariants, by id or family.

    :raises UsageError: if there is no such id or family
    """
    only, skip = set(only), set(skip)
    known = invariants()
    names = {one.id for one in known} | {one.family for one in known}
    for name in sorted((only | skip) - names):
        raise UsageError(f"there is no invariant {name!r}: see ptinspect check --list")
    return tuple(
        one
        for one in known
        if (not only or {one.id, one.family} & only) and not {one.id, one.family} & skip
    )


def load_families() -> None:
    """Import the families in their order; the package does it before anybody can import one."""
    for name in FAMILIES:
        import_module(f"ptinspect.checks.{name}")
