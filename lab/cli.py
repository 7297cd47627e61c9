# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's command line: one command a step."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from pathlib import Path

import click

from lab import samples
from lab.arches import find_arch
from lab.crashed import CRASHED, make_crashed_sample
from lab.errors import LabError
from lab.guest import Guest
from lab.initramfs import build_workload, workload_initramfs
from lab.kernels import RECIPES, Kernel, build_kernel, debian_kernel, debian_modules
from lab.live import crash, look_inside
from lab.matrix import KINDS, run_matrix, write_document
from lab.run import say
from lab.shrink import shrink, verify
from lab.silence import LOAD_MODULES, silence
from lab.trace import MODES, run_loads, run_session, trace_lines
from lab.truth import parse_report

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW = click.Path(dir_okay=False, path_type=Path)


@click.group()
def commands() -> None:
    """Kernels, guests, dumps and samples. Every step can be repeated; see docs/lab.md."""


def _show(kernel: Kernel) -> None:
    click.echo(f"release {kernel.release}")
    click.echo(f"image   {kernel.image}")
    click.echo(f"vmlinux {kernel.vmlinux}")
    for module in kernel.modules:
        click.echo(f"module  {module}")


@commands.command()
@click.argument("suite")
@click.argument("arch")
@click.argument("series")
@click.option("--flavour", help="What Debian appends to the release, if not the plain kernel's.")
def fetch(suite: str, arch: str, series: str, flavour: str | None) -> None:
    """Get Debian's kernel of a SERIES (6.12) with its debug file from a SUITE (trixie)."""
    _show(debian_kernel(suite, arch, series, flavour))


@commands.command()
@click.argument("name", type=click.Choice(list(RECIPES)))
@click.option("-j", "--jobs", type=int, help="Compilers at once; by default one a CPU.")
def build(name: str, jobs: int | None) -> None:
    """Build a small kernel with DWARF."""
    _show(build_kernel(name, jobs))


@commands.command()
@click.argument("arch")
def workload(arch: str) -> None:
    """Compile the workload and pack it as an initramfs."""
    machine = find_arch(arch)
    click.echo(build_workload(machine))
    click.echo(workload_initramfs(machine))


def _kernel(words: tuple[str, ...], flavour: str | None = None) -> Kernel:
    """One word names a small kernel, three a Debian one."""
    if len(words) == 1:
        return build_kernel(words[0])
    if len(words) == 3:
        return debian_kernel(*words, flavour)
    raise click.UsageError("KERNEL is the NAME of a small kernel, or SUITE ARCH SERIES")


@commands.command()
@click.argument("kernel", nargs=-1, required=True)
@click.option("--memory", default=1024, help="MiB.", show_default=True)
@click.option("--smp", default="2", show_default=True)
@click.option("--append", default="", help="More words for the kernel command line.")
@click.option("--dump", type=_NEW, help="Stop the guest after its report and dump it to this file.")
@click.option("--form", default="elf", help="The dump's format, as QEMU names it.")
@click.option("--truth", type=_NEW, help="Write the report to this file, as JSON.")
@click.option("--keep/--no-keep", help="Leave the guest running until Ctrl-C.")
@click.option("--timeout", default=300, show_default=True, help="Seconds until the report.")
def boot(
    kernel: tuple[str, ...],
    memory: int,
    smp: str,
    append: str,
    dump: Path | None,
    form: str,
    truth: Path | None,
    keep: bool,
    timeout: int,
) -> None:
    """Boot a KERNEL with the workload and wait for its report."""
    booted = _kernel(kernel)
    initrd = workload_initramfs(booted.arch, booted.modules)
    with Guest(booted.arch, booted.image, initrd, memory=memory, smp=smp, append=append) as guest:
        guest.wait_for("@@ready", timeout=timeout)
        document, _ = parse_report(guest.console())
        counted = document["nr_page_table_pages"]
        click.echo(f"nr_page_table_pages {counted['exact']} ({counted['global']} global)")
        if truth:
            truth.write_text(samples.dump_truth(document))
        if dump:
            guest.stop()
            guest.dump(dump, form)
            guest.cont()
        if keep:
            click.echo(f"vmlinux {booted.vmlinux}")
            click.echo(f"QMP socket {guest.qmp_socket}")
            say("the guest runs until Ctrl-C")
            with suppress(KeyboardInterrupt):
                signal.pause()


@commands.command("silence")
@click.argument("kernel", nargs=-1, required=True)
@click.option("--rounds", default=20, show_default=True, help="Runs of each way.")
@click.option("--seconds", default=3600.0, show_default=True, help="When to end at the latest.")
@click.option("--append", default="", help="More words for the kernel command line.")
@click.option("--flavour", help="What Debian appends to the release, if not the plain kernel's.")
@click.option("--seed", default=1, show_default=True, help="Another seed, another load.")
@click.option("--record", type=_NEW, required=True, help="Gets a line of JSON for each run.")
def silence_command(
    kernel: tuple[str, ...],
    rounds: int,
    seconds: float,
    append: str,
    flavour: str | None,
    seed: int,
    record: Path,
) -> None:
    """Run ptinspect check on a KERNEL under load, again and again, live and paused in turn."""
    chosen = _kernel(kernel, flavour)
    modules = debian_modules(kernel[0], chosen, LOAD_MODULES) if len(kernel) == 3 else ()
    bad = number = 0
    runs = silence(chosen, rounds, seconds, record, seed=seed, modules=modules, append=append)
    for run in runs:
        number += 1
        bad += bool(run.findings)
        for finding in run.findings:
            say(f"{run.way} run {number}: {finding}")
    click.echo(f"{chosen.release} {chosen.arch.name}: {number} runs, {bad} with findings")


