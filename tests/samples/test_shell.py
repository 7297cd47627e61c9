# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""ptinspect in drgn's shell: the %pt commands, the Python that --drgn prints, the shell itself."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import answerable, answering_commands
from drgn.commands import CommandArgumentError, CommandError, run_command
from opened import Sample
from terminal import on_terminal

import ptinspect.drgn_plugin
from ptinspect.cli.main import cli, run
from ptinspect.cli.snippets import SNIPPETS
from ptinspect.target.samples import open_sample

assert ptinspect.drgn_plugin.PREFIX == "pt"


def in_shell(sample: Sample, line: str) -> str:
    """What a % command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_command(sample.prog, line) is None
    return out.getvalue()


def tables_of(text: str) -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(text)["tables"]
    return tables


@pytest.mark.parametrize("name", answering_commands())
def test_every_command_answers_as_on_the_command_line(
    name: str, sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*answerable(name, sample), "--format", "json"]
    here = in_shell(sample, " ".join([f"pt{name}", *arguments]))
    run(["--sample", sample.name, name, *arguments])
    assert tables_of(here) == tables_of(capsys.readouterr().out)


@pytest.mark.parametrize("name", answering_commands())
def test_help_is_written_for_this_shell(name: str, sample: Sample) -> None:
    text = in_shell(sample, f"pt{name} --help")
    assert text.startswith(f"Usage: %pt{name} ")
    assert "--sample" not in text
    assert "--core" not in text
    assert f"ptinspect {name}" not in text
    assert ("--drgn" in text) is (name in SNIPPETS)


def test_target_options_are_refused(sample: Sample) -> None:
    with pytest.raises(CommandArgumentError, match=r"%ptsummary: No such option '--sample'"):
        run_command(sample.prog, "ptsummary --sample x")
    with pytest.raises(CommandArgumentError, match=r"%ptwalk: Missing argument 'SPACE'"):
        run_command(sample.prog, "ptwalk")


def test_errors_are_one_line(sample: Sample) -> None:
    with pytest.raises(CommandError, match=r"^'zork' is no address space; SPACE is") as caught:
        run_command(sample.prog, "ptmap zork")
    assert "\n" not in str(caught.value)
    with pytest.raises(CommandError, match="'zork' is no address space"):
        run_command(sample.prog, "ptmap zork --drgn")


def test_redirection_and_pipes(sample: Sample, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_command(sample.prog, f"ptlist --format csv --limit 2 > {out}")
    assert len(out.read_text().splitlines()) == 3
    run_command(sample.prog, f"ptlist --format csv | sort -r | head -n 1 > {out}")
    assert out.read_text().startswith("pfn,")


# What --drgn prints


def run_code(sample: Sample, line: str) -> tuple[dict[str, Any], str]:
    """Run what a command prints for --drgn; its names and its output are returned."""
    names: dict[str, Any] = {"prog": sample.prog}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(in_shell(sample, f"{line} --drgn"), names)
    return names, out.getvalue()


@pytest.mark.parametrize("name", sorted(SNIPPETS))
def test_code_runs(name: str, sample: Sample) -> None:
    assert name in cli.commands
    _, printed = run_code(sample, " ".join([f"pt{name}", *answerable(name, sample)]))
    assert printed


def test_code_of_summary(sample: Sample) -> None:
    names, _ = run_code(sample, "ptsummary")
    seen = tables_of(in_shell(sample, "ptsummary --format json"))
    assert names["summary"].difference == seen["accounting"]["difference"]
    assert names["summary"].counted_pages == seen["accounting"]["typed_pages_as_counted"]


def test_code_of_walk(sample: Sample) -> None:
    for space in ("1", "kernel", f"mm:{mm_of_init(sample):x}"):
        address = "400000" if space != "kernel" else "init_task"
        names, _ = run_code(sample, f"ptwalk {space} {address}")
        seen = tables_of(in_shell(sample, f"ptwalk {space} {address} --format json"))
        found = names["found"]
        assert [hex(step.table) for step in found.steps] == [s["table"] for s in seen["steps"]]
        physical = seen["result"]["physical"]
        assert found.physical == (int(physical, 16) if physical is not None else None)


def mm_of_init(sample: Sample) -> int:
    names, _ = run_code(sample, "ptmap 1")
    return int(names["space"].mm.address)


def test_code_of_map(sample: Sample) -> None:
    _, printed = run_code(sample, "ptmap 1")
    seen = tables_of(in_shell(sample, "ptmap 1 --format json"))
    assert [line.split()[0] for line in printed.splitlines()] == [
        row["start"] for row in seen["ranges"]
    ]


def test_code_of_owner(sample: Sample) -> None:
    address = answerable("owner", sample)[0]
    _, printed = run_code(sample, f"ptowner {address}")
    seen = tables_of(in_shell(sample, f"ptowner {address} --format json"))["owners"]
    assert len(printed.splitlines()) == len(seen)


def test_code_of_ps(sample: Sample) -> None:
    names, _ = run_code(sample, "ptps")
    seen = tables_of(in_shell(sample, "ptps --format json"))["spaces"]
    sizes = dict(zip((s.name for s in names["spaces"]), names["usage"].table_bytes.tolist()))
    assert {row["space"]: row["table_KiB"] for row in seen} == {
        name: size // 1024 for name, size in sizes.items()
    }


def test_code_of_show(sample: Sample) -> None:
    address = answerable("show", sample)[0]
    names, _ = run_code(sample, f"ptshow {address}")
    seen = tables_of(in_shell(sample, f"ptshow {address} --format json"))
    assert hex(names["descriptor"].ptdesc) == seen["descriptor"]["ptdesc"]
    assert [f.name for f in names["descriptor"].fields] == [m["member"] for m in seen["members"]]


@pytest.mark.parametrize(
    "line",
    [
        "ptlist --where refcount!=0 --sort -pfn --limit 3",
        "ptlist --no-walk --columns pfn,flags --limit 5",
        "ptlist --space 1 --level PTE",
        "ptlist --orphan",
        "ptlist --node 0 --order 0",
    ],
)
def test_code_of_list(line: str, sample: Sample) -> None:
    names, _ = run_code(sample, line)
    seen = tables_of(in_shell(sample, f"{line} --format json"))["descriptors"]
    pfns = names["listing"].column("pfn").values[names["rows"]]
    assert [hex(pfn) for pfn in pfns.tolist()] == [row["pfn"] for row in seen]


def test_code_of_check(sample: Sample) -> None:
    for line in ("ptcheck --only structure", "ptcheck --skip structure --skip desc-refcount-one"):
        names, _ = run_code(sample, line)
        seen = tables_of(in_shell(sample, f"{line} --format json"))["invariants"]
        ours = {r.invariant.id: (r.verdict.value, r.examined) for r in names["results"].results}
        assert {row["invariant"]: (row["verdict"], row["examined"]) for row in seen} == ours


def test_code_of_pending(moving: Sample) -> None:
    names, printed = run_code(moving, "ptpending --tables")
    seen = tables_of(in_shell(moving, "ptpending --tables --format json"))
    assert len(names["pending"].pfns) == seen["total"]["tables"] == len(seen["tables"]) > 0
    rows = [(row["physical"], row["freed_by"]) for row in seen["tables"]]
    assert printed.splitlines()[-len(rows) :] == [" ".join(row) for row in rows]


def test_code_of_gmap(sample: Sample) -> None:
    names, printed = run_code(sample, "ptgmap")
    gmaps = names["story"].gmaps.gmaps
    seen = tables_of(in_shell(sample, "ptgmap --format json"))
    assert len(gmaps) == len(seen.get("gmaps", []))
    assert (names["story"].gmaps.absent or "") == printed.splitlines()[0]
    names, _ = run_code(sample, "ptgmap --asce")
    asces = tables_of(in_shell(sample, "ptgmap --asce --format json")).get("asces", [])
    found = names["stories"].asces.asces
    assert [hex(asce.value) for asce in found] == [row["asce"] for row in asces]
    for gmap in gmaps:
        code_of_one_gmap(sample, gmap.name)


def code_of_one_gmap(sample: Sample, name: str) -> None:
    names, _ = run_code(sample, f"ptgmap {name} --pgste")
    seen = tables_of(in_shell(sample, f"ptgmap {name} --pgste --format json"))
    assert sorted(names["tables"].address[names["rows"]].tolist()) == sorted(
        int(row["table"], 16) for row in seen["tables"]
    )
    assert [pgste.guest for pgste in names["pgstes"]] == [
        int(row["guest"], 16) for row in seen["pgstes"]
    ]
    guest = seen["pgstes"][0]["guest"]
    names, _ = run_code(sample, f"ptgmap {name} {guest} --pgste")
    seen = tables_of(in_shell(sample, f"ptgmap {name} {guest} --pgste --format json"))
    steps = [row["table"] for row in seen["steps"] if row["side"] == "guest"]
    assert [hex(step.table) for step in names["guest"].steps] == steps
    host = seen["result"]["host"]
    assert names["host"] == (None if host is None else int(host, 16))
    physical = names["guest"].physical
    walked, _ = run_code(sample, f"ptwalk {name} {guest}")
    assert walked["found"].physical == physical
    assert run_code(sample, f"ptmap {name}")[0]["space"].root == names["gmap"].space.root
    asce = f"asce:{names['gmap'].asce:#x}"
    assert [
        step.table for step in run_code(sample, f"ptwalk {asce} {guest}")[0]["found"].steps
    ] == [step.table for step in walked["found"].steps]


def test_code_is_only_printed_for_what_can_be_asked(sample: Sample) -> None:
    for line in ("ptgmap --pgste --drgn", "ptgmap 1 --asce --drgn", "ptgmap 1 zork --drgn"):
        with pytest.raises(CommandError):
            run_command(sample.prog, line)


def test_every_command_has_code() -> None:
    assert sorted(SNIPPETS) == sorted(answering_commands())


# The shells


def test_as_a_plugin_of_drgn() -> None:
    """drgn opens the dump itself, and finds the commands through its plugins."""
    sample = open_sample("x86_64-7.3")
    code = "from drgn.commands import run_command; run_command(prog, 'ptsummary --format json')"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "drgn", "-c", str(sample.core), "-s", str(sample.symbols)),
            *("--no-default-symbols", "-e", code),
        ],
        env={**os.environ, "DRGN_PLUGINS": "ptinspect=ptinspect.drgn_plugin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["target"] == str(sample.core)
    assert answer["tables"]["accounting"]["difference"] == 0


def shell(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ptinspect", "shell", "--sample", "x86_64-7.3", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_shell_runs_scripts(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "print(sys.argv[1:], len(scan_memmap(prog).pfns), find_task(1).comm.string_())\n"
    )
    done = shell(str(script), "--for", "the script")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['--for', 'the script'] 400 b'init'\n"
    assert shell(text="print(summarise(prog, scan_memmap(prog)).difference)").stdout == "0\n"


def test_shell_shows_where_a_script_fails(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("prog['no_such_variable']\n")
    done = shell(str(script))
    assert done.returncode == 1
    assert f'"{script}", line 1' in done.stderr
    missing = shell(str(tmp_path / "none.py"))
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)


def test_shell_on_a_terminal(tmp_path: Path) -> None:
    status, seen = on_terminal(
        *("shell", "--sample", "x86_64-7.3"),
        typed=b"%ptwalk 1 400000\nptdesc_is_native(prog)\n%ptwalk zork 0\nexit()\n",
        XDG_STATE_HOME=str(tmp_path),
        PAGER="cat",
    )
    assert status == 0
    assert "from ptinspect import *" in seen
    assert re.search(r"physical +0x7c1f000", seen)
    assert "True" in seen
    assert "drgn: error: 'zork' is no address space" in seen
