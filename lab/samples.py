# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Samples: one small real dump each, with its debug file and what its own kernel said.

``vmcores/NAME/`` holds ``vmcore.xz`` (ELF), ``vmlinux.debug.xz``, ``truth.json`` (lab/truth.py),
the kernel's own dumps of its page tables as text, and a README.md that says how all of it was made.
"""

from __future__ import annotations

import json
import lzma
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.arches import Arch
from lab.dump import count_typed, nr_page_table_pages, open_dump, read_pages, tails, typed_pages
from lab.errors import LabError
from lab.guest import Guest
from lab.initramfs import workload_initramfs
from lab.kernels import RECIPES, Kernel, build_kernel, fragment_text
from lab.moment import GATHERING, KERNEL_TABLES, wait_for_moment
from lab.run import REPOSITORY, cache, made_whole, run, say, tool
from lab.shrink import Shrunk, shrink, verify
from lab.truth import parse_report

VMCORES = REPOSITORY / "vmcores"

#: Sections that drgn needs for source lines and local variables only.
LEFT_OUT_SECTIONS = (
    ".debug_loclists",
    ".debug_rnglists",
    ".debug_frame",
    ".debug_aranges",
    ".debug_line",
)


@dataclass(frozen=True)
class Sample:
    """How a sample's guest is run."""

    append: str
    smp: str = "2"
    kernel: str = ""  #: the small kernel, if it is not called as the sample is
    memory: int = 128  #: MiB
    #: What it does when it is dumped, while its workload keeps running (lab/moment.py); empty: it
    #: rests.
    moment: str = ""


#: x86 without ACPI: where fw_cfg is has to be said, and the MP table wants two sockets.
X86_SMP = "2,sockets=2,cores=1,threads=1"
X86_APPEND = "qemu_fw_cfg.ioport=12@0x510:0:1:4 init_on_free=1 lab_hugepages=4"

SAMPLES: dict[str, Sample] = {
    "x86_64-7.3": Sample(f"{X86_APPEND} numa=fake=2", X86_SMP),
    "x86_64-7.3-load": Sample(
        f"{X86_APPEND} numa=fake=2 lab_load=1 lab_sparse=1200",
        X86_SMP,
        kernel="x86_64-7.3",
        moment=GATHERING,
    ),
    # Tables of the kernel that are freed later.
    "x86_64-7.3-async": Sample(f"{X86_APPEND} lab_load=3", X86_SMP, moment=KERNEL_TABLES),
    "x86_64-7.3-owner": Sample(f"{X86_APPEND} page_owner=on", X86_SMP),
    "x86_64-6.1": Sample(f"{X86_APPEND} pti=on", X86_SMP),
    # Locks that are too large for a descriptor.
    "x86_64-6.12-lockdep": Sample(X86_APPEND, X86_SMP),
    "s390x-6.12": Sample("init_on_free=1"),
    "s390x-6.1": Sample("init_on_free=1"),
    "s390x-7.3": Sample("init_on_free=1"),
    "arm64-7.3": Sample("init_on_free=1 lab_hugepages=4", kernel="aarch64-7.3"),
    # 64K pages: every process and slab needs more.
    "ppc64le-6.12": Sample("init_on_free=1 lab_hugepages=4", memory=256),
}


def find_sample(name: str) -> Sample:
    """
    Get a sample's settings.

    :raises LabError: if there is none of that name
    """
    if name not in SAMPLES:
        raise LabError(f"no sample {name!r}: there are {', '.join(SAMPLES)}")
    return SAMPLES[name]


def kernel_name(name: str) -> str:
    """Get the name of a sample's small kernel (lab/kernels.py)."""
    return find_sample(name).kernel or name


