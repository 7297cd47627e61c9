# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Samples of stock kernels that crashed, saved by the kernel that took over (lab/live.py).

A stock kernel's debug information is too large for git: the units of a few source files are kept,
and the answers have to be the same as with all of it.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.kernels import Kernel, debian_kernel
from lab.live import crash
from lab.run import REPOSITORY, cache, made_whole, run, say, tool
from lab.samples import LEFT_OUT_SECTIONS, VMCORES, compress, dump_truth
from lab.shrink import Shrunk, shrink, verify
from lab.units import Sections, keep_units


@dataclass(frozen=True)
class CrashedSample:
    """How a sample's guest is made to crash."""

    suite: str
    arch: str
    series: str
    how: str  #: the script of lab/inside
    module: str  #: of lab/provoke
    memory: int = 768  #: MiB, of which 320 are for the kernel that takes over


CRASHED: dict[str, CrashedSample] = {
    "x86_64-6.12-panic": CrashedSample("trixie", "x86_64", "6.12", "panic", "ptring"),
}

#: Where the types and variables that drgn and ptinspect ask for are defined.
_UNITS = (
    *("arch/x86/kernel/alternative.c", "arch/x86/kernel/cpu/common.c"),
    *("arch/x86/kernel/dumpstack_64.c", "arch/x86/kernel/head64.c", "arch/x86/kernel/ldt.c"),
    *("arch/x86/kernel/paravirt.c", "arch/x86/kernel/setup_percpu.c", "arch/x86/kernel/tboot.c"),
    *("arch/x86/mm/fault.c", "arch/x86/mm/init.c", "arch/x86/mm/init_64.c", "arch/x86/mm/numa.c"),
    *("arch/x86/mm/pgtable.c", "arch/x86/mm/tlb.c", "arch/x86/platform/efi/efi_64.c"),
    *("drivers/base/node.c", "drivers/firmware/efi/efi.c", "fs/dcache.c", "fs/namespace.c"),
    *("init/init_task.c", "kernel/cpu.c", "kernel/fork.c", "kernel/module/main.c"),
    *("kernel/module/sysfs.c", "kernel/nsproxy.c", "kernel/panic.c", "kernel/pid.c"),
    *("kernel/printk/printk.c", "kernel/rcu/tree.c", "kernel/sched/core.c", "kernel/smp.c"),
    *("lib/maple_tree.c", "lib/percpu_counter.c", "mm/huge_memory.c", "mm/hugetlb.c"),
    *("mm/init-mm.c", "mm/memcontrol.c", "mm/memory.c", "mm/mm_init.c", "mm/mmap.c"),
    *("mm/mmu_gather.c", "mm/mmzone.c", "mm/numa.c", "mm/page_alloc.c", "mm/page_ext.c"),
    *("mm/slab_common.c", "mm/slub.c", "mm/sparse.c", "mm/swapfile.c", "mm/vmstat.c"),
)

#: Large parts of a stock kernel's image in which nobody looks for page tables: types for BPF, where
#: frames are on stacks, and the names of symbols.
_UNWANTED = (
    ("__start_BTF", "__stop_BTF"),
    ("__start_orc_unwind_ip", "__stop_orc_unwind"),
    ("kallsyms_names", "kallsyms_markers"),
    ("kallsyms_offsets", "kallsyms_seqs_of_names"),
)

#: What is asked with all of the debug information and with what is kept.
_QUESTIONS = ("check", "list", "locks", "pending", "ps", "sharing", "summary")

_SHF_ALLOC = 2
_SHT_NOTE, _SHT_NOBITS = 7, 8


def make_crashed_sample(name: str) -> Path:
    """
    Crash a guest, make its dump and its debug information small, check, package.

    :return: the sample's folder
    :raises LabError: if a step fails, or the small files do not say what the large ones do
    """
    sample = CRASHED[name]
    kernel = debian_kernel(sample.suite, sample.arch, sample.series)
    folder = cache("samples", name)
    truth = crash(
        sample.suite,
        kernel,
        {"full.elf": ["-E", "-d", "31"]},
        folder,
        how=sample.how,
        module=sample.module,
        memory=sample.memory,
    )
    return pack_crashed_sample(name, kernel, folder, truth)


