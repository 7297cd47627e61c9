# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The runner and the command beside a program that plays bpftrace."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ptinspect.errors import TargetError, UsageError
from ptinspect.trace import runner
from ptinspect.trace.counter import page_table_pages
from ptinspect.trace.offers import read_offers
from ptinspect.trace.program import check_machine, find_bpftrace, kprobe_options, parse_version
from ptinspect.trace.recorded import read_record
from ptinspect.trace.runner import InterruptedTraceError, Tracer

FAKE = Path(__file__).parent / "trace_fake_bpftrace.py"
OFFERS = Path(__file__).parent / "trace" / "x86_64-6.12.offers.json"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    program = tmp_path / "bpftrace"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("FAKE_PIDFILE", str(tmp_path / "pid"))
    monkeypatch.setattr(runner, "_END_TIMEOUT", 2.0)
    return str(program)


def is_gone(folder: Path) -> bool:
    try:
        os.kill(int((folder / "pid").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root whose counter stands still, and whose processes say nothing of BPF."""
    (tmp_path / "proc" / "sys" / "vm").mkdir(parents=True)
    (tmp_path / "proc" / "sys" / "vm" / "stat_refresh").write_bytes(b"")
    (tmp_path / "proc" / "vmstat").write_text("nr_free_pages 7\nnr_page_table_pages 100\n")
    return tmp_path


def test_a_whole_trace(fake: str, root: Path, tmp_path: Path) -> None:
    with Tracer(fake, "// script\n", root=root) as tracer:
        tracer.open_gate()
        end = time.monotonic() + 0.5
        for _ in tracer.messages(lambda reading: time.monotonic() > end):
            pass
        (root / "proc" / "vmstat").write_text("nr_page_table_pages 103\n")
        result = tracer.finish()
    assert result.totals.net_pages == 3
    assert result.counter.change == 3
    assert not result.dropped
    # The kernel did not say what it missed, so nothing is claimed.
    assert result.missed is None
    assert not result.exact
    assert result.totals.live[0].mm_ended_ns is not None
    assert is_gone(tmp_path)


def test_reports_why_hooks_cannot_be_attached(
    fake: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BPFTRACE", "fails")
    with Tracer(fake, "", root=root) as tracer, pytest.raises(TargetError) as raised:
        tracer.open_gate()
    assert "fentry/fexit not available" in str(raised.value)
    assert "--kprobes" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert is_gone(tmp_path)


def test_gives_up_on_one_that_is_never_ready(
    fake: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BPFTRACE", "silent")
    monkeypatch.setattr(runner, "ATTACH_TIMEOUT", 1.0)
    with Tracer(fake, "", root=root) as tracer, pytest.raises(TargetError, match="in time"):
        tracer.open_gate()
    assert is_gone(tmp_path)


def test_can_be_interrupted_before_it_begins(
    fake: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BPFTRACE", "silent")
    stop = threading.Event()
    stop.set()
    with Tracer(fake, "", root=root, stop=stop) as tracer, pytest.raises(InterruptedTraceError):
        tracer.open_gate()
    # It may have been ended before it could even write its number down.
    assert not (tmp_path / "pid").exists() or is_gone(tmp_path)


@pytest.mark.parametrize(
    ("mode", "what"), [("dies", "ended by itself"), ("stubborn", "without its last reading")]
)
def test_an_end_that_was_not_asked_for(
    fake: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, what: str
) -> None:
    monkeypatch.setenv("FAKE_BPFTRACE", mode)
    with Tracer(fake, "", root=root) as tracer:
        tracer.open_gate()
        end = time.monotonic() + 3
        for _ in tracer.messages(lambda reading: time.monotonic() > end):
            pass
        result = tracer.finish()
    assert result.ended_early is not None
    assert what in result.ended_early
    assert not result.exact
    assert is_gone(tmp_path)


def test_a_full_map_is_a_loss(fake: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BPFTRACE", "full")
    with Tracer(fake, "", root=root) as tracer:
        tracer.open_gate()
        end = time.monotonic() + 0.5
        for _ in tracer.messages(lambda reading: time.monotonic() > end):
            pass
        result = tracer.finish()
    assert any("Map full" in what for what in result.dropped)


def test_counter(root: Path) -> None:
    assert page_table_pages(root) == 100
    (root / "proc" / "sys" / "vm" / "stat_refresh").unlink()
    assert page_table_pages(root) is None


@pytest.mark.parametrize(
    ("text", "version"),
    [("bpftrace v0.23.2\n", (0, 23)), ("bpftrace v0.9-rc1", (0, 9)), ("hello", None)],
)
def test_version(text: str, version: Any) -> None:
    assert parse_version(text) == version


def test_refuses_without_bpftrace(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_bpftrace(fake) == fake
    with pytest.raises(TargetError, match="apt install bpftrace"):
        find_bpftrace("no-such-bpftrace")
    monkeypatch.setenv("FAKE_VERSION", "bpftrace v0.17.0")
    with pytest.raises(TargetError, match=r"0\.17 is too old: trace needs 0\.23 or newer"):
        find_bpftrace(fake)
    monkeypatch.setenv("FAKE_VERSION", "what?")
    with pytest.raises(TargetError, match="does not tell its version"):
        find_bpftrace(fake)


def test_kprobe_sessions_are_turned_off_where_they_are_known(
    fake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kprobe_options(fake) == ("--no-feature", "kprobe_session")
    older = tmp_path / "older"
    older.write_text("#!/bin/sh\necho 'USAGE: --no-feature can only have values ...' >&2; exit 1\n")
    older.chmod(0o755)
    assert kprobe_options(str(older)) == ()
    with Tracer(fake, "", options=kprobe_options(fake), root=tmp_path) as tracer:
        tracer.open_gate()
        assert tracer.finish().ended_early is None


def test_refuses_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(TargetError, match="needs root"):
        check_machine(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check_machine(tmp_path)
    security = tmp_path / "sys" / "kernel" / "security"
    security.mkdir(parents=True)
    (security / "lockdown").write_text("none [integrity] confidentiality\n")
    check_machine(tmp_path)
    (security / "lockdown").write_text("none integrity [confidentiality]\n")
    with pytest.raises(TargetError, match="locked down"):
        check_machine(tmp_path)


def test_refuses_kernels_without_btf_or_tracefs(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="BTF"):
        read_offers(tmp_path)
    btf = tmp_path / "sys" / "kernel" / "btf"
    btf.mkdir(parents=True)
    (btf / "vmlinux").write_bytes(b"nonsense")
    with pytest.raises(TargetError, match="malformed"):
        read_offers(tmp_path)


def command(
    fake: str, *options: str, stdout: int = subprocess.PIPE, **environment: str
) -> "subprocess.Popen[str]":
    """The real command, told that this machine can be traced and that it is the recorded one."""
    code = (
        "import sys; from pathlib import Path\n"
        "import ptinspect.cli.trace as t\n"
        "from ptinspect.trace.offers import offers_from_json\n"
        "t.check_machine = lambda: None\n"
        f"t.read_offers = lambda: offers_from_json(Path({str(OFFERS)!r}).read_text())\n"
        "from ptinspect.cli.main import main; main(sys.argv[1:])\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "trace", "--bpftrace", fake, *options],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_command_reports(fake: str, tmp_path: Path) -> None:
    done = command(fake, "--duration", "500ms", "--leaks", "5s")
    out, errors = done.communicate(timeout=60)
    assert done.returncode == 4, errors
    assert "suspect: its mm has ended" in out
    assert "missed calls" in out
    assert "INCOMPLETE: how many calls of the hooks were skipped is not known" in out
    assert "\x1b" not in out
    assert is_gone(tmp_path)


def test_command_writes_json_lines(fake: str) -> None:
    done = command(fake, "--duration", "500ms", "--format", "jsonl")
    out, _ = done.communicate(timeout=60)
    kinds = [json.loads(line)["kind"] for line in out.splitlines()]
    assert (kinds[0], kinds[-1]) == ("begin", "summary")
    assert set(kinds[1:-1]) == {"reading"}
    assert json.loads(out.splitlines()[1])["levels"]["PTE"] == {"made": 5, "gone": 4}


def test_an_event_that_comes_late_is_told(fake: str) -> None:
    options = ("--duration", "500ms", "--events", "--format", "jsonl")
    out, _ = command(fake, *options, FAKE_BPFTRACE="late").communicate(timeout=60)
    kinds = [json.loads(line)["kind"] for line in out.splitlines()]
    assert kinds[-2:] == ["made", "summary"]


def test_record_of_a_trace_that_has_ended(fake: str, tmp_path: Path) -> None:
    done = command(fake, "--duration", "500ms", "--leaks", "3s", "--format", "jsonl")
    out, _ = done.communicate(timeout=60)
    path = tmp_path / "record"
    path.write_text(out)
    recorded = read_record(path)
    offered = json.loads(OFFERS.read_text())
    assert recorded.release == offered["release"]
    assert recorded.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert (recorded.ended, recorded.filtered, recorded.young_ns) == (True, False, 3 * 10**9)
    assert recorded.began_ns < recorded.until_ns
    (table,) = recorded.live
    assert (table.page, table.level, table.mm, table.pid, table.comm) == (
        4096,
        "PTE",
        64,
        42,
        "odd",
    )
    assert table.mm_ended_ns is not None
    assert recorded.missing
    later = recorded.aged(recorded.until_ns + 10**9)
    assert later.live[0].age_ns == table.age_ns + 10**9
    assert later.live[0].mm_ended_ns == table.mm_ended_ns + 10**9
    assert later.aged(0) == later
    # Without --leaks there are no tables in it.
    path.write_text("".join(line for line in out.splitlines(True) if '"tables"' not in line[:20]))
    with pytest.raises(UsageError, match="one by one"):
        read_record(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_ends_by_signal_with_a_summary(fake: str, tmp_path: Path, number: int) -> None:
    done = command(fake, "--format", "jsonl")
    assert done.stdout is not None
    kinds = [json.loads(done.stdout.readline())["kind"] for _ in range(2)]
    assert kinds == ["begin", "reading"]
    done.send_signal(number)
    out, _ = done.communicate(timeout=60)
    assert json.loads(out.splitlines()[-1])["kind"] == "summary"
    assert done.returncode == 4
    assert is_gone(tmp_path)


def test_command_interrupted_while_attaching(fake: str, tmp_path: Path) -> None:
    done = command(fake, FAKE_BPFTRACE="silent")
    end = time.monotonic() + 30
    while not (tmp_path / "pid").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    done.send_signal(signal.SIGINT)
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 130
    assert errors == "ptinspect: interrupted\n"
    assert is_gone(tmp_path)


def test_command_until_exit(fake: str) -> None:
    child = subprocess.Popen(["sleep", "8"])
    done = command(fake, "--until-exit", str(child.pid), "--format", "jsonl")
    child.wait()
    out, errors = done.communicate(timeout=60)
    assert json.loads(out.splitlines()[-1])["kind"] == "summary", errors


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--sample", "x86_64-7.3"], 2, "not at --sample"),
        (["-c", "dump"], 2, "not at --core"),
        (["--qemu", "sock"], 2, "not at --qemu"),
        (["--until-exit", "4194304"], 2, "no process 4194304"),
        (["--cgroup", "no/such/group"], 2, "no cgroup"),
        (["--events"], 2, "jsonl"),
        (["--duration", "soon"], 2, "no duration"),
        (["--counts-only", "--leaks", "1s"], 2, "--counts-only"),
        (["--offers", "x"], 2, "--print-script"),
        (["--comm", "a" * 16], 2, "1 to 15 bytes"),
    ],
)
def test_command_refuses(fake: str, options: list[str], status: int, message: str) -> None:
    done = command(fake, *options)
    out, errors = done.communicate(timeout=60)
    assert (done.returncode, out) == (status, "")
    assert message in errors


def test_live_view_fits_the_terminal(fake: str) -> None:
    outer, inner = pty.openpty()
    done = command(fake, "--duration", "2s", LINES="5", COLUMNS="80", stdout=inner)
    os.close(inner)
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(outer, 65536):
            said += part
    done.wait(timeout=60)
    os.close(outer)
    frames = said.decode().split("page tables: ")[1:]
    assert len(frames) > 2
    # All but the last one, after which the summary comes.
    for frame in frames[:-1]:
        assert frame.startswith("7 pages made, 4 gone, net 3, 0 tables waiting")
        assert "nr_page_table_pages changed by" in frame
        assert "odd" not in frame  # the fifth line would be the heading's first row
        assert 2 <= frame.count("\n") <= 4