@commands.command("shrink")
@click.argument("full", type=_FILE)
@click.argument("vmlinux", type=_FILE)
@click.argument("small", type=_NEW)
@click.option("--truth", type=_FILE, help="The report, which knows what is System RAM.")
def shrink_command(full: Path, vmlinux: Path, small: Path, truth: Path | None) -> None:
    """Make a small dump of a FULL one, and check that it says the same."""
    ram = samples.system_ram(json.loads(truth.read_text())) if truth else None
    shrunk = shrink(full, vmlinux, small, ram)
    click.echo(f"kept {shrunk.kept} pages, {shrunk.zero} of them all zero")
    for why, count in shrunk.left_out.items():
        click.echo(f"left out {count} pages: {why}")
    verify(full, small, vmlinux)


@commands.command()
@click.argument("name", type=click.Choice([*samples.SAMPLES, *CRASHED]))
def sample(name: str) -> None:
    """Make a sample: build, boot, report, dump, shrink, check, package."""
    click.echo(make_crashed_sample(name) if name in CRASHED else samples.make_sample(name))


@commands.command()
@click.argument("suite")
@click.argument("arch")
@click.argument("series")
@click.argument("question", nargs=-1)
@click.option("--flavour", help="What Debian appends to the release, if not the plain kernel's.")
@click.option("--memory", default=1536, help="MiB.", show_default=True)
def live(
    suite: str,
    arch: str,
    series: str,
    question: tuple[str, ...],
    flavour: str | None,
    memory: int,
) -> None:
    """
    Boot a Debian kernel whose system has drgn and ptinspect, and look through its /proc/kcore.

    Each QUESTION is one command of ptinspect, in quotes, with its options; by default `summary`.
    Those that start with % go to one session of drgn's shell, which loads vmlinux but once.
    `{sparse.pid}` is a process that rests in the guest.
    """
    lines = question or ("summary",)
    asked = [
        ("python3", "-m", "ptinspect", *line.split()) for line in lines if not line.startswith("%")
    ]
    shell = [line[1:] for line in lines if line.startswith("%")]
    if shell:
        asked.append(("drgn", *shell))
    kernel = debian_kernel(suite, arch, series, flavour)
    answers = look_inside(suite, kernel, asked, memory=memory)
    for told, (out, err) in zip(answers.document["answers"], answers.outputs):
        click.echo(f"$ {' '.join(told['arguments'])}")
        click.echo(out + err)
        click.echo(
            f"# status {told['status']}, {told['seconds']} s, {told['max_rss_kb'] // 1024} MiB; "
            f"nr_page_table_pages {told['before']['nr_page_table_pages']} before, "
            f"{told['after']['nr_page_table_pages']} after\n"
        )


@commands.command("crash")
@click.argument("suite")
@click.argument("arch")
@click.argument("series")
@click.argument("folder", type=click.Path(file_okay=False, exists=True, path_type=Path))
@click.option("--level", default=31, show_default=True, help="makedumpfile's -d.")
def crash_command(suite: str, arch: str, series: str, folder: Path, level: int) -> None:
    """Crash a Debian kernel, and put the dump that its kdump takes into FOLDER."""
    kernel = debian_kernel(suite, arch, series)
    crash(suite, kernel, {"vmcore": ["-l", "-d", str(level)]}, folder)
    click.echo(f"vmcore  {folder / 'vmcore'}")
    click.echo(f"vmlinux {kernel.vmlinux}")


@commands.command("trace")
@click.argument("suite")
@click.argument("arch")
@click.argument("series")
@click.option("--tables", default=100_000, show_default=True, help="PTE tables of the large load.")
@click.option("--debug", is_flag=True, help="Take a census too: the guest gets the debug file.")
@click.option("--costs", is_flag=True, help="Instead: filters, the live view, and what it costs.")
@click.option("--record", type=_NEW, required=True, help="Gets all that was said, as JSON.")
def trace_command(
    suite: str, arch: str, series: str, tables: int, debug: bool, costs: bool, record: Path
) -> None:
    """Trace loads in a Debian kernel, beside what the kernel says of them itself."""
    kernel = debian_kernel(suite, arch, series)
    if costs:
        said = run_session(kernel, MODES, [])
    else:
        options = ["--census", "--events"] if debug else []
        said = run_loads(suite, kernel, tables, debug=debug, options=options)
    record.write_text(json.dumps(said, indent=1))
    for line in trace_lines(said):
        click.echo(line)


@commands.command()
@click.argument("words", nargs=-1, metavar="[WORD]...")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="Only these.")
@click.option("--again", is_flag=True, help="Also what was tried before.")
@click.option("--write-only", is_flag=True, help="Only write docs/matrix.md from what is known.")
def matrix(words: tuple[str, ...], kinds: tuple[str, ...], again: bool, write_only: bool) -> None:
    """
    Try every kernel with every kind of target, and write docs/matrix.md.

    Takes hours; can be interrupted, and goes on where it was. WORDs choose rows (`s390x 6.12`).
    """
    if not write_only:
        run_matrix(words, kinds, again)
    write_document()


@commands.command("list")
def list_command() -> None:
    """List the samples and whether they are there."""
    for line in samples.list_samples([*samples.SAMPLES, *CRASHED]):
        click.echo(line)


def main() -> None:
    """Run a command; a step that cannot do its work says why and ends with status 1."""
    try:
        commands()
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        sys.exit(1)
