# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The script for each kernel, beside golden files.

``trace/*.offers.json`` are what stock Debian kernels offered, recorded in guests. After a change
of the generator write the golden files anew with ``PTINSPECT_WRITE_GOLDEN=1`` and read the
difference.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from ptinspect.cli.main import cli
from ptinspect.errors import TargetError, UsageError
from ptinspect.trace.hooks import choose_hooks
from ptinspect.trace.offers import KernelOffers, offers_from_json
from ptinspect.trace.script import ScriptOptions, write_script

FOLDER = Path(__file__).parent / "trace"
KERNELS = ("x86_64-6.1", "x86_64-6.12", "x86_64-7.2", "s390x-6.12")
PLAIN = ScriptOptions()
ALL = ScriptOptions(pid=4242, comm="worker", cgroup=77, stacks=True, tables=True, events=True)


def offers(kernel: str) -> KernelOffers:
    return offers_from_json((FOLDER / f"{kernel}.offers.json").read_text())


def script(kernel: str, options: ScriptOptions = PLAIN) -> str:
    offered = offers(kernel)
    return write_script(offered, choose_hooks(offered), options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("suffix", "options"), [("", PLAIN), ("-all", ALL)])
def test_golden(kernel: str, suffix: str, options: ScriptOptions) -> None:
    path = FOLDER / f"{kernel}{suffix}.bt"
    written = script(kernel, options)
    if os.environ.get("PTINSPECT_WRITE_GOLDEN"):
        path.write_text(written)
    assert written == path.read_text()


@pytest.mark.parametrize("kernel", KERNELS)
def test_hooks_only_what_the_kernel_offers(kernel: str) -> None:
    offered = offers(kernel)
    hooked = {
        line.split(" ")[0].rsplit(":", 1)[1]
        for line in script(kernel, ALL).splitlines()
        if line.startswith(("fentry:", "fexit:", "kprobe:", "kretprobe:"))
    }
    assert hooked
    assert hooked <= set(offered.traceable)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [ScriptOptions(), ALL, ScriptOptions(counts_only=True)])
def test_a_counter_is_written_by_one_program(kernel: str, options: ScriptOptions) -> None:
    writers: dict[str, set[str]] = {}
    program = ""
    for line in script(kernel, options).splitlines():
        if line and line[0].isalpha():
            program = line
        if "= count();" in line or "= sum(" in line or "= hist(" in line:
            name = line.split("@", 1)[1] if "lost_releases" not in line else "lost_releases ="
            writers.setdefault(name.split("[")[0].split(" ")[0], set()).add(program)
    assert writers
    assert {name: len(programs) for name, programs in writers.items()} == dict.fromkeys(writers, 1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [PLAIN, ALL, ScriptOptions(counts_only=True, stacks=True)])
def test_a_variable_is_set_in_the_program_that_reads_it(
    kernel: str, options: ScriptOptions
) -> None:
    known: set[str] = set()
    for line in script(kernel, options).splitlines():
        if line and line[0].isalpha():
            known = set()
        assigned = re.match(r" *(\$\w+) = ", line)
        read = line.split(" = ", 1)[1] if assigned else line
        assert set(re.findall(r"\$\w+", read)) <= known, line
        if assigned:
            known.add(assigned[1])


def test_newest_hook_first() -> None:
    assert choose_hooks(offers("x86_64-6.1")).stat.function == "__mod_lruvec_page_state"
    assert choose_hooks(offers("x86_64-6.12")).stat.function == "__lruvec_stat_mod_folio"
    newest = offers("x86_64-7.2")
    assert choose_hooks(newest).stat.function == "lruvec_stat_mod_folio"
    both = replace(
        newest,
        traceable={**newest.traceable, "__lruvec_stat_mod_folio": ("folio", "idx", "val")},
    )
    assert choose_hooks(both).stat.function == "lruvec_stat_mod_folio"


def test_parameters_have_the_kernels_names() -> None:
    assert "(uint64)args.page" in script("x86_64-6.1")
    assert "(uint64)args.folio" in script("x86_64-6.12")


def test_kprobes_without_a_bpf_compiler() -> None:
    text = script("s390x-6.12", ALL)
    assert "fentry" not in text.replace("fentry and fexit need", "")
    assert "args." not in text
    assert "kretprobe:__pmd_alloc" in text
    forced = offers("x86_64-6.12")
    hooks = choose_hooks(forced, kprobes=True)
    assert "fentry:" not in write_script(forced, hooks, ALL)


def test_what_is_not_there_is_said() -> None:
    offered = offers("x86_64-6.12")
    less = {name: p for name, p in offered.traceable.items() if name != "tlb_remove_table"}
    hidden = replace(offered, traceable=less, hidden=("tlb_remove_table",))
    sentence = "tables freed through RCU are not told apart: tlb_remove_table cannot be traced"
    hooks = choose_hooks(hidden)
    assert sentence in hooks.missing
    assert sentence in write_script(hidden, hooks, ScriptOptions())
    assert "no tlb_remove_table" in " ".join(choose_hooks(replace(offered, traceable=less)).missing)
    silent = choose_hooks(replace(offered, tracepoints=()))
    assert any("kmem:mm_page_free" in sentence for sentence in silent.missing)
    assert "rawtracepoint" not in write_script(offered, silent, ALL)


def test_refuses_a_kernel_without_the_hook_that_counts() -> None:
    offered = offers("x86_64-6.12")
    less = {n: p for n, p in offered.traceable.items() if "lruvec" not in n}
    with pytest.raises(TargetError, match="__mod_lruvec_page_state"):
        choose_hooks(replace(offered, traceable=less))
    with pytest.raises(TargetError, match="NR_PAGETABLE"):
        choose_hooks(replace(offered, enumerators={}))


@pytest.mark.parametrize("comm", ["", "a" * 16, 'a"b', "a\\b", "a\nb"])
def test_refuses_names_that_a_script_cannot_say(comm: str) -> None:
    with pytest.raises(UsageError):
        script("x86_64-6.12", ScriptOptions(comm=comm))


def test_offers_survive_json() -> None:
    offered = offers("s390x-6.12")
    assert offers_from_json(offered.to_json()) == offered
    for text in ("", "{}", "[]", '{"schema": "other"}'):
        with pytest.raises(UsageError):
            offers_from_json(text)


def test_command_prints_the_script_of_recorded_offers() -> None:
    path = FOLDER / "x86_64-6.12.offers.json"
    done = CliRunner().invoke(cli, ["trace", "--print-script", "--offers", str(path)])
    assert done.exit_code == 0
    assert done.output == (FOLDER / "x86_64-6.12.bt").read_text()
