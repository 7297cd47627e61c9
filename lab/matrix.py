# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Where ptinspect works: kernels by kinds of target, each cell tried and remembered.

A cell is a pass if ``summary`` sees everything and agrees with NR_PAGETABLE to the page, ``check``
finds nothing, and each process has the page tables that its kernel said it has. What was tried is
kept in the cache, so that a run can be interrupted and taken up again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.guest import Guest, booted
from lab.initramfs import workload_initramfs
from lab.kernels import Kernel, build_kernel, debian_kernel
from lab.live import LiveAnswers, crash, dump_crashed, look_inside
from lab.run import REPOSITORY, cache, say
from lab.truth import parse_report

DOCUMENT = REPOSITORY / "docs" / "matrix.md"

#: Kinds of target, and what they are in the document.
KINDS = {
    "qmp": "guest, paused over QMP",
    "elf": "QEMU's ELF dump",
    "kdump": "QEMU's kdump-zlib dump",
    "live": "/proc/kcore, as root in the guest",
    "crash": "crashed, saved by kdump -d 31 (s390x, whose kernels have no kdump: by QEMU)",
    "tests": "the suite's questions to resting guests, of such a guest paused over QMP",
}


@dataclass(frozen=True)
class Row:
    """A kernel, and how it is booted."""

    name: str
    arch: str
    #: Of Debian's kernels: suite, series, flavour; of small ones only the recipe's name.
    suite: str = ""
    series: str = ""
    flavour: str | None = None
    recipe: str = ""
    append: str = ""
    kinds: tuple[str, ...] = ("qmp", "elf", "kdump", "tests")
    memory: int = 1024
    #: QEMU's name of a CPU that can less than the one that guests have otherwise.
    cpu: str = ""

    @property
    def extra(self) -> tuple[str, ...]:
        """QEMU options."""
        return ("-cpu", self.cpu) if self.cpu else ()

    def __str__(self) -> str:
        return f"{self.arch} {self.name}"

    def kernel(self) -> Kernel:
        """Get the kernel."""
        if self.recipe:
            return build_kernel(self.recipe)
        return debian_kernel(self.suite, self.arch, self.series, self.flavour)


_DUMPS = ("qmp", "elf", "kdump")

#: What the guest's workload is asked for; it leaves out what there is no memory for.
_WORKLOAD = "lab_hugepages=4"