def pack_crashed_sample(name: str, kernel: Kernel, folder: Path, truth: dict[str, Any]) -> Path:
    """Make a sample of ``full.elf``, the dump in a folder."""
    full, small, debug = folder / "full.elf", folder / "vmcore", folder / "vmlinux.debug"
    say("shrinking")
    shrunk = shrink(full, kernel.vmlinux, small, unwanted=_UNWANTED)
    debug_units(kernel, folder, debug)
    compared = verify(full, small, kernel.vmlinux)
    for question in _QUESTIONS:
        if _ask(small, kernel.vmlinux, question) != _ask(small, debug, question):
            raise LabError(f"{question}: the kept debug information does not give the same answer")
    say("packing")
    with made_whole(VMCORES / name) as unfinished:
        unfinished.mkdir(parents=True)
        compress(small, unfinished / "vmcore.xz")
        compress(debug, unfinished / "vmlinux.debug.xz")
        (unfinished / "truth.json").write_text(dump_truth(truth))
        (unfinished / "README.md").write_text(_readme(name, kernel, shrunk, compared))
    full.unlink()
    return VMCORES / name


def _ask(core: Path, symbols: Path, question: str) -> Any:
    target = ["-c", str(core), "-s", str(symbols)]
    done = subprocess.run(
        [sys.executable, "-m", "ptinspect", *target, question, "--format", "json"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.returncode, json.loads(done.stdout)


def debug_units(kernel: Kernel, folder: Path, into: Path) -> None:
    """
    Write the kernel's symbols and some units of its debug information.

    Sections that are loaded are zeroes, but for notes and what unwinds stacks: drgn asks the
    headers of all of them where the per-CPU variables are.
    """
    objcopy = tool(f"{kernel.arch.cross}objcopy", "binutils")
    parts = {}
    for part in Sections._fields:
        path = folder / f"debug_{part}"
        section = f".debug_{part}"
        only = [f"--only-section={section}", "--set-section-flags", f"{section}=alloc"]
        run([objcopy, "-O", "binary", *only, kernel.vmlinux, path])
        parts[part] = path.read_bytes()
    kept = keep_units(Sections(**parts), _UNITS)
    changes = [word for section in LEFT_OUT_SECTIONS for word in ("-R", section)]
    for part, data in kept._asdict().items():
        path = folder / f"debug_{part}"
        path.write_bytes(data)
        changes += ["--update-section", f".debug_{part}={path}"]
    with made_whole(into) as unfinished:
        run([objcopy, *changes, kernel.vmlinux, unfinished])
        _empty_loaded_sections(unfinished)
        unfinished.chmod(0o644)
    for part in parts:
        (folder / f"debug_{part}").unlink()


def _empty_loaded_sections(path: Path) -> None:
    with path.open("r+b") as file:
        header = file.read(64)
        (table,) = struct.unpack_from("<Q", header, 40)
        size, count, strings = struct.unpack_from("<HHH", header, 58)
        file.seek(table)
        raw = file.read(size * count)
        sections = [struct.unpack_from("<IIQQQQ", raw, at * size) for at in range(count)]
        file.seek(sections[strings][4])
        names = file.read(sections[strings][5])
        for name, kind, flags, _, offset, length in sections:
            orc = names.startswith(b".orc", name)
            if flags & _SHF_ALLOC and kind not in (_SHT_NOTE, _SHT_NOBITS) and not orc:
                file.seek(offset)
                file.write(bytes(length))


def _readme(name: str, kernel: Kernel, shrunk: Shrunk, compared: dict[str, Any]) -> str:
    """Write the sample's README."""
    sample = CRASHED[name]
    return "\n".join(
        [
            f"# {name}",
            "",
            f"Debian's Linux {kernel.release} for {kernel.arch.name} ({sample.suite}), crashed by "
            f"`lab/provoke/{sample.module}.c`",
            "and saved by the kernel that took over, with `makedumpfile -E -d 31` on /proc/vmcore.",
            f"Made by `scripts/lab sample {name}`; docs/lab.md tells how, and docs/panic.md looks",
            "into it.",
            "",
            "| file | what it is |",
            "|---|---|",
            "| `vmcore.xz` | the dump: ELF, filtered by makedumpfile, then made small |",
            "| `vmlinux.debug.xz` | symbols, and the types and variables of some source files |",
            "| `truth.json` | what the guest's kernel said right before the crash |",
            "",
            f"- descriptors with the page-table type: {compared['typed']['heads']}, "
            f"of {compared['typed']['pages']} pages",
            f"- {compared['translations']} translations compared between the full and the small "
            f"dump, {compared['translations_mapped']} of present pages: all the same",
            f"- the same answers from {', '.join(_QUESTIONS)} with all of the debug information",
            f"- {sample.memory} MiB, two CPUs, `crashkernel=320M`",
            "",
            *shrunk.section(),
            "",
        ]
    )
