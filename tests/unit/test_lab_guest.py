# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's initramfs, kernel recipes and control connection."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from lab import kernels
from lab.arches import ARCHES, find_arch
from lab.errors import GuestError, LabError
from lab.guest import Qmp
from lab.initramfs import pack
from lab.samples import SAMPLES, kernel_name


def unpack(archive):
    """Read a newc archive: mode, device and data by name."""
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        body = (at + 110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        data = archive[body : body + fields[6]]
        found[name] = (fields[1], (fields[9], fields[10]), data)
        at = (body + fields[6] + 3) // 4 * 4


def test_initramfs():
    files = unpack(pack({"init": b"program", "modules/a.ko": b"module"}, programs=["init"]))
    assert files["init"] == (0o100755, (0, 0), b"program")
    assert files["modules/a.ko"] == (0o100644, (0, 0), b"module")
    assert files["modules"][0] == files["dev"][0] == 0o040755
    assert files["dev/console"][:2] == (0o020600, (5, 1))
    assert list(files).index("modules") < list(files).index("modules/a.ko")


def test_lost_lines():
    config = 'CONFIG_A=y\nCONFIG_B=8\n# CONFIG_C is not set\nCONFIG_D="x"\n'
    kept = "# a comment\nCONFIG_A=y\nCONFIG_B=8\n# CONFIG_C is not set\n# CONFIG_NEW is not set\n"
    assert kernels.lost_lines(kept, config) == []
    lost = "CONFIG_B=9\nCONFIG_E=y\n# CONFIG_D is not set\n"
    assert kernels.lost_lines(lost, config) == lost.splitlines()


@pytest.mark.parametrize("name", kernels.RECIPES)
def test_recipes(name):
    recipe = kernels.find_recipe(name)
    assert find_arch(recipe.arch).name == recipe.arch
    lines = [line for line in kernels.fragment_text(name).splitlines() if line]
    symbols = [
        line.split("=")[0].replace("# ", "").split()[0] for line in lines if "CONFIG_" in line
    ]
    assert len(symbols) == len(set(symbols))
    assert all(line.startswith(("#", "CONFIG_")) for line in lines)


def test_samples_have_recipes():
    assert {kernel_name(name) for name in SAMPLES} <= set(kernels.RECIPES)


def test_names_of_architectures():
    for arch in ARCHES.values():
        assert find_arch(arch.name) is find_arch(arch.debian) is find_arch(arch.kernel) is arch
    with pytest.raises(LabError, match="no architecture 'vax'"):
        find_arch("vax")


@pytest.fixture
def qemu(tmp_path):
    """A socket that answers as QEMU does; gives the path and what was asked."""
    path, asked = tmp_path / "s", []
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(1)

    def serve():
        client, _ = server.accept()
        stream = client.makefile("rw")
        stream.write('{"QMP": {}}\n')
        stream.flush()
        for line in stream:
            request = json.loads(line)
            asked.append(request)
            if request["execute"] == "bad":
                answer = {"error": {"class": "GenericError", "desc": "no such thing"}}
            elif request["execute"] == "quit":
                break
            else:
                stream.write('{"event": "STOP"}\n')
                answer = {"return": {"said": request["execute"]}}
            stream.write(json.dumps(answer) + "\n")
            stream.flush()
        stream.close()
        client.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield path, asked
    server.close()


def test_qmp(qemu):
    path, asked = qemu
    qmp = Qmp(path)
    assert qmp.execute("stop") == {"said": "stop"}
    assert qmp.execute("dump", paging=False) == {"said": "dump"}
    with pytest.raises(GuestError, match="QEMU refused bad: no such thing"):
        qmp.execute("bad")
    with pytest.raises(GuestError):
        qmp.execute("quit")
    qmp.close()
    assert [request["execute"] for request in asked[:3]] == ["qmp_capabilities", "stop", "dump"]
    assert asked[2]["arguments"] == {"paging": False}
