# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What a guest's own kernel said about its page tables: its report as one JSON document.

The report (``lab/workload/report.h``) is lines on the console. :func:`parse_report` checks that it
is whole and gives the document that samples keep as ``truth.json``; docs/lab.md describes its
members. Addresses and page frame numbers are hex strings, everything else is a plain number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from lab.errors import ReportError

SCHEMA = "ptinspect-truth/1"

_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")
_PTDUMP = re.compile(r".*/(page_tables/\w+|kernel_page_tables)$")
_NODE_VMSTAT = re.compile(r"/sys/devices/system/node/node(\d+)/vmstat$")
_CGROUP = re.compile(r"/cgroup(.*)/memory\.stat$")


class Section(NamedTuple):
    """A framed part of the report."""

    name: str
    argument: str
    lines: list[str]


def _unescape(text: str) -> str:
    """Undo ``\\xNN``; bytes that are no UTF-8 stay as surrogates."""
    raw = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)
    return raw.encode("latin-1").decode("utf-8", "surrogateescape")


def _checksum(text: str) -> int:
    """FNV-1a, 32 bits."""
    value = 2166136261
    for byte in text.encode("latin-1"):
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return value


def read_sections(console: str) -> list[Section]:
    """
    Get the sections of the last whole report on a console.

    :raises ReportError: if there is none, or it was cut or changed on its way
    """
    begin = console.rfind("@@report 1\n")
    if begin < 0:
        raise ReportError("the console has no report")
    end = console.find("@@sum ", begin)
    if end < 0:
        raise ReportError("the report has no end")
    body = console[begin:end]
    said = console[end : console.index("\n", end)].split()[1]
    if _checksum(body) != int(said, 16):
        raise ReportError("the report's checksum is wrong: something else wrote on the console")
    sections: list[Section] = []
    current: Section | None = None
    for line in body.splitlines()[1:]:
        if line.startswith("@section "):
            name, _, argument = line[len("@section ") :].partition(" ")
            current = Section(name, argument, [])
        elif current is None:
            raise ReportError(f"a line outside of every section: {line!r}")
        elif line.startswith("@end "):
            if int(line.split()[1]) != len(current.lines):
                raise ReportError(f"section {current.name} lacks lines")
            sections.append(current)
            current = None
        else:
            current.lines.append(line)
    return sections


def _numbers(lines: list[str]) -> dict[str, int]:
    """``name value`` lines, as in /proc/vmstat."""
    return {name: int(value) for name, value in (line.split()[:2] for line in lines)}


def _sizes(lines: list[str]) -> dict[str, int]:
    """``Name: number kB`` lines, as in /proc/meminfo: the numbers, by name."""
    found = (re.match(r"([^:]+):\s+(-?\d+)( kB)?$", line.strip()) for line in lines)
    return {match[1]: int(match[2]) for match in found if match}


def _maps(lines: list[str]) -> list[dict[str, Any]]:
    """/proc/PID/maps."""
    mappings = []
    for line in lines:
        span, permissions, offset, device, inode, *path = line.split(None, 5)
        start, end = span.split("-")
        mappings.append(
            {
                "start": f"0x{int(start, 16):x}",
                "end": f"0x{int(end, 16):x}",
                "permissions": permissions,
                "offset": f"0x{int(offset, 16):x}",
                "device": device,
                "inode": int(inode),
                "path": _unescape(path[0]) if path else "",
            }
        )
    return mappings


def _pagemap(lines: list[str]) -> list[dict[str, Any]]:
    """The pagemap extracts: each mapping's counts and some raw 64-bit entries."""
    mappings: list[dict[str, Any]] = []
    for line in lines:
        kind, *words = line.split()
        if kind == "mapping":
            start, end = words[:2]
            counts = {name: int(value) for name, value in zip(words[2::2], words[3::2])}
            mappings.append({"start": f"0x{start}", "end": f"0x{end}", **counts, "pages": []})
        else:
            mappings[-1]["pages"].append([f"0x{words[0]}", f"0x{words[1]}"])
    return mappings


