# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The source archive and the wheel: complete, and at work in an environment of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from ptinspect import __version__
from ptinspect.target.samples import open_sample

REPOSITORY = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path | None = None, **env: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves things behind where it works."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(
        REPOSITORY / "ptinspect",
        folder / "ptinspect",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run(sys.executable, "-c", code, cwd=folder)
    (archive,) = (folder / "dist").iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(source_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, as whoever downloads that would."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, source_archive)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, and with the suite's own dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    options = ("--no-deps", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Behind the environment's own packages, so that the wheel's ptinspect is the one in use.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder.parent))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_everything_is_packed(source_archive: Path, wheel: Path) -> None:
    ours = files(REPOSITORY / "ptinspect")
    with tarfile.open(source_archive) as archive:
        assert ours <= {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        assert ours == {name for name in names if ".dist-info/" not in name}
        assert any(name.endswith("/LICENSE") for name in names)
    assert wheel.stat().st_size < 1 << 20


def test_installed_program(environment: Path, tmp_path: Path) -> None:
    said = run(environment / "ptinspect", "--version", cwd=tmp_path)
    assert said == f"ptinspect, version {__version__}\n"
    code = "import ptinspect; print(ptinspect.__file__)"
    assert str(environment.parent) in run(environment / "python", "-c", code, cwd=tmp_path)
    samples = {"PTINSPECT_SAMPLES": str(REPOSITORY / "vmcores")}
    summary = run(
        environment / "ptinspect", "--sample", "x86_64-7.3", "summary", cwd=tmp_path, **samples
    )
    assert "Typed pages and NR_PAGETABLE agree to the page." in summary


def test_drgn_finds_the_plugin(environment: Path, tmp_path: Path) -> None:
    sample = open_sample("x86_64-7.3")
    options = ("-c", sample.core, "-s", sample.symbols, "--no-default-symbols")
    code = "from drgn.commands import run_command; run_command(prog, 'ptsummary')"
    said = run(environment / "python", "-m", "drgn", *options, "-e", code, cwd=tmp_path)
    assert "Typed pages and NR_PAGETABLE agree to the page." in said
