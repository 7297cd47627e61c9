# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The oldest and the newest bpftrace that will do parse the golden scripts.

They run here; what a machine that traces has in /sys is made up. Hooks and types are checked where
the kernel runs (test_trace.py).
"""

import json
import subprocess
from pathlib import Path

import pytest

from lab.arches import find_arch
from lab.programs import inside, program_tree
from ptinspect.trace.program import parse_version
from ptinspect.trace.script import MINIMUM_VERSION

SCRIPTS = Path(__file__).parents[1] / "unit" / "trace"
#: The suites with the oldest that will do, and the newest.
SUITES = ("trixie", "forky")
#: Less what 0.23 falls over here: types of the kernel in kprobes, where there is no BTF.
CASES = [
    (suite, path.name)
    for suite in SUITES
    for path in sorted(SCRIPTS.glob("*.bt"))
    if not (suite == "trixie" and path.name.startswith("s390x"))
]


@pytest.fixture(scope="module", params=SUITES)
def bpftrace(request: pytest.FixtureRequest) -> Path:
    without = ("debconf", "perl", "perl-base", "dpkg")
    tree = program_tree(request.param, find_arch("x86_64"), "bpftrace", ("bpftrace",), without)
    functions = set[str]()
    for path in SCRIPTS.glob("*.offers.json"):
        functions.update(json.loads(path.read_text())["traceable"])
    made_up = {
        "kernel/tracing/available_events": "kmem:mm_page_free\n",
        "kernel/tracing/available_filter_functions": "".join(f"{f}\n" for f in sorted(functions)),
        **{f"devices/system/cpu/{name}": "0-1\n" for name in ("possible", "online", "present")},
    }
    for name, text in made_up.items():
        path = tree / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tree


def run(tree: Path, *arguments: str) -> str:
    command = inside(tree, "/usr/bin/bpftrace", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


def parse(tree: Path, text: str) -> str:
    (tree / "tmp" / "script.bt").write_text(text)
    return run(tree, "-d", "ast", "--dry-run", "/tmp/script.bt")


def test_versions(bpftrace: Path) -> None:
    version = parse_version(run(bpftrace, "--version"))
    assert version is not None
    if bpftrace.name.startswith(SUITES[0]):
        assert version == MINIMUM_VERSION
    else:
        assert version > MINIMUM_VERSION


@pytest.mark.parametrize(("bpftrace", "script"), CASES, indirect=["bpftrace"])
def test_parses(bpftrace: Path, script: str) -> None:
    said = parse(bpftrace, (SCRIPTS / script).read_text())
    assert "ERROR: syntax" not in said
    # It came past the grammar: to the tree, or to asking this machine for functions.
    past = ("AST after: ", "BTF data not available", "traceable")
    assert any(sentence in said for sentence in past), said[-500:]


def test_a_mistake_is_noticed(bpftrace: Path) -> None:
    text = (SCRIPTS / "x86_64-6.12-all.bt").read_text()
    assert "ERROR: syntax" in parse(bpftrace, text.replace("delete(@live, ", "delete(@live ", 1))