def _processes(sections: list[Section]) -> Iterator[dict[str, Any]]:
    """One record a process, from the sections that follow its "process" section."""
    process: dict[str, Any] = {}
    for section in sections:
        if section.name == "process":
            if process:
                yield process
            named = dict(line.partition(" ")[::2] for line in section.lines)
            process = {"pid": int(named["pid"]), "comm_hex": named["comm"]}
        elif section.name == "status":
            status = dict(line.partition(":")[::2] for line in section.lines)
            sizes = _sizes(section.lines)
            process["tgid"] = int(status["Tgid"])
            process["ppid"] = int(status["PPid"])
            process["name_escaped"] = status["Name"].strip()
            process["vm_pte_kb"] = sizes.get("VmPTE")
            process["vm_rss_kb"] = sizes.get("VmRSS")
            process["status_kb"] = {
                name: n for name, n in sizes.items() if name[:2] in ("Vm", "Rs")
            }
            process["hugetlb_kb"] = sizes.get("HugetlbPages", 0)
        elif section.name == "maps":
            process["maps"] = _maps(section.lines)
        elif section.name == "smaps_rollup":
            process["smaps_rollup_kb"] = _sizes(section.lines)
        elif section.name == "pagemap":
            process["pagemap"] = _pagemap(section.lines)
    if process:
        yield process


def _notes(lines: list[str], kind: str) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        pid, said, text = line.split(" ", 2)
        if said == kind:
            found.append({"pid": int(pid), "text": text})
    return found


def _iomem(lines: list[str]) -> list[dict[str, str]]:
    """/proc/iomem; depth is not kept, so ranges nest."""
    ranges = []
    for line in lines:
        span, _, name = line.strip().partition(" : ")
        start, _, end = span.partition("-")
        ranges.append({"start": f"0x{start}", "end": f"0x{end}", "name": name})
    return ranges


def _zones(lines: list[str]) -> list[dict[str, Any]]:
    """/proc/zoneinfo: where each zone of each node lies, in pages."""
    zones: list[dict[str, Any]] = []
    for line in lines:
        head = re.match(r"Node (\d+), zone +(\w+)", line)
        if head:
            zones.append({"node": int(head[1]), "zone": head[2]})
        words = line.replace(":", " ").split()
        if words and words[0] in ("spanned", "present", "managed"):
            zones[-1][words[0]] = int(words[1])
        elif words and words[0] == "start_pfn":
            zones[-1]["start_pfn"] = f"0x{int(words[1]):x}"
    return zones


def parse_report(console: str) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Turn the last report on a console into the document and its text files.

    :return: the document, and the kernel's own dumps of its page tables by file name
    :raises ReportError: if the report is not whole
    """
    sections = read_sections(console)
    by_name = {section.name: section for section in sections}
    files = {section.argument: section.lines for section in sections if section.name == "file"}
    try:
        counters = _numbers(by_name["counters"].lines)
        pfns = [line.split() for line in by_name["pgtable_pfns"].lines]
        # The global counter as stat_refresh left it, and what was made between then and now.
        late = counters["kpageflags_pgtable_now"] - counters["kpageflags_pgtable_folded"]
        exact = counters["nr_page_table_pages_folded"] + late
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "kernel": {
                "version": files["/proc/version"][0],
                "command_line": files["/proc/cmdline"][0],
            },
            "page_size": counters["page_size"],
            "table_span": counters["table_span"],
            "cpus": counters["cpus"],
            "nr_page_table_pages": {
                "exact": exact,
                "global": counters["nr_page_table_pages_now"],
                "per_cpu_remainder": exact - counters["nr_page_table_pages_now"],
            },
            "kpageflags_pgtable": {
                "count": counters["kpageflags_pgtable_now"],
                "pfns": [[f"0x{pfn}", int(count)] for pfn, count in pfns],
            },
            "vmstat": _numbers(files["/proc/vmstat"]),
            "node_vmstat": {
                found[1]: _numbers(lines)
                for path, lines in files.items()
                for found in [_NODE_VMSTAT.match(path)]
                if found
            },
            "meminfo": _sizes(files["/proc/meminfo"]),
            "zones": _zones(files["/proc/zoneinfo"]),
            "iomem": _iomem(files["/proc/iomem"]),
            "cgroups": {
                found[1] or "/": _numbers(lines)
                for path, lines in files.items()
                for found in [_CGROUP.match(path)]
                if found
            },
            "processes": list(_processes(sections)),
            "made": _notes(by_name["notes"].lines, "made"),
            "skipped": _notes(by_name["notes"].lines, "skipped"),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise ReportError(f"the report cannot be read: {error!r}") from error
    if (
        sum(count for _, count in document["kpageflags_pgtable"]["pfns"])
        != late + counters["kpageflags_pgtable_folded"]
    ):
        raise ReportError("the page tables moved while the report was written")
    texts = {
        path.split("/debug/")[1].replace("/", ".") + ".txt": "".join(f"{line}\n" for line in lines)
        for path, lines in files.items()
        if _PTDUMP.match(path)
    }
    return document, texts
