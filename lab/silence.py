# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
``check`` on a guest under load, many times: a healthy kernel gives no finding.

The load is lab/workload/load.h. The guest has two memory nodes where its machine can, and modules
to load again and again and a RAM disk to swap to where its kernel is Debian's.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from drgn import Program
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.percpu import per_cpu

from lab.arches import Arch
from lab.guest import Guest, booted
from lab.initramfs import workload_initramfs
from lab.kernels import Kernel
from lab.run import say
from lab.samples import X86_APPEND, X86_SMP
from ptinspect.checks import CheckResults, Verdict, run_checks
from ptinspect.checks.run import persisting
from ptinspect.target import Target, TargetOptions, open_target

#: Longest time that the guest runs on between two looks, in seconds.
_RUN_ON = 0.5

#: Of Debian's kernels, in load order: the first comes and goes, the second is swapped to.
LOAD_MODULES = ("loop", "brd")

_MEMORY = 1024

#: What the kernel counted of the things that the load is to do (include/linux/vm_event_item.h).
_EVENTS = (
    *("PGFAULT", "PSWPIN", "PSWPOUT", "PGMIGRATE_SUCCESS", "NUMA_PTE_UPDATES", "NUMA_HINT_FAULTS"),
    *(
        "THP_FAULT_ALLOC",
        "THP_COLLAPSE_ALLOC",
        "THP_SPLIT_PMD",
        "THP_SWPOUT",
        "THP_MIGRATION_SUCCESS",
    ),
    *("COW_KSM", "HTLB_BUDDY_PGALLOC", "COMPACTSUCCESS"),
)


@dataclass(frozen=True)
class Run:
    """One run of all invariants."""

    kernel: str
    #: ``live`` or ``paused``.
    way: str
    seconds: float
    #: Processes that the guest has ever made: tells that it was under load.
    forks: int
    #: What its kernel has counted since it booted, by name.
    events: dict[str, int]
    #: What was found and persisted: false findings, unless the kernel is broken.
    findings: tuple[str, ...]
    #: What a single look gave that was gone at the next.
    vanished: tuple[str, ...]
    set_aside: tuple[str, ...]
    #: What was not seen, and invariants that failed.
    incomplete: tuple[str, ...]


def silence(
    kernel: Kernel,
    rounds: int,
    seconds: float,
    record: Path,
    *,
    seed: int = 1,
    modules: Sequence[Path] = (),
    append: str = "",
) -> Iterator[Run]:
    """
    Boot a kernel under load and run all invariants again and again, live and stopped in turn.

    :param rounds: Runs of each way, at most.
    :param seconds: When to stop at the latest.
    :param record: Gets a line of JSON for each run.
    :param seed: Where the random choices of the load and of the moments begin.
    :param modules: More modules for the guest: :data:`LOAD_MODULES`.
    :param append: More words for the kernel command line.
    """
    end = time.monotonic() + seconds
    random.seed(seed)
    words = f"{_machine_words(kernel)} lab_load=2 lab_hugepages=6 lab_seed={seed} {append}"
    with _loaded(kernel, modules, words) as (guest, target), record.open("a") as out:
        for number in range(2 * rounds):
            if time.monotonic() > end:
                say(f"the time is over after {number} runs")
                return
            live = number % 2 == 0
            # At another place of the load each time.
            time.sleep(random.random() * _RUN_ON)
            start = time.monotonic()
            try:
                first, last = _live(target) if live else _paused(guest, target)
            except OSError as error:
                # Under emulation a guest now and then dies by itself.
                say(f"the guest is gone after {number} runs: {error}")
                return
            took = time.monotonic() - start
            forks = int(target.prog["total_forks"])
            way = "live" if live else "paused"
            run = _run(kernel.release, way, took, forks, _events(target.prog), first, last)
            out.write(json.dumps(asdict(run)) + "\n")
            out.flush()
            yield run


@contextmanager
def _loaded(kernel: Kernel, modules: Sequence[Path], append: str) -> Iterator[tuple[Guest, Target]]:
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        # Not the cache's: another guest of the same architecture has other modules.
        initrd = workload_initramfs(
            kernel.arch, (*kernel.modules, *modules), Path(folder) / "initramfs"
        )

        def make() -> Guest:
            return Guest(
                kernel.arch,
                kernel.image,
                initrd,
                memory=_MEMORY,
                smp=X86_SMP if kernel.arch.name == "x86_64" else "2",
                append=append,
                extra=_nodes(kernel.arch),
            )

        with booted(make, "@@begun", timeout=900) as guest:
            options = TargetOptions(qemu=str(guest.qmp_socket), symbols=(kernel.vmlinux,))
            with open_target(options) as target:
                yield guest, target


def _machine_words(kernel: Kernel) -> str:
    """Tell a small kernel for x86, which has no ACPI, of what ACPI would: nodes, fw_cfg."""
    if kernel.arch.name != "x86_64" or kernel.modules:
        return ""
    return f"{X86_APPEND} numa=fake=2"


def _nodes(arch: Arch) -> tuple[str, ...]:
    """Get QEMU's options for two memory nodes of one CPU each."""
    if arch.name == "s390x":
        return ()
    options: list[str] = []
    for node in range(2):
        options += ["-object", f"memory-backend-ram,id=node{node},size={_MEMORY // 2}M"]
        options += ["-numa", f"node,nodeid={node},cpus={node},memdev=node{node}"]
    return tuple(options)


def _events(prog: Program) -> dict[str, int]:
    """Read the kernel's event counters, summed over CPUs."""
    states = prog["vm_event_states"]
    cpus = [per_cpu(states, cpu).event for cpu in for_each_online_cpu(prog)]
    counted = {}
    for name in _EVENTS:
        try:
            number = int(prog.constant(name))
        except LookupError:
            continue  # this kernel does not count it
        counted[name.lower()] = sum(int(events[number]) for events in cpus)
    return counted


def _live(target: Target) -> tuple[CheckResults, CheckResults]:
    results = run_checks(target.prog, racing=True)
    return results, results


def _paused(guest: Guest, target: Target) -> tuple[CheckResults, CheckResults]:
    """What ``check --pause`` does: a second look after the guest ran on."""
    guest.stop()
    first = run_checks(target.prog)
    guest.cont()
    if not first.findings:
        return first, first
    time.sleep(0.3)
    guest.stop()
    only = {finding.invariant for finding in first.findings}
    second = run_checks(target.prog, only=only)
    guest.cont()
    return first, persisting(first, second)


def _run(
    release: str,
    way: str,
    seconds: float,
    forks: int,
    events: dict[str, int],
    first: CheckResults,
    last: CheckResults,
) -> Run:
    kept = set(last.findings)
    told = [f"{f.invariant}: {f.message} {dict(f.evidence)} {f.owner}" for f in last.findings]
    gone = [f"{f.invariant}: {f.message} {f.owner}" for f in first.findings if f not in kept]
    gone += [f"{r.invariant.id}: {r.vanished}" for r in last.results if r.vanished]
    aside = [f"{r.invariant.id}: {n} {why}" for r in last.results for why, n in r.set_aside]
    lost = list(last.missing)
    for result in last.results:
        lost += [f"{result.invariant.id}: {what}" for what in result.missing]
        if result.verdict is Verdict.FAILED:
            lost.append(f"{result.invariant.id} FAILED {result.reason}")
    return Run(
        kernel=release,
        way=way,
        seconds=round(seconds, 2),
        forks=forks,
        events=events,
        findings=tuple(told),
        vanished=tuple(gone),
        set_aside=tuple(aside),
        incomplete=tuple(lost),
    )
