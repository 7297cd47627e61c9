# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Some units of a program's debug information, read by drgn."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from drgn import Program

from lab.errors import LabError
from lab.units import Sections, keep_units, names

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")

SOURCES = {
    "one.c": 'struct first { long a; char name[16]; }; struct first one = { 5, "x" };\n',
    "two.c": "struct second { int b; struct second *next; } two; int main() { return two.b; }\n",
}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    for name, text in SOURCES.items():
        (tmp_path / name).write_text(text)
    command = ["gcc", "-g", "-gdwarf-5", "-O0", "-o", "program", *SOURCES]
    subprocess.run(command, cwd=tmp_path, check=True)
    return tmp_path / "program"


def sections(program: Path) -> Sections:
    parts = []
    for part in Sections._fields:
        path, section = program.with_name(part), f".debug_{part}"
        only = [f"--only-section={section}", "--set-section-flags", f"{section}=alloc"]
        subprocess.run(["objcopy", "-O", "binary", *only, program, path], check=True)
        parts.append(path.read_bytes())
    return Sections(*parts)


def test_names(program: Path) -> None:
    found = names(sections(program))
    assert [name for name in found if name in SOURCES] == list(SOURCES)


def test_one_unit_is_kept(program: Path) -> None:
    kept = keep_units(sections(program), ["two.c"])
    assert names(kept) == ["two.c"]
    smaller = program.with_name("smaller")
    changes = []
    for part, data in kept._asdict().items():
        path = program.with_name(part)
        path.write_bytes(data)
        changes += ["--update-section", f".debug_{part}={path}"]
    subprocess.run(["objcopy", *changes, program, smaller], check=True)
    prog = Program()
    prog.extra_module("smaller", create=True).try_file(smaller, force=True)
    assert [member.name for member in prog.type("struct second").members or ()] == ["b", "next"]
    with pytest.raises(LookupError):
        prog.type("struct first")


def test_a_unit_that_is_not_there(program: Path) -> None:
    with pytest.raises(LabError, match=r"no unit three\.c"):
        keep_units(sections(program), ["one.c", "three.c"])
