# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Guests of a guest, looked at from within: as root on /proc/kcore with Debian's Python and drgn.

The kernels are the small ones, whose KVM starts without SIE; a part of the lab's workload makes
the machines.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.archive import ArchiveUnreachableError
from lab.errors import MissingToolError
from lab.guest import Guest, booted
from lab.initramfs import build_workload
from lab.kernels import built_kernel
from lab.userland import PYTHON, live_initramfs, userland

pytestmark = pytest.mark.guest

SUITE = "forky"

SESSION = """\
busybox dd if=/dev/zero of=/tmp/ledger bs=1024 count=64 2>/dev/null
busybox mkdir -p /cgroup /huge
echo 1 >/proc/sys/vm/allocate_pgste 2>/dev/null
for state in gmap gmap-twin gmap-shadow gmap-user; do
  /workload $state &
  busybox sleep 3
done
echo 0 >/proc/sys/vm/allocate_pgste 2>/dev/null
python3 -m ptinspect -s /vmlinux gmap
echo "@@status $?"
python3 session.py
echo @@end
"""


@pytest.mark.parametrize("name", ["s390x-6.12", "s390x-7.3"])
def test_guest_memory_from_within(name: str, tmp_path: Path) -> None:
    kernel = built_kernel(name)
    if kernel is None:
        pytest.skip(f"the kernel is not built: scripts/lab build {name}")
    try:
        workload = build_workload(kernel.arch)
        part = userland(SUITE, kernel.arch, PYTHON)
    except (MissingToolError, ArchiveUnreachableError) as error:
        pytest.skip(str(error))
    files = {
        "project/session.py": Path(__file__).with_name("gmap_session.py").read_bytes(),
        "vmlinux": kernel.vmlinux.read_bytes(),
        "workload": workload.read_bytes(),
    }
    session = f"busybox chmod +x /workload\n{SESSION}"
    initrd = live_initramfs([part], session, files, tmp_path / "initrd")

    def make() -> Guest:
        return Guest(kernel.arch, kernel.image, initrd, memory=3072, smp="2", append="quiet")

    with booted(make, "@@end", timeout=900) as guest:
        console = guest.console()
    lines = [line for line in console.splitlines() if line.startswith("@@said ")]
    assert lines, console[-2000:]
    said = json.loads(lines[0][7:])
    assert said["target"] == "/proc/kcore"
    assert (said["disagreements"], said["missing"], said["asces"]) == ([], [], [])
    assert said["shadows"] == 3
    assert said["gmaps"] >= 8
    assert said["right"] == said["pages"] >= 30
    assert "@@status 0" in console
