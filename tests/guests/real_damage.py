# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Kernels that run, damaged through QEMU's debug stub, and whether ``check`` sees it.

The damage is that of the samples (tests/samples/corruptions.py), done to live memory; here are some
more that people meet. ``scripts/damage`` does all of it to a kernel of choice.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
from corruptions import CORRUPTIONS, Corruption
from damage import Damage, NotHereError
from drgn import Program
from drgn.helpers.linux.printk import get_dmesg
from overlay import Mendable

from lab.guest import Guest, booted
from lab.initramfs import workload_initramfs
from lab.kernels import build_kernel, debian_kernel
from lab.run import REPOSITORY
from lab.stub import Stub
from ptinspect.census import take_census
from ptinspect.checks import Verdict, run_checks
from ptinspect.checks.run import persisting
from ptinspect.errors import ExitStatus
from ptinspect.kernel.direct_map import physical_to_virtual
from ptinspect.target import TargetOptions, open_target

#: Seconds that a damaged kernel runs on before it is looked at.
RUN_ON = 0.2

#: On the architectures that have such lists (include/linux/poison.h).
_LIST_POISON1 = 0xDEAD000000000100


class GuestMemory(Mendable):
    """The memory of a guest that is stopped whenever it is changed."""

    def __init__(self, prog: Program, guest: Guest) -> None:
        super().__init__(prog)
        self._guest = guest

    def _store(self, physical: int, data: bytes) -> None:
        with Stub(self._guest.stub_socket) as stub:
            stub.write(physical, data)


class Wrong(NamedTuple):
    """Something that goes wrong with page tables in a kernel."""

    name: str
    #: Id of the invariant that has to find it.
    invariant: str
    corruption: Corruption


def cut_a_list(d: Damage) -> int:
    """As if a table had been freed that was on a list: its next pointer is poisoned."""
    for found in d.census.stories.lists.lists:
        if len(found.pfns) > 1:
            d.write_page_member(found.pfns[0], "pt_list.next", _LIST_POISON1)
            return found.head
    raise NotHereError("no descriptor is on a list of this kernel")


def leave_a_deposit(d: Damage) -> int:
    """As if a table had been withdrawn from a ring and used, and pmd_huge_pte still named it."""
    story = d.census.stories.deposits
    if not story.supported or story.in_mm:
        raise NotHereError("PMD tables of this kernel have no deposits")
    kept = {ring.ptdesc for ring in story.rings}
    for row in d.rows(0):
        index = d.index(int(d.tables.parent[row]))
        ptdesc = int(d.census.scan.addresses[index])
        if ptdesc in kept:
            continue
        if story.node_in_table:
            spare = physical_to_virtual(d.prog, int(d.tables.address[row]))
        else:
            spare = int(d.census.scan.addresses[d.index(row)])
        return d.write_member(index, "pmd_huge_pte", spare)
    raise NotHereError("every PMD table has deposits")


#: What is done to kernels that run, in the order in which all of it is done to one at a time.
WRONGS = (
    Wrong("leaked table", "typed-reachability", CORRUPTIONS["typed-reachability"]),
    Wrong("table linked twice", "tree-single-parent", CORRUPTIONS["tree-single-parent"]),
    Wrong("stale pmd_huge_pte", "deposit-ring-sane", leave_a_deposit),
    Wrong("wrong pgtables_bytes", "mm-pgtables-bytes", CORRUPTIONS["mm-pgtables-bytes"]),
    Wrong("wrong pt_frag_refcount", "ppc-frag-refcount", CORRUPTIONS["ppc-frag-refcount"]),
    Wrong("wrong pt_index of a gmap", "gmap-crst-index", CORRUPTIONS["gmap-crst-index"]),
    Wrong("wrong pt_mm", "x86-pgd-mm", CORRUPTIONS["x86-pgd-mm"]),
    Wrong("broken list of tables", "list-integrity", cut_a_list),
)


@dataclass(frozen=True)
class Outcome:
    """What became of one damage."""

    wrong: Wrong
    #: Whether a finding of the invariant has the right address; ``None`` if there is no such thing.
    caught: bool | None
    #: Why there is no such thing, or what was found instead.
    why: str = ""
    #: Other invariants that fire too.
    others: tuple[str, ...] = ()
    #: What was still found when the damage had been undone.
    left: tuple[str, ...] = ()


def complaints(prog: Program) -> list[str]:
    """What the kernel has in its log about things that are not as they should be."""
    lines = get_dmesg(prog).decode(errors="replace").splitlines()
    return [line for line in lines if re.search("BUG|WARNING|Bad |corruption|Oops", line)]


def run_on(guest: Guest) -> None:
    """Let a stopped guest run for a moment."""
    guest.cont()
    time.sleep(RUN_ON)
    guest.stop()


def strike(guest: Guest, prog: Program, wrong: Wrong) -> Outcome:
    """
    Damage a guest that is stopped, let it run on, see what is found, and mend it.

    As ``ptinspect --pause check`` does, the guest is looked at twice, and runs on in between.
    """
    with ExitStack() as stack:
        try:
            damage = Damage(GuestMemory(prog, guest), take_census(prog), stack)
            expected = wrong.corruption(damage)
        except NotHereError as error:
            return Outcome(wrong, None, str(error))
        run_on(guest)
        first = run_checks(prog)
        fired = {finding.invariant for finding in first.findings}
        results = first
        if fired:
            run_on(guest)
            results = persisting(first, run_checks(prog, only=fired))
    run_on(guest)
    left = tuple(f"{f.invariant}: {f.message}" for f in run_checks(prog).findings)
    found = [finding for finding in results.findings if finding.invariant == wrong.invariant]
    others = tuple(sorted({finding.invariant for finding in results.findings} - {wrong.invariant}))
    failed = [r.invariant.id for r in first.results if r.verdict is Verdict.FAILED]
    if failed:
        return Outcome(wrong, False, f"{failed[0]} failed", others, left)
    places = sorted({finding.address for finding in found})
    if expected in places:
        return Outcome(wrong, True, "", others, left)
    why = f"expected {expected:#x}, found {[hex(place) for place in places]}"
    return Outcome(wrong, False, why, others, left)


