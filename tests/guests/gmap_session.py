# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Inside a guest, as root: what its kernel's guests are, and whether their memory is what was written.

Writes one line of JSON after ``@@said``. The notes are those of lab/workload in /tmp/ledger.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from ptinspect.census import take_census
from ptinspect.tables.lookup import walk_address
from ptinspect.target import TargetOptions, open_target

#: struct note of lab/workload/states.h behind three numbers: a process ID and a text.
NOTE = struct.Struct("=i200s")


def notes() -> list[tuple[int, list[str]]]:
    data = Path("/tmp/ledger").read_bytes()
    (count,) = struct.unpack_from("=i", data)
    found = []
    for number in range(count):
        pid, text = NOTE.unpack_from(data, 12 + number * NOTE.size)
        found.append((pid, text.split(b"\0")[0].decode().split()))
    return found


def main() -> None:
    pages = [
        (pid, words[1], int(words[2], 16), int(words[3], 16))
        for pid, words in notes()
        if words[:1] == ["made"] and words[1] in ("gmap-page", "gmap-zero-page", "gmap-user-page")
    ]
    right = 0
    with open_target(TargetOptions(symbols=(Path("/vmlinux"),))) as target:
        prog = target.prog
        census = take_census(prog)
        story = census.stories.gmaps
        for pid, kind, guest, host in pages:
            for gmap in story.gmaps.gmaps:
                tasks = () if gmap.space is None else gmap.space.tasks
                if pid not in [task.pid for task in tasks] or gmap.shadow:
                    continue
                if story.host_address(gmap, guest) != host:
                    continue
                assert gmap.space is not None
                root, owned = gmap.space.root, gmap.kvm_owned
                found = walk_address(prog, census.paging, root, guest, kvm_owned=owned)
                if found.physical is None:
                    continue
                data = prog.read(found.physical, 4096, True)
                first, last = struct.unpack(">Q4080xQ", data)
                want = (guest, guest ^ (1 << 64) - 1) if kind != "gmap-zero-page" else (0, 0)
                right += (first, last) == want
        said = {
            "target": target.name,
            "pages": len(pages),
            "right": right,
            "gmaps": len(story.gmaps.gmaps),
            "shadows": sum(gmap.shadow for gmap in story.gmaps.gmaps),
            "disagreements": [found.text for found in story.disagreements],
            "missing": list(story.missing),
            "asces": [problem for asce in census.stories.asces.asces for problem in asce.problems],
            "notes": [" ".join(words) for _, words in notes()],
        }
    print("@@said", json.dumps(said))


if __name__ == "__main__":
    main()
