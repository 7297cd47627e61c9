# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Dumps with random damage: flipped bits where kernels keep their tables, and files cut short.

Whatever it finds, ``check`` has to end, soon, with a verdict and without a traceback. Each case has
a seed of its own, so that it can be looked at again: ``scripts/hostile --sample NAME --seed N``.
"""

from __future__ import annotations

import resource
import shutil
import signal
import struct
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import BinaryIO, NamedTuple

import click
import numpy as np
from drgn import FaultError, ObjectNotFoundError, Program, offsetof, sizeof
from overlay import Overlay

from ptinspect.census import Census, take_census
from ptinspect.checks import CheckResults, Verdict, run_checks
from ptinspect.errors import PtinspectError
from ptinspect.target import TargetOptions, open_target, sample_names
from ptinspect.target.samples import open_sample

#: What the command line tells in one line.
TOLD = (PtinspectError, FaultError, ObjectNotFoundError)

#: Seconds that one case may take.
LIMIT = 60


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    sample: str
    seed: int
    #: What was damaged, in words.
    what: str
    seconds: float
    #: ``pass``, ``findings``, ``incomplete``, or the one-line error.
    verdict: str
    #: A traceback, an invariant that failed, or a case without end; empty if all is well.
    problem: str


class _TooLongError(BaseException):
    """The case took longer than it may. Nothing on the way catches it."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """End the block by an exception if it takes too long."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Places:
    """Where a target can be damaged: one after the other, kinds with equal chances."""

    def __init__(self, prog: Program, census: Census) -> None:
        self._prog = prog
        tables, scan = census.tables, census.scan
        there = tables.state == 0
        sizes = tables.table_bytes[there].tolist()
        self._tables = list(zip(tables.address[there].tolist(), sizes))
        self._descriptors = scan.addresses.tolist()
        self._page = scan.descriptors.dtype.itemsize
        self._mms = [space.mm.address for space in tables.spaces if space.mm is not None]
        self._mm = sizeof(prog.type("struct mm_struct"))
        mm = prog.type("struct mm_struct")
        self._hot = [
            offsetof(mm, name) for name in ("pgd", "mm_users", "mm_count", "pgtables_bytes")
        ] + [offsetof(mm, "mm_mt") + 8 * n for n in range(2)]

    def pick(self, rng: np.random.Generator) -> tuple[int, bool, str]:
        """Get an address, whether it is physical, and what is there."""
        kind = int(rng.integers(5))
        if kind == 0:
            address, size = self._tables[int(rng.integers(len(self._tables)))]
            return address + int(rng.integers(size)), True, "table"
        if kind == 1:
            # An entry that is used, as most are not.
            address, size = self._tables[int(rng.integers(len(self._tables)))]
            words = np.frombuffer(self._prog.read(address, size, True), np.uint64)
            used = np.flatnonzero(words)
            slot = int(used[int(rng.integers(len(used)))]) if len(used) else 0
            return address + 8 * slot + int(rng.integers(8)), True, "entry"
        if kind in (2, 3):
            address = self._descriptors[int(rng.integers(len(self._descriptors)))]
            return address + int(rng.integers(self._page)), False, "descriptor"
        mm = self._mms[int(rng.integers(len(self._mms)))]
        if rng.integers(2):
            hot = self._hot[int(rng.integers(len(self._hot)))]
            return mm + hot + int(rng.integers(8)), False, "mm"
        return mm + int(rng.integers(self._mm)), False, "mm"


def flip(prog: Program, overlay: Overlay, places: Places, sample: str, seed: int) -> Outcome:
    """Flip up to four bits and check everything."""
    rng = np.random.default_rng(seed)
    words = []
    with ExitStack() as stack:
        for _ in range(int(rng.integers(1, 5))):
            address, physical, kind = places.pick(rng)
            bit = 1 << int(rng.integers(8))
            try:
                byte = prog.read(address, 1, physical)[0] ^ bit
                stack.enter_context(overlay.bytes_at(address, bytes([byte]), physical=physical))
            except FaultError:
                continue
            words.append(f"{kind} {address:#x} bit {bit:#x}")
        return judge(prog, sample, seed, ", ".join(words))


def judge(prog: Program, sample: str, seed: int, what: str) -> Outcome:
    """Check a damaged target."""
    start = time.perf_counter()
    verdict, problem = "", ""
    try:
        with limited(LIMIT):
            results = run_checks(prog)
        verdict, problem = _verdict(results)
    except TOLD as error:
        verdict = f"{type(error).__name__}: {error}"[:200]
    except _TooLongError:
        problem = f"no end after {LIMIT} s"
    except Exception:
        problem = traceback.format_exc()
    return Outcome(sample, seed, what, time.perf_counter() - start, verdict, problem)


def _verdict(results: CheckResults) -> tuple[str, str]:
    failed = [
        f"{r.invariant.id}: {r.reason}" for r in results.results if r.verdict is Verdict.FAILED
    ]
    word = "findings" if results.findings else "incomplete" if results.incomplete else "pass"
    return word, "; ".join(failed)


def flips(sample: str, prog: Program, seeds: range) -> Iterator[Outcome]:
    """Try many seeds on one sample."""
    overlay = Overlay(prog)
    places = Places(prog, take_census(prog))
    for seed in seeds:
        yield flip(prog, overlay, places, sample, seed)


