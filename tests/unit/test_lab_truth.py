# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's report: framing, checksum, and the document made of it."""

from __future__ import annotations

import pytest

from lab.errors import ReportError
from lab.truth import parse_report, read_sections

_SECTIONS = [
    (
        "counters",
        [
            "page_size 4096",
            "table_span 2097152",
            "cpus 2",
            "nr_page_table_pages_folded 10",
            "kpageflags_pgtable_folded 8",
            "nr_page_table_pages_now 10",
            "kpageflags_pgtable_now 11",
        ],
    ),
    ("notes", ["7 made sparse 0x1000 2 tables", "1 skipped gmap: s390 only"]),
    ("file /proc/version", ["Linux version 1"]),
    ("file /proc/cmdline", ["quiet"]),
    ("file /proc/vmstat", ["nr_free_pages 5", "nr_page_table_pages 10"]),
    ("file /proc/meminfo", ["MemTotal:      100 kB", "HugePages_Total:       4"]),
    ("file /proc/zoneinfo", ["Node 0, zone   Normal", "        spanned  64", "  start_pfn:  16"]),
    ("file /proc/iomem", ["00001000-0009ffff : System RAM"]),
    ("file /sys/devices/system/node/node1/vmstat", ["nr_page_table_pages 3"]),
    ("file /cgroup/lab/memory.stat", ["pagetables 4096"]),
    ("file /sys/kernel/debug/page_tables/kernel", ["0x0-0x1 pte"]),
    ("pgtable_pfns", ["a0 10", "ff 1"]),
    ("process", ["pid 7", "comm 1b5b0a"]),
    (
        "status /proc/7/status",
        ["Name: \\x1b[\\x5cn", "Tgid: 7", "PPid: 1", "VmPTE:  40 kB", "VmRSS:  12 kB"],
    ),
    ("maps /proc/7/maps", ["1000-3000 rw-p 00000000 00:03 5    /a file", "8000-9000 r--p 0 0:0 0"]),
    ("smaps_rollup /proc/7/smaps_rollup", ["Rss:  12 kB"]),
    (
        "pagemap 7",
        ["mapping 1000 3000 scanned 2 present 1 swapped 0", "page 1000 8000000000000001"],
    ),
]


def _report(sections=_SECTIONS) -> str:
    text = "@@report 1\n"
    for name, lines in sections:
        text += f"@section {name}\n" + "".join(f"{line}\n" for line in lines)
        text += f"@end {len(lines)}\n"
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return f"boot messages\n{text}@@sum {value:08x}\n@@ready\n"


def test_document():
    truth, texts = parse_report(_report())
    assert truth["nr_page_table_pages"] == {"exact": 13, "global": 10, "per_cpu_remainder": 3}
    assert truth["kpageflags_pgtable"] == {"count": 11, "pfns": [["0xa0", 10], ["0xff", 1]]}
    assert truth["node_vmstat"] == {"1": {"nr_page_table_pages": 3}}
    assert truth["cgroups"] == {"/lab": {"pagetables": 4096}}
    assert truth["meminfo"] == {"MemTotal": 100, "HugePages_Total": 4}
    assert truth["zones"] == [{"node": 0, "zone": "Normal", "spanned": 64, "start_pfn": "0x10"}]
    assert truth["iomem"] == [{"start": "0x00001000", "end": "0x0009ffff", "name": "System RAM"}]
    assert truth["made"] == [{"pid": 7, "text": "sparse 0x1000 2 tables"}]
    assert truth["skipped"] == [{"pid": 1, "text": "gmap: s390 only"}]
    (process,) = truth["processes"]
    assert bytes.fromhex(process["comm_hex"]) == b"\x1b[\n"
    assert (process["pid"], process["ppid"], process["vm_pte_kb"]) == (7, 1, 40)
    assert [area["path"] for area in process["maps"]] == ["/a file", ""]
    assert process["pagemap"][0]["present"] == 1
    assert process["pagemap"][0]["pages"] == [["0x1000", "0x8000000000000001"]]
    assert texts == {"page_tables.kernel.txt": "0x0-0x1 pte\n"}


def test_the_last_report_counts():
    first = _report().replace("@@ready\n", "")
    again = [(name, lines) for name, lines in _SECTIONS if name != "notes"]
    again.insert(1, ("notes", ["1 made repeat: the page tables moved during a report"]))
    truth, _ = parse_report(first + _report(again))
    assert truth["made"][0]["text"].startswith("repeat")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("@@report", "@@ropert"), "no report"),
        (lambda text: text[: text.index("@@sum")], "no end"),
        (lambda text: text.replace("quiet", "quIet"), "checksum"),
        (lambda text: text.replace("VmPTE:", "[ 1.2] oops\nVmPTE:"), "checksum"),
    ],
)
def test_damage_is_noticed(damage, message):
    with pytest.raises(ReportError, match=message):
        parse_report(damage(_report()))


def test_lost_lines_are_noticed():
    text = _report()
    body = text[text.index("@@report") : text.index("@@sum")].replace("@end 1\n", "@end 2\n", 1)
    value = 2166136261
    for byte in body.encode():
        value = (value ^ byte) * 16777619 % 2**32
    with pytest.raises(ReportError, match="lacks lines"):
        read_sections(f"{body}@@sum {value:08x}\n")


def test_moving_page_tables_are_noticed():
    moved = [(name, ["a0 9"] if name == "pgtable_pfns" else lines) for name, lines in _SECTIONS]
    with pytest.raises(ReportError, match="moved"):
        parse_report(_report(moved))


def test_missing_sections_are_noticed():
    with pytest.raises(ReportError, match="cannot be read"):
        parse_report(_report(_SECTIONS[:3]))