def debug_file(arch: Arch, vmlinux: Path, into: Path) -> None:
    """Write what drgn needs of a vmlinux: types, variables, symbols and the build ID."""
    objcopy = tool(f"{arch.cross}objcopy", f"binutils-{arch.triplet.replace('_', '-')}")
    removed = [word for section in LEFT_OUT_SECTIONS for word in ("-R", section)]
    with made_whole(into) as unfinished:
        run([objcopy, "--only-keep-debug", *removed, vmlinux, unfinished])
        unfinished.chmod(0o644)


def compress(path: Path, into: Path) -> None:
    """Compress a file as small as xz can."""
    with made_whole(into) as unfinished:
        unfinished.write_bytes(lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME))


def _add_debug_file(name: str, debug: Path, packed: Path) -> None:
    """Pack a debug file, or link to that of the sample that bears the kernel's name."""
    other = VMCORES / kernel_name(name) / packed.name
    if kernel_name(name) in SAMPLES and kernel_name(name) != name and other.exists():
        if lzma.decompress(other.read_bytes()) != debug.read_bytes():
            raise LabError(f"{other} is of another build than this kernel: make that sample first")
        packed.symlink_to(Path("..") / other.parent.name / other.name)
        return
    compress(debug, packed)


def system_ram(truth: dict[str, Any]) -> list[tuple[int, int]]:
    """Get the [start, end) ranges that /proc/iomem calls System RAM."""
    return [
        (int(part["start"], 16), int(part["end"], 16) + 1)
        for part in truth["iomem"]
        if part["name"] == "System RAM"
    ]


def guest_memory(truth: dict[str, Any]) -> list[tuple[int, int]]:
    """Get the pages of virtual machines that the workload noted: process ID, address there."""
    found = []
    for note in truth["made"]:
        kind, *words = note["text"].split()
        if kind in ("gmap-page", "gmap-zero-page", "gmap-user-page"):
            found.append((note["pid"], int(words[1], 16)))
        elif kind == "gmap-guest-tables":
            start, size = int(words[1], 16), int(words[2], 16)
            found += [(note["pid"], at) for at in range(start, start + size, truth["page_size"])]
    return found


def check_truth(dump: Path, vmlinux: Path, truth: dict[str, Any]) -> dict[str, Any]:
    """
    Check that a dump shows the state that its kernel reported, or the one seen at its moment.

    The typed pages are those that /proc/kpageflags named, NR_PAGETABLE (global and each CPU's part)
    is what /proc/vmstat gave, and the typed pages are as many as NR_PAGETABLE counts.

    :return: the numbers
    :raises LabError: where they differ
    """
    program = open_dump(dump, vmlinux)
    pages = read_pages(program)
    counted = nr_page_table_pages(program)
    typed = count_typed(program, pages)
    if "moment" in truth:
        numbers = {"typed": typed, "nr_page_table_pages": counted}
        if any(truth["moment"][name] != value for name, value in numbers.items()):
            raise LabError(f"the dump shows {numbers}, not the moment at which it was taken")
        return numbers
    said = truth["nr_page_table_pages"]
    expected = {"global": said["global"], "remainder": said["per_cpu_remainder"]}
    if counted != {**expected, "exact": said["exact"]}:
        raise LabError(f"NR_PAGETABLE is {counted} in the dump, but /proc/vmstat said {said}")
    reported = np.zeros(len(pages.exists), dtype=np.bool_)
    for pfn, count in truth["kpageflags_pgtable"]["pfns"]:
        reported[int(pfn, 16) : int(pfn, 16) + count] = True
    # /proc/kpageflags may or may not speak of the tails of compound pages.
    tail = tails(program, pages)
    if not np.array_equal(reported & ~tail, typed_pages(program, pages) & ~tail):
        raise LabError("the dump's typed pages are not those of /proc/kpageflags")
    if typed["pages"] != counted["exact"]:
        raise LabError(f"typed pages are {typed}, but NR_PAGETABLE is {counted['exact']}")
    return {"typed": typed, "nr_page_table_pages": counted}


#: What a guest's report says that stays true while its workload keeps running.
_TRUE_AT_ANY_MOMENT = (
    *("schema", "kernel", "page_size", "table_span", "cpus", "zones", "iomem", "made", "skipped"),
)