def truncations(sample: str, seeds: Iterable[int]) -> Iterator[Outcome]:
    """
    Cut a sample's dump short, each time at another place.

    By seed in turn: a file that ends too early; one whose headers say so, which is a whole dump
    that lacks memory; one that lacks some of its pieces, as a filtered dump does.
    """
    opened = open_sample(sample)
    with TemporaryDirectory(prefix="hostile-") as folder:
        copy = Path(folder) / "vmcore"
        for seed in seeds:
            shutil.copyfile(opened.core, copy)
            length = int(np.random.default_rng(seed).integers(64, copy.stat().st_size))
            what = f"cut at {length} bytes"
            with copy.open("r+b") as file:
                if seed % 3 == 1:
                    mend_headers(file, length)
                if seed % 3 == 2:
                    what = f"{lose_pieces(file, seed)} pieces lost"
                else:
                    file.truncate(length)
            yield cut(sample, copy, opened.symbols, seed, what)


class _Segment(NamedTuple):
    """A program header of a 64-bit ELF file: where it is, and what it says."""

    at: int
    type: int
    offset: int
    in_file: int


def _segments(file: BinaryIO) -> tuple[str, list[_Segment]]:
    file.seek(0)
    header = file.read(64)
    order = "<" if header[5] == 1 else ">"
    (start,) = struct.unpack_from(f"{order}Q", header, 32)
    size, count = struct.unpack_from(f"{order}HH", header, 54)
    found = []
    for at in range(start, start + size * count, size):
        file.seek(at)
        type_, _, offset, _, _, in_file = struct.unpack(f"{order}IIQQQQ", file.read(40))
        found.append(_Segment(at, type_, offset, in_file))
    return order, found


def _shorten(file: BinaryIO, order: str, segment: _Segment, kept: int) -> None:
    """Leave the first bytes of a segment, and none of the zeroes behind it."""
    file.seek(segment.at + 8)
    file.write(struct.pack(f"{order}Q", segment.offset if kept else 0))
    file.seek(segment.at + 32)
    file.write(struct.pack(f"{order}QQ", kept, kept))


def mend_headers(file: BinaryIO, length: int) -> None:
    """Make the segments of a file end where the file will."""
    order, segments = _segments(file)
    for segment in segments:
        kept = min(segment.in_file, max(0, length - segment.offset))
        if kept < segment.in_file or segment.offset > length:
            _shorten(file, order, segment, kept)


def lose_pieces(file: BinaryIO, seed: int) -> int:
    """Take some segments of memory out of a file; return how many."""
    rng = np.random.default_rng(seed)
    share = float(rng.choice([0.01, 0.05, 0.2]))
    order, segments = _segments(file)
    loads = [segment for segment in segments if segment.type == 1]
    lost = [segment for segment in loads if rng.random() < share]
    for segment in lost:
        _shorten(file, order, segment, 0)
    return len(lost)


def cut(sample: str, core: Path, symbols: Path, seed: int, what: str) -> Outcome:
    """Open and check a dump that ends too early."""
    start = time.perf_counter()
    try:
        with limited(LIMIT), open_target(TargetOptions(core=core, symbols=(symbols,))) as target:
            return judge(target.prog, sample, seed, what)
    except TOLD as error:
        verdict = f"{type(error).__name__}: {error}"[:200]
        return Outcome(sample, seed, what, time.perf_counter() - start, verdict, "")
    except _TooLongError:
        problem = f"no end after {LIMIT} s"
    except Exception:
        problem = traceback.format_exc()
    return Outcome(sample, seed, what, time.perf_counter() - start, "", problem)


@click.command()
@click.option("--flips", "flipped", default=2000, show_default=True, help="Cases in all.")
@click.option("--truncations", "cuts", default=200, show_default=True, help="Cases in all.")
@click.option("--sample", "names", multiple=True, help="Only this sample.")
@click.option("--seed", default=0, show_default=True, help="The first seed.")
def main(flipped: int, cuts: int, names: tuple[str, ...], seed: int) -> None:
    """Check damaged copies of the samples, and tell what became of them."""
    chosen = names or tuple(sample_names())
    verdicts: Counter[str] = Counter()
    slowest = 0.0
    number = 0

    def record(outcome: Outcome) -> None:
        nonlocal slowest, number
        number += 1
        slowest = max(slowest, outcome.seconds)
        word = outcome.verdict.partition(":")[0]
        verdicts["PROBLEM" if outcome.problem else word] += 1
        if outcome.problem:
            click.echo(f"{outcome.sample} seed {outcome.seed} ({outcome.what}):")
            click.echo(outcome.problem)

    for place, name in enumerate(chosen):
        share = range(
            seed + flipped * place // len(chosen), seed + flipped * (place + 1) // len(chosen)
        )
        with open_target(TargetOptions(sample=name)) as target:
            for outcome in flips(name, target.prog, share):
                record(outcome)
        share = range(seed + cuts * place // len(chosen), seed + cuts * (place + 1) // len(chosen))
        for outcome in truncations(name, share):
            record(outcome)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        click.echo(f"{name}: {number} cases so far, slowest {slowest:.1f} s, peak {peak} MiB")
    click.echo(", ".join(f"{count} {word}" for word, count in verdicts.most_common()))


if __name__ == "__main__":
    main()