ROWS = (
    Row("Debian 6.1", "x86_64", "bookworm", "6.1", kinds=tuple(KINDS)),
    Row("Debian 6.12", "x86_64", "trixie", "6.12", kinds=tuple(KINDS)),
    Row("Debian 6.12, pti=on", "x86_64", "trixie", "6.12", append="pti=on"),
    Row("Debian 6.12, no5lvl", "x86_64", "trixie", "6.12", append="no5lvl"),
    Row("Debian 6.12 rt", "x86_64", "trixie", "6.12", "rt-amd64"),
    Row("Debian 7.2", "x86_64", "forky", "7.2", kinds=tuple(KINDS)),
    Row("Debian 7.3", "x86_64", "trixie-backports", "7.3"),
    Row("Debian 7.3 rt", "x86_64", "trixie-backports", "7.3", "rt-amd64"),
    Row("small 7.3", "x86_64", recipe="x86_64-7.3", memory=256),
    Row("small 7.3, pti=on", "x86_64", recipe="x86_64-7.3", memory=256, append="pti=on"),
    Row("small 7.3, no5lvl", "x86_64", recipe="x86_64-7.3", memory=256, append="no5lvl"),
    Row("small 7.3, lockdep", "x86_64", recipe="x86_64-7.3-lockdep", memory=256),
    Row("Debian 6.1", "s390x", "bookworm", "6.1", kinds=tuple(KINDS)),
    Row("Debian 6.12", "s390x", "bookworm-backports", "6.12", kinds=tuple(KINDS)),
    Row("Debian 7.2", "s390x", "forky", "7.2", kinds=(*_DUMPS, "live", "tests")),
    Row("small 7.3", "s390x", recipe="s390x-7.3"),
    Row("Debian 6.1", "aarch64", "bookworm", "6.1"),
    Row("Debian 6.12", "aarch64", "trixie", "6.12"),
    Row("Debian 7.2", "aarch64", "forky", "7.2", kinds=(*_DUMPS, "live", "tests")),
    Row("Debian 7.2, kpti=on", "aarch64", "forky", "7.2", append="kpti=on"),
    Row("Debian 7.2, 16K pages", "aarch64", "forky", "7.2", "arm64-16k"),
    # Without 52-bit addresses in the machine, such kernels leave out a level.
    Row(
        "Debian 7.2, 16K pages, cortex-a76",
        "aarch64",
        "forky",
        "7.2",
        "arm64-16k",
        cpu="cortex-a76",
    ),
    Row("Debian 7.3", "aarch64", "trixie-backports", "7.3"),
    Row("Debian 7.3, 16K pages", "aarch64", "trixie-backports", "7.3", "arm64-16k"),
    Row("small 7.3, 52 bits, 16K pages", "aarch64", recipe="aarch64-7.3-16k"),
    Row("small 7.3, 52 bits, 64K pages", "aarch64", recipe="aarch64-7.3-64k"),
    Row("Debian 6.1, 64K pages", "ppc64le", "bookworm", "6.1"),
    Row("Debian 6.12", "ppc64le", "bookworm-backports", "6.12", kinds=(*_DUMPS, "live", "tests")),
    Row(
        "Debian 6.12, 64K pages",
        "ppc64le",
        "bookworm-backports",
        "6.12",
        "powerpc64le-64k",
        kinds=(*_DUMPS, "live", "tests"),
    ),
    Row("Debian 7.2", "ppc64le", "forky", "7.2"),
    Row("Debian 7.2, 64K pages", "ppc64le", "forky", "7.2", "powerpc64le-64k"),
    Row("small 7.3", "ppc64le", recipe="ppc64le-7.3-4k"),
    Row("small 7.3, 64K pages", "ppc64le", recipe="ppc64le-7.3-64k"),
    Row("Debian 7.2", "riscv64", "forky", "7.2"),
    Row("small 7.3", "riscv64", recipe="riscv64-7.3"),
)


def _store(row: Row) -> Path:
    return cache("matrix") / f"{row.arch}-{row.name.replace(' ', '_').replace(',', '')}.json"


def known(row: Row) -> dict[str, str]:
    """Get the cells of a row that were tried."""
    path = _store(row)
    cells: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return cells


def _remember(row: Row, kind: str, result: str) -> None:
    say(f"{row} {kind}: {result}")
    _store(row).write_text(json.dumps({**known(row), kind: result}, indent=1))


def run_matrix(wanted: Sequence[str] = (), kinds: Sequence[str] = (), again: bool = False) -> None:
    """
    Try the cells that were not tried yet, and write the document after each row.

    :param wanted: only rows in whose architecture and name all of these words are
    :param kinds: only these kinds
    :param again: also what was tried before
    """
    for row in ROWS:
        if not all(word in str(row) for word in wanted):
            continue
        left = [
            kind
            for kind in row.kinds
            if (not kinds or kind in kinds) and (again or kind not in known(row))
        ]
        if left:
            _run_row(row, left)
            write_document()


