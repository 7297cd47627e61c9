# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open a target: choose the way, load the debugging information, undo everything at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from drgn import Program

from ptinspect.errors import DebugInfoError, TargetError, UsageError
from ptinspect.target import architecture as architectures
from ptinspect.target import debuginfo, recovery, vmcoreinfo
from ptinspect.target.architecture import TargetArchitecture
from ptinspect.target.core import open_core
from ptinspect.target.guest import Guest, open_guest
from ptinspect.target.live import KCORE, open_live
from ptinspect.target.options import Target, TargetKind, TargetOptions
from ptinspect.target.pause import paused
from ptinspect.target.program import of_program
from ptinspect.target.samples import open_sample
from ptinspect.target.wording import reason
from ptinspect.target.xen import refuse_xen_pv


@contextmanager
def open_target(options: TargetOptions) -> Iterator[Target]:
    """
    Open a kernel and load its debugging information.

    When the context ends, in whatever way, a guest that was stopped for it runs again and nothing
    temporary is left.

    :param options: What to open, and how.
    :return: A context manager; its value has the drgn program as ``prog``.
    :raises TargetError: if the target cannot be opened
    :raises DebugInfoError: if its debugging information is missing or belongs to another kernel
    :raises UsageError: if the options contradict each other
    """
    _check_options(options)
    with ExitStack() as stack:
        try:
            target = _open(options, stack)
        except OSError as error:
            # A file or a QEMU that vanished in the middle of it.
            what = options.qemu or options.core or options.sample or KCORE
            raise TargetError(f"{what}: lost while it was opened: {reason(error)}") from None
        yield target


def _open(options: TargetOptions, stack: ExitStack) -> Target:
    """
    :param stack: What has to be undone in the end.
    """
    if options.program is not None:
        return of_program(options.program)
    note = vmcoreinfo.read_file(options.vmcoreinfo) if options.vmcoreinfo else None
    architecture = (
        architectures.by_name(options.architecture) if options.architecture is not None else None
    )
    symbols = options.symbols
    guest: Guest | None = None
    if options.sample is not None:
        sample = open_sample(options.sample)
        symbols = symbols or (sample.symbols,)
        opened = open_core(sample.core, architecture, note)
        target = replace(opened, kind=TargetKind.SAMPLE, name=sample.name)
    elif options.core is not None:
        target = open_core(options.core, architecture, note)
    elif options.qemu is not None:
        guest = stack.enter_context(open_guest(options.qemu, architecture, note))
        target = guest.target
    else:
        target = open_live(architecture, note)
    if _check_memory(target, options.vmcoreinfo) is None:
        target = replace(target, notes=(*target.notes, "the kernel's own data cannot be read"))
    debuginfo.load(target.prog, symbols, options.kernel_directory)
    refuse_xen_pv(target.prog)
    if options.pause and guest is not None:
        # Only now: while debugging information is loaded the guest need not stand still.
        how = stack.enter_context(paused(guest.connection))
        target = replace(target, racing=False, notes=(*target.notes, how))
    return target


def _check_memory(target: Target, note_file: Path | None) -> bool | None:
    """
    Check that VMCOREINFO and memory belong together, before anything is built on it.

    :return: None if the memory needed for that cannot be read
    """
    text = target.prog["VMCOREINFO"].string_()
    fits = vmcoreinfo.matches(text, recovery.reader(target.prog, physical=False))
    if fits is False or (fits is None and note_file is not None):
        source = f"--vmcoreinfo {note_file}" if note_file is not None else "its VMCOREINFO"
        raise TargetError(
            f"{target.name}: {source} does not describe this memory: "
            "where it has init_uts_ns there is no such release"
        )
    return fits


def open_symbols(symbols: Sequence[Path], architecture: str | None = None) -> Program:
    """
    A program without a target: the types of a vmlinux, and the addresses of its symbols.

    :param symbols: The vmlinux, and modules if wanted.
    :param architecture: Refuse anything else than this.
    :raises TargetError: if the architecture is not supported
    :raises DebugInfoError: if a file cannot be read or has no DWARF
    """
    if not symbols:
        raise UsageError("no file with debugging information given (--symbols FILE)")
    wanted = architectures.by_name(architecture) if architecture is not None else None
    prog: Program | None = None
    for path in symbols:
        found = _architecture_of(path)
        if wanted is not None and found != wanted:
            raise DebugInfoError(f"--symbols {path}: it is for {found.name}, not for {wanted.name}")
        wanted = found
        if prog is None:
            prog = Program(found.platform)
        debuginfo.load_types(path, prog)
    assert prog is not None
    return prog


def _architecture_of(path: Path) -> TargetArchitecture:
    elf, _ = debuginfo.read_symbols_header(path)
    return architectures.by_elf(f"--symbols {path}", elf.machine, elf.bits, elf.little_endian)


def _check_options(options: TargetOptions) -> None:
    given = [
        name
        for name, value in (
            ("--core", options.core),
            ("--qemu", options.qemu),
            ("--sample", options.sample),
            ("an open program", options.program),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other")
    if options.pause and options.qemu is None:
        raise UsageError("--pause needs --qemu: nothing else can be stopped")
