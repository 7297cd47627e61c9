# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Debian's archive, for any suite and architecture, without touching the machine's own apt set-up.

The mirror is the one that apt uses here, or ``$PTINSPECT_MIRROR``. A suite's InRelease is checked
with the archive's keys where gpgv and they are installed; it names the SHA256 of the package index,
and that names the SHA256 of each package.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.client
import lzma
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lab.errors import LabError
from lab.run import cache, made_whole, run, say, tool

KEYRINGS = Path("/usr/share/keyrings")

#: An index is asked for again after this many seconds.
_INDEX_AGE = 3600


class ArchiveUnreachableError(LabError):
    """The mirror did not answer."""


class ArchiveUnsettledError(ArchiveUnreachableError):
    """The mirror's files do not fit together: it is being updated, or a cache before it is old."""


class Package(NamedTuple):
    """A binary package of one suite."""

    name: str
    version: str
    filename: str  #: below the mirror's root
    size: int
    sha256: str


@functools.cache
def mirror() -> str:
    """
    Get the mirror's root, without a slash at its end.

    :raises LabError: if neither apt nor the environment names one
    """
    said = os.environ.get("PTINSPECT_MIRROR")
    if said:
        return said.rstrip("/")
    if shutil.which("apt-get"):
        lines = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(SITE) $(ORIGIN) $(RELEASE) $(LABEL)"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ).stdout.splitlines()
        # The security archive is one of its own: it lacks the other suites.
        for line in lines:
            site, origin, *_, label = line.split()
            if origin == label == "Debian":
                return site.rstrip("/")
    raise LabError("apt knows no Debian mirror; name one in PTINSPECT_MIRROR")