def _run_row(row: Row, kinds: Sequence[str]) -> None:
    try:
        kernel = row.kernel()
    except LabError as error:
        say(f"{row}: not run: {error}")
        return
    resting = [kind for kind in kinds if kind in _DUMPS]
    if resting:
        try:
            for kind, result in _run_resting(row, kernel, resting):
                _remember(row, kind, result)
        except LabError as error:
            for kind in resting:
                if kind not in known(row):
                    _remember(row, kind, f"the guest: {_first_line(error)}")
    for kind, attempt in (("live", _run_live), ("crash", _run_crash), ("tests", _run_tests)):
        if kind in kinds:
            try:
                _remember(row, kind, attempt(row, kernel))
            except LabError as error:
                _remember(row, kind, f"the guest: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].removesuffix("; the console's end:")


def _run_resting(row: Row, kernel: Kernel, kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Boot with the workload, and look at the guest from outside."""
    with tempfile.TemporaryDirectory(dir=cache("matrix")) as name:
        folder = Path(name)
        initrd = workload_initramfs(kernel.arch, kernel.modules, folder / "initramfs")

        def make() -> Guest:
            return Guest(
                *(kernel.arch, kernel.image, initrd),
                memory=row.memory,
                smp="2",
                append=f"{_WORKLOAD} {row.append}",
                extra=row.extra,
            )

        with booted(make, "@@ready", timeout=900) as guest:
            yield from judge_guest(kernel, guest, kinds, folder)


def judge_guest(
    kernel: Kernel, guest: Guest, kinds: Sequence[str], folder: Path
) -> Iterator[tuple[str, str]]:
    """Look at a resting guest as each of some kinds of target; dumps go into a folder."""
    truth, _ = parse_report(guest.console())
    told = {process["pid"]: process["vm_pte_kb"] for process in truth["processes"]}
    parents = {process["pid"]: process["ppid"] for process in truth["processes"]}
    for kind in kinds:
        target = ["--qemu", str(guest.qmp_socket), "--pause"]
        if kind != "qmp":
            path = folder / kind
            guest.stop()
            try:
                guest.dump(path, "elf" if kind == "elf" else "kdump-zlib")
            except LabError as error:
                yield kind, f"QEMU: {_first_line(error)}"
                continue
            finally:
                guest.cont()
            target = ["-c", str(path)]
        yield kind, _judge([*target, "-s", str(kernel.vmlinux)], told, parents)
        if kind != "qmp":
            path.unlink()


def _run_crash(row: Row, kernel: Kernel) -> str:
    with tempfile.TemporaryDirectory(dir=cache("matrix")) as folder:
        if row.arch == "s390x":
            truth = dump_crashed(row.suite, kernel, Path(folder))
        else:
            truth = crash(row.suite, kernel, {"vmcore": ["-l", "-d", "31"]}, Path(folder))
        told = {int(p): int(s["VmPTE"]) for p, s in truth["kernel"]["status"].items()}
        core = Path(folder) / "vmcore"
        return _judge(["-c", str(core), "-s", str(kernel.vmlinux)], told, {})


#: Of tests/guests, what is asked of guests at rest, whatever their kernel.
_TESTS = (
    "test_guest_checks",
    "test_guest_locks",
    "test_guest_stories",
    "test_guest_walk",
    "test_qmp",
)


def _run_tests(row: Row, _: Kernel) -> str:
    folder = REPOSITORY / "tests" / "guests"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", *(str(folder / f"{n}.py") for n in _TESTS)],
        cwd=REPOSITORY,
        env={**os.environ, "PTINSPECT_ROW": str(row)},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines() or [""]
    failed = [line.split("::")[1] for line in lines if line.startswith("FAILED")]
    if failed:
        return f"tests: {failed[0].split('[')[0]}"
    return "pass" if done.returncode == 0 and " passed" in lines[-1] else f"tests: {lines[-1]}"


def _run_live(row: Row, kernel: Kernel) -> str:
    lines = [f"{name} --format json" for name in ("ptsummary", "ptcheck", "ptps")]
    return _live_verdict(look_inside(row.suite, kernel, [("drgn", *lines)], append=row.append))


def moving_pages(counted: int) -> int:
    """How many pages of tables may come and go while a live kernel with so many of them is read."""
    return 4 + counted // 8


def _live_verdict(answers: LiveAnswers) -> str:
    summary, check, ps = (answer for _, answer in answers.session(0))
    accounting = summary["tables"]["accounting"]
    if abs(accounting["difference"]) > moving_pages(accounting["nr_pagetable_exact"]):
        return "summary: NR_PAGETABLE differs"
    findings = check["tables"]["findings"]
    if findings:
        return f"check: {findings[0]['invariant']}"
    told = answers.document["answers"][0]
    rows = {row["pid"]: row for row in ps["tables"]["spaces"]}
    for pid, status in told["after"]["status"].items():
        # Even of a process that rests, khugepaged may take a table away.
        sizes = {int(said["VmPTE"]) for said in (status, told["before"]["status"][pid])}
        if int(pid) not in rows or rows[int(pid)]["walked_KiB"] not in sizes:
            return f"ps: process {pid} differs"
    return "pass"


def _judge(target: Sequence[str], told: dict[int, int], parents: dict[int, int]) -> str:
    """
    Ask the questions; the first thing that is not right is the answer.

    :param told: kB of page tables, by process
    :param parents: in whose address space a process still is after vfork()
    """
    answers = {}
    for name in ("summary", "check", "ps"):
        status, answer, error = _ask([*target, name])
        if answer is None:
            return f"{name}: {error or f'status {status}'}"
        if answer["missing"]:
            return f"{name}: {answer['missing'][0]}"
        answers[name] = answer
    if answers["summary"]["tables"]["accounting"]["difference"] != 0:
        return "summary: NR_PAGETABLE differs"
    findings = answers["check"]["tables"]["findings"]
    if findings:
        return f"check: {findings[0]['invariant']}"
    # A user half of page-table isolation has no count of its own.
    rows = {
        row["pid"]: row["pgtables_KiB"]
        for row in answers["ps"]["tables"]["spaces"]
        if row["pgtables_KiB"] is not None
    }
    for pid, size in told.items():
        found = rows.get(pid, rows.get(parents.get(pid)))
        if found != size:
            return f"ps: process {pid} has {size} KiB, not {found}"
    return "pass"


def _ask(arguments: Sequence[str]) -> tuple[int, dict[str, Any] | None, str]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ptinspect", *arguments, "--format", "json"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=1200,
        )
    except subprocess.TimeoutExpired:
        return -1, None, "not done in 20 minutes"
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines()
        return done.returncode, None, said[-1] if said else ""
    return done.returncode, answer, ""


def write_document() -> None:
    """Write docs/matrix.md from what is known."""
    lines = [
        "# Where it works",
        "",
        "Written by `scripts/lab matrix`, which boots each kernel under QEMU (no KVM) and looks at",
        "it as each kind of target. *pass*: `summary` sees everything and agrees with NR_PAGETABLE",
        "to the page, `check` finds nothing, and each process has the page tables that its kernel",
        "said it has. Of a kernel that moves while it is read (live), NR_PAGETABLE may differ by",
        "an eighth, and resting processes are compared. Anything else says what was not so.",
        "*not run* is just that; - is not tried, since QEMU, the kernel or drgn has no such thing",
        "there.",
        "",
        *(f"- {kind}: {what}" for kind, what in KINDS.items()),
        "",
        "The suite itself looks at /proc/kcore in x86_64, s390x and (64K pages) ppc64le guests",
        "with Debian 6.12 (tests/guests/test_live.py), and at crashes of x86_64 and s390x",
        "(tests/guests/test_vmcore.py, test_s390_crash.py).",
        "Of six kernels (tests/guests/conftest.py) it asks *tests*, and looks at a dump of each.",
        "",
        "| architecture | kernel | " + " | ".join(KINDS) + " |",
        "|---|---|" + "---|" * len(KINDS),
    ]
    for row in ROWS:
        cells = known(row)
        words = [cells.get(kind, "not run") if kind in row.kinds else "-" for kind in KINDS]
        lines.append(f"| {row.arch} | {row.name} | " + " | ".join(words) + " |")
    DOCUMENT.write_text("\n".join(lines) + "\n")