def strike_all(guest: Guest, prog: Program, stack: ExitStack) -> list[tuple[Wrong, int]]:
    """
    Do everything to a guest that is stopped, until the stack is closed.

    :return: What could be done, and the address at which it has to be found.
    """
    done = []
    for wrong in WRONGS:
        try:
            damage = Damage(GuestMemory(prog, guest), take_census(prog), stack)
            done.append((wrong, wrong.corruption(damage)))
        except NotHereError:
            continue
    return done


@dataclass(frozen=True)
class Answers:
    """What ``ptinspect check`` said while everything was wrong at once."""

    #: What was done, and the address at which it has to be found.
    done: list[tuple[Wrong, int]]
    #: By way of looking: the invariants and addresses of what was found.
    found: dict[str, set[tuple[str, int]]]

    def missed(self) -> list[str]:
        """Get what was not found, and where."""
        return [
            f"{wrong.name}: no {wrong.invariant} at {address:#x} ({way})"
            for way, found in self.found.items()
            for wrong, address in self.done
            if (wrong.invariant, address) not in found
        ]


def ask_all(guest: Guest, prog: Program, vmlinux: Path, core: Path, forms: list[str]) -> Answers:
    """
    Do everything to a guest that is stopped, and run ``ptinspect check`` on it and on its dumps.

    :param core: Where its dumps go, one after the other.
    :param forms: Formats of dumps, as QEMU names them.
    """
    with ExitStack() as stack:
        done = strike_all(guest, prog, stack)
        guest.cont()
        try:
            found = {"QMP": ask_check("--qemu", guest.second_socket, "--pause", "-s", vmlinux)}
        finally:
            guest.stop()
        for form in forms:
            guest.dump(core, form)
            found[form] = ask_check("-c", core, "-s", vmlinux)
            core.unlink()
    return Answers(done, found)


def ask_check(*target: str | Path) -> set[tuple[str, int]]:
    """Run ``ptinspect check``: invariants and addresses of its findings."""
    command = [sys.executable, "-m", "ptinspect", *map(str, target), "check", "--max", "1000"]
    answer = subprocess.run(
        [*command, "--format", "json"], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert answer.returncode == ExitStatus.FINDINGS, answer.stderr
    findings = json.loads(answer.stdout)["tables"]["findings"]
    return {(each["invariant"], int(each["address"], 16)) for each in findings}


@click.command()
@click.argument("kernel", nargs=-1, required=True)
@click.option("--flavour", help="What Debian appends to the release, if not the plain kernel's.")
@click.option("--memory", default=1024, help="MiB.", show_default=True)
@click.option("--append", default="", help="Words for the kernel command line.")
@click.option("--every", is_flag=True, help="Also every corruption that samples are broken with.")
@click.option("--kdump/--no-kdump", default=True, help="Whether QEMU can dump this one so.")
def main(
    kernel: tuple[str, ...],
    flavour: str | None,
    memory: int,
    append: str,
    every: bool,
    kdump: bool,
) -> None:
    """Damage a KERNEL that runs: the NAME of a small one, or SUITE ARCH SERIES."""
    chosen = build_kernel(*kernel) if len(kernel) == 1 else debian_kernel(*kernel, flavour)
    initrd = workload_initramfs(chosen.arch, chosen.modules)
    wrongs = list(WRONGS)
    if every:
        wrongs += [Wrong(id, id, corruption) for id, corruption in CORRUPTIONS.items()]

    def make() -> Guest:
        return Guest(
            *(chosen.arch, chosen.image, initrd),
            memory=memory,
            smp="2",
            append=append,
            stub=True,
        )

    with (
        tempfile.TemporaryDirectory() as folder,
        booted(make, "@@ready", timeout=900) as guest,
        open_target(TargetOptions(qemu=str(guest.qmp_socket), symbols=(chosen.vmlinux,))) as target,
    ):
        prog = target.prog
        guest.stop()
        click.echo(
            f"{chosen.release} {chosen.arch.name}: {len(run_checks(prog).findings)} findings"
        )
        for wrong in wrongs:
            outcome = strike(guest, prog, wrong)
            word = {True: "caught", False: "MISSED", None: "-"}[outcome.caught]
            also = f" (also {', '.join(outcome.others)})" if outcome.others else ""
            left = f"; LEFT: {'; '.join(outcome.left)}" if outcome.left else ""
            why = f": {outcome.why}" if outcome.why else ""
            click.echo(f"{word:7} {wrong.name}: {wrong.invariant}{why}{also}{left}")
        forms = ["elf", "kdump-zlib"][: 1 + kdump]
        answers = ask_all(guest, prog, chosen.vmlinux, Path(folder) / "core", forms)
        names = ", ".join(wrong.name for wrong, _ in answers.done)
        click.echo(f"all at once ({names}), in {', '.join(answers.found)}:")
        for what in answers.missed() or ["all found"]:
            click.echo(f"  {what}")
        for line in complaints(prog):
            click.echo(f"  the kernel says: {line}")


if __name__ == "__main__":
    main()