def _fetch(path: str, attempts: int = 3) -> bytes:
    """Get a small file of the mirror."""
    for attempt in range(attempts):
        try:
            with urllib.request.urlopen(f"{mirror()}/{path}", timeout=60) as answer:
                data: bytes = answer.read()
                return data
        except urllib.error.HTTPError as error:
            raise LabError(f"the mirror has no {path}: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            if attempt == attempts - 1:
                raise ArchiveUnreachableError(f"the mirror did not give {path}: {error}") from error
            time.sleep(2**attempt)
    raise AssertionError


def _check_signature(release: Path) -> None:
    """Check a suite's InRelease with the archive's keys; say so when that cannot be done."""
    keyrings = sorted(KEYRINGS.glob("debian-archive-*.gpg"))
    if not shutil.which("gpgv") or not keyrings:
        say("signatures are not checked: gpgv or debian-archive-keyring is not installed")
        return
    options = [word for keyring in keyrings for word in ("--keyring", str(keyring))]
    done = subprocess.run(
        ["gpgv", "--status-fd", "1", *options, str(release)],
        capture_output=True,
        text=True,
    )
    # A suite is signed by several keys, some newer than the machine's keyring: one is enough.
    if "[GNUPG:] GOODSIG" in done.stdout and "[GNUPG:] BADSIG" not in done.stdout:
        return
    if "[GNUPG:] BADSIG" in done.stdout:
        raise LabError(f"{release.name} has a bad signature:\n{done.stderr.strip()}")
    say(f"the signature of {release.parent.name} is by keys that this machine does not have")


def _release(suite: str) -> Path:
    """Get a suite's InRelease file, checked."""
    path = cache("archive", suite) / "InRelease"
    if not path.exists() or time.time() - path.stat().st_mtime > _INDEX_AGE:
        with made_whole(path) as unfinished:
            unfinished.write_bytes(_fetch(f"dists/{suite}/InRelease"))
            _check_signature(unfinished)
    return path


def release_digests(text: str) -> dict[str, str]:
    """Get the SHA256 of each index that an InRelease file names."""
    digests: dict[str, str] = {}
    inside = False
    for line in text.splitlines():
        if line.startswith(" "):
            if inside:
                digest, _, name = line.split()
                digests[name] = digest
        else:
            inside = line.startswith("SHA256:")
    return digests


def version_key(version: str) -> list[object]:
    """
    Get a key that sorts versions as dpkg does (Debian policy, 5.6.12).

    Digits compare as numbers; of the rest ``~`` comes before the end, letters before other signs.
    """
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "0", version
    upstream, _, revision = rest.rpartition("-") if "-" in rest else (rest, "", "0")

    def part_key(part: str) -> list[object]:
        key: list[object] = []
        for text, digits in re.findall(r"([^0-9]*)([0-9]*)", part):
            signs = [-1 if c == "~" else ord(c) if c.isalpha() else ord(c) + 256 for c in text]
            key.append([*signs, 0])
            key.append(int(digits or 0))
        return key

    return [int(epoch), part_key(upstream), part_key(revision)]


class Index:
    """The packages of one suite and architecture."""

    def __init__(self, suite: str, architecture: str) -> None:
        self.suite, self.architecture = suite, architecture
        name = f"main/binary-{architecture}/Packages.xz"
        release = _release(suite)
        digests = release_digests(release.read_text(errors="replace"))
        if name not in digests:
            raise LabError(f"{suite} has no packages for {architecture}")
        path = release.parent / f"Packages-{architecture}.xz"
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digests[name]:
            say(f"reading the index of {suite} for {architecture}")
            data = self._fetch(name, digests[name])
            with made_whole(path) as unfinished:
                unfinished.write_bytes(data)
        self._text = lzma.decompress(path.read_bytes()).decode()

    def _fetch(self, name: str, digest: str) -> bytes:
        """Get an index: by its digest, which is always the right one, else by its name."""
        folder = name.rsplit("/", 1)[0]
        try:
            data = _fetch(f"dists/{self.suite}/{folder}/by-hash/SHA256/{digest}")
        except ArchiveUnreachableError:
            raise
        except LabError:
            data = _fetch(f"dists/{self.suite}/{name}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise ArchiveUnsettledError(
                f"the mirror's {self.suite} {name} is not the one that its InRelease names: "
                "try again later"
            )
        return data

    def find(self, pattern: str) -> Package:
        """
        Find the newest package whose whole name matches a regular expression.

        With several names the newest version of all of them is taken.

        :raises LabError: if there is none
        """
        found = list(stanzas(self._text, pattern))
        if not found:
            raise LabError(f"{self.suite} has no package {pattern} for {self.architecture}")
        return max(found, key=lambda package: version_key(package.version))

    def closure(self, names: Iterable[str], without: Iterable[str] = ()) -> list[Package]:
        """
        Find packages and all that they depend on.

        Of alternatives the first is taken; versions are those of the suite.

        :param without: names of packages that are left out, with what only they need
        :raises LabError: if one of *names* does not exist
        """
        known: dict[str, dict[str, str]] = {}
        provided: dict[str, str] = {}
        for text in self._text.split("\n\n"):
            fields = _fields(text)
            name = fields.get("Package", "")
            known[name] = fields
            for other in fields.get("Provides", "").split(","):
                provided.setdefault(re.split(r"[ (:]", other.strip())[0], name)
        found: dict[str, Package] = {}
        wanted = list(names)
        for name in wanted:
            if name not in known:
                raise LabError(f"{self.suite} has no package {name} for {self.architecture}")
        left_out = set(without)
        while wanted:
            name = wanted.pop(0)
            name = name if name in known else provided.get(name, "")
            if not name or name in found or name in left_out:
                continue
            fields = known[name]
            found[name] = _package(fields)
            for role in ("Pre-Depends", "Depends"):
                for need in fields.get(role, "").split(","):
                    wanted.append(re.split(r"[ (:|]", need.strip())[0])
        return list(found.values())


def _fields(stanza: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line)


def _package(fields: dict[str, str]) -> Package:
    return Package(
        fields["Package"],
        fields["Version"],
        fields["Filename"],
        int(fields["Size"]),
        fields["SHA256"],
    )


def stanzas(text: str, pattern: str) -> Iterable[Package]:
    """Get the packages of an index whose whole name matches."""
    for match in re.finditer(rf"^Package: (?:{pattern})$", text, re.MULTILINE):
        end = text.find("\n\n", match.start())
        stanza = text[match.start() : end if end >= 0 else len(text)]
        yield _package(_fields(stanza))


def _deb_path(package: Package) -> Path:
    return cache("archive", "pool") / package.filename.rsplit("/", 1)[1]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def download(package: Package) -> Path:
    """
    Get a package's file, checked; one that was begun is continued.

    :raises LabError: if the mirror lacks it or gives something else
    """
    path = _deb_path(package)
    if path.exists() and path.stat().st_size == package.size and _sha256(path) == package.sha256:
        return path
    begun = path.with_name(f"{path.name}.begun")
    say(f"downloading {path.name} ({package.size >> 20} MiB)")
    for attempt in range(5):
        have = begun.stat().st_size if begun.exists() else 0
        request = urllib.request.Request(f"{mirror()}/{package.filename}")
        if have:
            request.add_header("Range", f"bytes={have}-")
        try:
            answer = urllib.request.urlopen(request, timeout=60)
            # A mirror may ignore the range and send all of it.
            with answer, begun.open("ab" if answer.status == 206 else "wb") as stream:
                shutil.copyfileobj(answer, stream, 1 << 20)
        except urllib.error.HTTPError as error:
            begun.unlink(missing_ok=True)
            if error.code != 416:
                raise LabError(f"the mirror has no {package.filename}: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            if attempt == 4:
                raise ArchiveUnreachableError(f"{path.name} could not be had: {error}") from error
            time.sleep(2**attempt)
            continue
        if begun.exists() and begun.stat().st_size >= package.size:
            break
    if not begun.exists() or _sha256(begun) != package.sha256:
        begun.unlink(missing_ok=True)
        raise LabError(f"{path.name} does not have the SHA256 that the archive names")
    os.replace(begun, path)
    return path


def forget(package: Package) -> None:
    """Delete a package's file from the cache: some are a gigabyte."""
    path = _deb_path(package)
    if path.exists():
        path.unlink()


def extract(deb: Path, patterns: Sequence[str], into: Path) -> None:
    """
    Unpack those members of a package that match shell patterns (they start with ``./``).

    :raises LabError: if tar fails for another reason than a pattern without a match
    """
    into.mkdir(parents=True, exist_ok=True)
    unpack = subprocess.Popen(
        [tool("dpkg-deb", "dpkg"), "--fsys-tarfile", str(deb)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    done = subprocess.run(
        ["tar", "-x", "-C", str(into), "--no-same-owner", "--wildcards", *patterns],
        stdin=unpack.stdout,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert unpack.stdout is not None
    unpack.stdout.close()
    unpack.wait()
    bad = [
        line
        for line in done.stderr.splitlines()
        if "Not found in archive" not in line and "Exiting with failure" not in line
    ]
    if bad:
        raise LabError(f"{deb.name} could not be unpacked: {bad[0]}")


def uncompressed(path: Path) -> bytes:
    """Get what is in a file that may be compressed (.xz, .gz, .zst)."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".zst":
        command = [tool("zstd", "zstd"), "-dcq", str(path)]
        return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return data


def source_tree(suite: str, name: str) -> Path:
    """
    Get a kernel's unpacked source from a package such as ``linux-source-6.12``.

    Without network the newest one in the cache is taken.
    """
    folder = cache("sources")
    try:
        # Packages for all architectures are in the index of each.
        package = Index(suite, "amd64").find(re.escape(name))
    except ArchiveUnreachableError as error:
        kept = sorted(folder.glob(f"{name}_*"), key=lambda path: path.stat().st_mtime)
        if not kept:
            raise
        say(f"{error}; taking {kept[-1].name} from the cache")
        return kept[-1]
    tree = folder / f"{name}_{package.version.replace(':', '_')}"
    if tree.exists():
        return tree
    deb = download(package)
    say(f"unpacking {name} {package.version}")
    with made_whole(tree) as unfinished:
        unfinished.mkdir()
        extract(deb, [f"./usr/src/{name}.tar.xz"], unfinished / "package")
        tarball = unfinished / "package" / "usr" / "src" / f"{name}.tar.xz"
        run(["tar", "-xJf", tarball, "-C", unfinished, "--strip-components=1", "--no-same-owner"])
        shutil.rmtree(unfinished / "package")
    forget(package)
    return tree
