# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's view of Debian's archive: versions, indexes, checks."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading

import pytest

from lab import archive
from lab.errors import LabError


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("6.12.94-1", "6.12.107-1"),
        ("7.3.4-1~bpo13+1", "7.3.4-1"),
        ("7.3~rc2-1", "7.3-1"),
        ("6.1.170-3", "6.1.176-1"),
        ("9.9", "1:0.1"),
        ("1.0", "1.0a"),
        ("1.0a", "1.0+b"),
        ("1.0-1", "1.0-1+b3"),
    ],
)
def test_versions_sort_as_dpkg_does(older, newer):
    assert archive.version_key(older) < archive.version_key(newer)
    assert archive.version_key(older) == archive.version_key(older)


def test_release_digests_are_the_sha256_ones():
    text = (
        "Origin: Debian\nMD5Sum:\n aaaa 1 main/binary-amd64/Packages.xz\n"
        "SHA256:\n bbbb 1 main/binary-amd64/Packages.xz\n cccc 2 main/binary-s390x/Packages.xz\n"
        "Other: x\n dddd 3 main/ignored\n"
    )
    assert archive.release_digests(text) == {
        "main/binary-amd64/Packages.xz": "bbbb",
        "main/binary-s390x/Packages.xz": "cccc",
    }


_INDEX = """\
Package: linux-image-6.1.0-9-amd64-dbg
Version: 6.1.9-1
Filename: pool/a_6.1.9-1_amd64.deb
Size: 3
SHA256: 11

Package: linux-image-6.1.0-10-amd64-dbg
Version: 6.1.10-1
Description: text
 more: text
Filename: pool/a_6.1.10-1_amd64.deb
Size: 4
SHA256: 22
"""


def test_packages_are_found_by_their_whole_name():
    names = [package.name for package in archive.stanzas(_INDEX, r"linux-image-.*-dbg")]
    assert names == ["linux-image-6.1.0-9-amd64-dbg", "linux-image-6.1.0-10-amd64-dbg"]
    assert not list(archive.stanzas(_INDEX, "linux-image-6.1.0-10"))
    (package,) = archive.stanzas(_INDEX, r"linux-image-6\.1\.0-10-amd64-dbg")
    assert package == (
        "linux-image-6.1.0-10-amd64-dbg",
        "6.1.10-1",
        "pool/a_6.1.10-1_amd64.deb",
        4,
        "22",
    )


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror over a folder, and an empty cache."""
    (tmp_path / "pool").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PTINSPECT_MIRROR", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("PTINSPECT_CACHE", str(tmp_path / "cache"))
    archive.mirror.cache_clear()
    yield tmp_path
    server.shutdown()
    server.server_close()
    archive.mirror.cache_clear()


def _package(data: bytes, name: str = "x_1_all.deb") -> archive.Package:
    return archive.Package("x", "1", f"pool/{name}", len(data), hashlib.sha256(data).hexdigest())


def test_download_checks_and_keeps(mirror):
    (mirror / "pool" / "x_1_all.deb").write_bytes(b"package")
    path = archive.download(_package(b"package"))
    assert path.read_bytes() == b"package"
    (mirror / "pool" / "x_1_all.deb").unlink()
    assert archive.download(_package(b"package")) == path  # no second download
    archive.forget(_package(b"package"))
    assert not path.exists()


def test_download_starts_again_after_an_unfinished_one(mirror):
    # Python's server knows no ranges: the whole file comes again and has to replace the piece.
    (mirror / "pool" / "x_1_all.deb").write_bytes(b"package")
    begun = mirror / "cache" / "archive" / "pool" / "x_1_all.deb.begun"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"pac")
    assert archive.download(_package(b"package")).read_bytes() == b"package"
    assert not begun.exists()


def test_download_refuses_another_content(mirror):
    (mirror / "pool" / "x_1_all.deb").write_bytes(b"forged!")
    with pytest.raises(LabError, match="SHA256"):
        archive.download(_package(b"package"))
    assert not list((mirror / "cache" / "archive" / "pool").iterdir())


def test_download_says_what_is_missing(mirror):
    with pytest.raises(LabError, match="the mirror has no pool/y"):
        archive.download(_package(b"package", "y_1_all.deb"))


def test_closure(monkeypatch: pytest.MonkeyPatch) -> None:
    def stanza(name: str, depends: str = "", provides: str = "") -> str:
        fields = f"Package: {name}\nVersion: 1\nFilename: pool/{name}.deb\nSize: 1\nSHA256: 00\n"
        return fields + f"Depends: {depends}\nProvides: {provides}\n"

    index = archive.Index.__new__(archive.Index)
    index.suite, index.architecture = "suite", "amd64"
    index._text = "\n".join(
        [
            stanza("program", "library (>= 2), interpreter:any | other, virtual"),
            stanza("library", "program"),
            stanza("interpreter", "documentation"),
            stanza("real", provides="virtual (= 1), more"),
            stanza("other"),
            stanza("documentation", "other"),
        ]
    )
    found = [package.name for package in index.closure(["program"], without=["documentation"])]
    assert found == ["program", "library", "interpreter", "real"]
    with pytest.raises(LabError, match="no package nothing"):
        index.closure(["nothing"])