def run_guest(name: str, kernel: Kernel, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Boot a sample's guest, wait for its report, stop it and dump it to ``folder/full.elf``.

    :return: the truth, and the text files beside it
    """
    sample = find_sample(name)
    initrd = workload_initramfs(kernel.arch, kernel.modules)
    say(f"booting {name}")
    with Guest(
        kernel.arch,
        kernel.image,
        initrd,
        memory=sample.memory,
        smp=sample.smp,
        append=sample.append,
        console_log=folder / "console.txt",
    ) as guest:
        guest.wait_for("@@ready", timeout=300)
        if sample.moment:
            truth, _ = parse_report(guest.console())
            moment = wait_for_moment(guest, kernel.vmlinux, folder / "full.elf", sample.moment)
            kept = {name: truth[name] for name in _TRUE_AT_ANY_MOMENT}
            return {**kept, "moment": moment}, {}
        guest.stop()
        truth, texts = parse_report(guest.console())
        say("dumping")
        guest.dump(folder / "full.elf")
    return truth, texts


def dump_truth(truth: dict[str, Any]) -> str:
    """Write the document with a line a member, and a line an element of its lists of objects."""
    lines = []
    for name, value in truth.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            items = ",\n  ".join(json.dumps(item, separators=(",", ":")) for item in value)
            text = f"[\n  {items}\n ]"
        else:
            text = json.dumps(value, separators=(",", ":"))
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def make_sample(name: str) -> Path:
    """
    Do everything: build, boot, dump, shrink, check, package.

    :return: the sample's folder
    :raises LabError: if a step fails or the numbers do not agree
    """
    kernel = build_kernel(kernel_name(name))
    folder = cache("samples", name)
    truth, texts = run_guest(name, kernel, folder)
    truth["kernel"] = {"release": kernel.release, "arch": kernel.arch.name, **truth["kernel"]}
    full, small, debug = folder / "full.elf", folder / "vmcore", folder / "vmlinux.debug"
    numbers = check_truth(full, kernel.vmlinux, truth)
    say("shrinking")
    shrunk = shrink(full, kernel.vmlinux, small, system_ram(truth), guest_memory(truth))
    debug_file(kernel.arch, kernel.vmlinux, debug)
    compared = verify(full, small, debug)
    if check_truth(small, debug, truth) != numbers:
        raise LabError("the small dump does not say what the full one does")
    say("packing")
    with made_whole(VMCORES / name) as unfinished:
        unfinished.mkdir(parents=True)
        compress(small, unfinished / "vmcore.xz")
        _add_debug_file(name, debug, unfinished / "vmlinux.debug.xz")
        (unfinished / "truth.json").write_text(dump_truth(truth))
        for file, text in texts.items():
            (unfinished / file).write_text(text)
        (unfinished / "README.md").write_text(_readme(name, kernel, truth, shrunk, compared))
    full.unlink()
    return VMCORES / name


def _readme(
    name: str, kernel: Kernel, truth: dict[str, Any], shrunk: Shrunk, compared: dict[str, Any]
) -> str:
    """Write the sample's README."""
    sample, recipe = find_sample(name), RECIPES[kernel_name(name)]
    version = subprocess.run(
        [tool(kernel.arch.qemu, "qemu-system"), "--version"], stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()[0]
    names = {
        process["pid"]: bytes.fromhex(process["comm_hex"]).decode(errors="replace")
        for process in truth.get("processes", ())
    }
    states = [f"- `{names.get(made['pid'], '?')!r}`: {made['text']}" for made in truth["made"]]
    skipped = [f"- {note['text']}" for note in truth["skipped"]]
    edits = [f"- `{edit.path}`: `{edit.old}` became `{edit.new}`" for edit in recipe.edits]
    return "\n".join(
        [
            f"# {name}",
            "",
            f"Linux {kernel.release} for {kernel.arch.name}, built from Debian's "
            f"`{recipe.source}` ({recipe.suite}), dumped by {version} (TCG) while stopped.",
            f"Made by `scripts/lab sample {name}`; docs/lab.md tells how.",
            "",
            "| file | what it is |",
            "|---|---|",
            "| `vmcore.xz` | the dump: ELF, as QEMU's `dump-guest-memory` writes it, made small |",
            "| `vmlinux.debug.xz` | the kernel's types, variables and symbols (no source lines) |",
            *_readme_truth(truth),
            f"- descriptors with the page-table type: {compared['typed']['heads']}, "
            f"of {compared['typed']['pages']} pages",
            f"- {compared['translations']} translations compared between the full and the small "
            f"dump, {compared['translations_mapped']} of present pages: all the same",
            "",
            "## Guest",
            "",
            f"- command line: `{truth['kernel']['command_line']}`",
            f"- {sample.memory} MiB, `-smp {sample.smp}`, `{' '.join(kernel.arch.machine)}`",
            "",
            "## Workload",
            "",
            "Each state is made by a process of its own (lab/workload/states.h):",
            "",
            *states,
            "",
            "Not made here:",
            "",
            *(skipped or ["- nothing was skipped"]),
            "",
            *shrunk.section(),
            "",
            "## Kernel configuration",
            "",
            "`make tinyconfig`, then these (the whole configuration is in the dump: IKCONFIG):",
            "",
            "```",
            *[line for line in fragment_text(kernel_name(name)).splitlines() if "CONFIG_" in line],
            "```",
            *(["", "Source changes:", "", *edits] if edits else []),
            "",
        ]
    )


def _readme_truth(truth: dict[str, Any]) -> list[str]:
    """Write what truth.json is, and its numbers."""
    if "moment" in truth:
        counted = truth["moment"]["nr_page_table_pages"]
        said = {**counted, "per_cpu_remainder": counted["remainder"]}
        rcu = truth["moment"]["rcu"]
        files = [
            "| `truth.json` | what the full dump shows of frees under way (lab/moment.py), and "
            "what the guest's kernel said before that stays true |",
        ]
        more = [
            f"- tables in batches that wait for RCU: {sum(each['tables'] for each in rcu)}",
        ]
        if "kernel_tables" in truth["moment"]:
            waiting = len(truth["moment"]["kernel_tables"])
            more.append(f"- tables on kernel_pgtable_work.list: {waiting}")
    else:
        said = truth["nr_page_table_pages"]
        files = [
            "| `truth.json` | what the guest's own kernel said in the state that was dumped |",
            "| `*.txt` | the kernel's own dump of its page tables (debugfs) |",
        ]
        count = truth["kpageflags_pgtable"]["count"]
        more = [f"- `/proc/kpageflags` calls {count} pages page tables"]
    return [
        *files,
        "",
        "## Numbers",
        "",
        f"- NR_PAGETABLE {said['exact']} = {said['global']} (global) + "
        f"{said['per_cpu_remainder']} (not yet added by the CPUs)",
        *more,
    ]


def list_samples(names: Iterable[str]) -> list[str]:
    """Tell of samples whether they are there, and how large."""
    lines = []
    for name in names:
        files = sorted((VMCORES / name).glob("*")) if (VMCORES / name).exists() else []
        size = sum(path.stat().st_size for path in files)
        lines.append(f"{name}: " + (f"{size / 1e6:.1f} MB" if files else "not made"))
    return lines


def unpack_sample(name: str, into: Path) -> tuple[Path, Path]:
    """
    Unpack a sample's dump and debug file.

    :return: their paths
    """
    found = []
    for file in ("vmcore", "vmlinux.debug"):
        source, target = VMCORES / name / f"{file}.xz", into / file
        with lzma.open(source) as packed, made_whole(target) as whole, whole.open("wb") as stream:
            shutil.copyfileobj(packed, stream, 1 << 20)
        found.append(target)
    return found[0], found[1]
