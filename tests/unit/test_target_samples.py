# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding and unpacking samples."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from ptinspect.errors import ExitStatus, TargetError
from ptinspect.target import samples
from ptinspect.target.samples import open_sample, sample_names


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Samples and cache in a temporary folder; none beside the package."""
    (tmp_path / "samples").mkdir()
    monkeypatch.setenv("PTINSPECT_SAMPLES", str(tmp_path / "samples"))
    monkeypatch.setenv("PTINSPECT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(samples, "__file__", str(tmp_path / "nowhere" / "a" / "b.py"))
    return tmp_path


def make_sample(folder: Path, dump: bytes = b"dump", symbols: bytes = b"symbols") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vmcore.xz").write_bytes(lzma.compress(dump))
    (folder / "vmlinux.debug.xz").write_bytes(lzma.compress(symbols))


def test_by_name(home: Path) -> None:
    make_sample(home / "samples" / "one")
    sample = open_sample("one")
    assert sample.name == "one"
    assert sample.folder == home / "samples" / "one"
    assert sample.core.read_bytes() == b"dump"
    assert sample.symbols.read_bytes() == b"symbols"
    assert (home / "cache" / "samples") in sample.core.parents


def test_by_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sample(home / "elsewhere" / "two")
    monkeypatch.chdir(home / "elsewhere")
    for name in (str(home / "elsewhere" / "two"), "./two", "two", "two/"):
        assert open_sample(name).name == "two"


def test_beside_the_package(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sample(home / "checkout" / "vmcores" / "three")
    module = home / "checkout" / "ptinspect" / "target" / "samples.py"
    monkeypatch.setattr(samples, "__file__", str(module))
    assert sample_names() == ["three"]
    assert open_sample("three").name == "three"


def test_names(home: Path) -> None:
    assert sample_names() == []
    make_sample(home / "samples" / "b")
    make_sample(home / "samples" / "a")
    (home / "samples" / "no-sample").mkdir()
    (home / "samples" / "README.md").write_text("")
    assert sample_names() == ["a", "b"]


def test_unknown(home: Path) -> None:
    with pytest.raises(TargetError, match="no sample named 'x', and no samples at all") as caught:
        open_sample("x")
    assert caught.value.exit_status == ExitStatus.TARGET
    make_sample(home / "samples" / "b")
    make_sample(home / "samples" / "a")
    with pytest.raises(TargetError, match=r"no sample named 'x' \(there are: a, b\)"):
        open_sample("x")


def test_unpacked_once(home: Path) -> None:
    make_sample(home / "samples" / "one")
    first = open_sample("one").core
    inode = first.stat().st_ino
    assert open_sample("one").core.stat().st_ino == inode


def test_another_version_is_unpacked_anew(home: Path) -> None:
    make_sample(home / "samples" / "one")
    old = open_sample("one")
    make_sample(home / "samples" / "one", dump=b"another")
    new = open_sample("one")
    assert new.core.read_bytes() == b"another"
    assert old.core.read_bytes() == b"dump"
    assert new.symbols == old.symbols


@pytest.mark.parametrize("cut", [0, 10, -1])
def test_corrupt(home: Path, cut: int) -> None:
    make_sample(home / "samples" / "one")
    packed = home / "samples" / "one" / "vmcore.xz"
    packed.write_bytes(packed.read_bytes()[:cut])
    with pytest.raises(TargetError, match=r"cannot unpack .*vmcore\.xz"):
        open_sample("one")
    # Neither a half file nor a temporary one is left.
    assert not [path for path in (home / "cache").rglob("*") if path.is_file()]


def test_missing_debug_file(home: Path) -> None:
    make_sample(home / "samples" / "one")
    (home / "samples" / "one" / "vmlinux.debug.xz").unlink()
    with pytest.raises(TargetError, match=r"sample one: vmlinux\.debug\.xz is missing"):
        open_sample("one")


def test_unwritable_cache(home: Path) -> None:
    make_sample(home / "samples" / "one")
    (home / "cache").write_text("a file where the folder should be")
    with pytest.raises(TargetError, match="cannot unpack"):
        open_sample("one")
