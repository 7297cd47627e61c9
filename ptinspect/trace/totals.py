# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a reading of the script's maps says: totals by level, way and process, and what is left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ptinspect.trace.hooks import LEVELS, WAYS
from ptinspect.trace.offers import STAT_HOOKS
from ptinspect.trace.reader import Reading, level_name, way_name


@dataclass(frozen=True)
class LevelTotal:
    """Tables of one level that the kernel counted in and out."""

    level: str
    made: int
    gone: int

    @property
    def net(self) -> int:
        """How many more there are now than when the trace began."""
        return self.made - self.gone


@dataclass(frozen=True)
class WayTotal:
    """Tables that went back to the allocator by one way."""

    way: str
    #: By level, in the order of :data:`LEVELS`.
    freed: tuple[int, ...]
    #: Half, and 99 of 100, had waited at most this long; ``None`` if none was freed.
    wait_p50_us: int | None
    wait_p99_us: int | None
    #: The longest wait lies below this.
    wait_max_us: int | None
    #: (from, up to, how many), microseconds.
    histogram: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ProcessTotal:
    """What one process (thread group, under one name) made and freed."""

    pid: int
    comm: str
    #: By level, in the order of :data:`LEVELS`.
    made: tuple[int, ...]
    #: Of those it made, how many are tables no more; ``None`` if tables were not followed.
    gone: tuple[int, ...] | None
    #: Tables that it unlinked and that were released, by way in the order of :data:`WAYS`.
    freed: tuple[int, ...]

    @property
    def live_by_level(self) -> tuple[int, ...] | None:
        """Of those it made, how many are tables still."""
        if self.gone is None:
            return None
        return tuple(made - gone for made, gone in zip(self.made, self.gone))

    @property
    def live(self) -> int | None:
        """The same, of all levels."""
        live = self.live_by_level
        return None if live is None else sum(live)


@dataclass(frozen=True)
class StackTotal:
    """One kernel stack, innermost function first, and how many tables it made or unlinked."""

    made: bool
    level: str
    count: int
    frames: tuple[str, ...]
    cause: str


@dataclass(frozen=True)
class PendingTable:
    """A table that is unlinked and not yet back at the allocator."""

    page: int
    level: str
    way: str
    age_ns: int
    pid: int
    comm: str


@dataclass(frozen=True)
class LiveTable:
    """A table that was made during the trace and is one still."""

    page: int
    level: str
    age_ns: int
    #: ``struct mm_struct *``; ``None`` for a kernel table or where the maker was not seen.
    mm: int | None
    #: Nanoseconds since its mm's last user was gone; ``None`` if that was not seen.
    mm_ended_ns: int | None
    pid: int
    comm: str
    frames: tuple[str, ...] = ()


@dataclass(frozen=True)
class Totals:
    """All that one reading says."""

    nsecs: int
    made_pages: int
    gone_pages: int
    levels: tuple[LevelTotal, ...]
    ways: tuple[WayTotal, ...]
    processes: tuple[ProcessTotal, ...]
    #: Tables unlinked and not yet released; ``None`` if tables were not followed.
    waiting: int | None
    #: Tables whose page was made a table again although its release had not been seen.
    lost_releases: int
    #: Tables made that no process could be named for: the map by process was full.
    unattributed: int | None
    #: Tables that were released although their destructor had not been seen.
    gone_unseen: int
    #: Waiting or live tables of which the maps should know and do not: they were full. 0 before the
    #: last reading, which alone has those maps.
    lost_records: int
    #: Tables that RCU released, counted a second time by whole batches; ``None`` if not counted.
    batch_tables: int | None
    batches: int | None
    stacks: tuple[StackTotal, ...] = ()
    pending: tuple[PendingTable, ...] = ()
    live: tuple[LiveTable, ...] = ()

    @property
    def net_pages(self) -> int:
        """How many pages more than at the beginning hold page tables, by what was seen."""
        return self.made_pages - self.gone_pages


@dataclass(frozen=True)
class CounterChange:
    """nr_page_table_pages, read before and after the gate was opened, and when it was closed."""

    before_open: int | None
    after_open: int | None
    before_close: int | None
    after_close: int | None

    @property
    def change(self) -> int | None:
        """From the opening to the closing."""
        if self.after_close is None or self.before_open is None:
            return None
        return self.after_close - self.before_open

    @property
    def at_rest(self) -> bool:
        """Whether the counter did not move while the gate moved."""
        return self.before_open == self.after_open and self.before_close == self.after_close


@dataclass(frozen=True)
class TraceResult:
    """A whole trace."""

    totals: Totals
    counter: CounterChange
    #: Calls of hooks that BPF skipped; ``None`` if the kernel does not say.
    missed: int | None
    #: What was lost on the way, and how often.
    dropped: dict[str, int]
    seconds: float
    #: Whether only some processes were followed.
    filtered: bool
    #: What cannot be seen on this kernel.
    unseen: tuple[str, ...]
    #: Why it ended before it should.
    ended_early: str | None = None

    @property
    def exact(self) -> bool:
        """Whether nothing was missed or dropped and the kernel's counter says the same."""
        return (
            self.missed == 0
            and not self.dropped
            and not self.totals.lost_releases
            and not self.totals.lost_records
            and not self.totals.gone_unseen
            and (self.filtered or not self.totals.unattributed)
            and self.ended_early is None
            and self.counter.change == self.totals.net_pages
        )


#: A function in a stack says what a table was made or unlinked for; the first that fits.
CAUSES = (
    ("collapse_huge_page", "THP collapse"),
    ("collapse_file", "THP collapse"),
    ("retract_page_tables", "THP collapse"),
    ("collapse_pte_mapped_thp", "THP collapse"),
    ("do_huge_pmd_anonymous_page", "THP fault"),
    ("__split_huge_pmd", "THP split"),
    ("split_huge_pmd_locked", "THP split"),
    ("huge_pmd_share", "hugetlb"),
    ("huge_pte_alloc", "hugetlb"),
    ("hugetlb_fault", "hugetlb"),
    ("copy_page_range", "fork"),
    ("copy_process", "fork"),
    ("exec_mmap", "exec"),
    ("begin_new_exec", "exec"),
    ("bprm_execve", "exec"),
    ("do_execveat_common", "exec"),
    ("exit_mmap", "exit"),
    ("do_exit", "exit"),
    ("move_page_tables", "mremap"),
    ("__do_munmap", "munmap"),
    ("do_vmi_munmap", "munmap"),
    ("do_vmi_align_munmap", "munmap"),
    ("vmap_pages_range_noflush", "vmalloc"),
    ("vmap_small_pages_range_noflush", "vmalloc"),
    ("vmap_range_noflush", "vmalloc"),
    ("__vmalloc_node_range", "vmalloc"),
    ("ioremap_page_range", "ioremap"),
    ("change_page_attr_set_clr", "set_memory"),
    ("__change_page_attr_set_clr", "set_memory"),
    ("madvise_vma_behavior", "madvise"),
    ("do_madvise", "madvise"),
    ("__mmdrop", "last mm reference"),
    ("handle_mm_fault", "fault"),
    ("__handle_mm_fault", "fault"),
)


def cause_of(frames: Sequence[str]) -> str:
    """Say what a kernel stack is about: ``fork``, ``exit``, ``fault``; ``other`` if not known."""
    names = {frame.split("+")[0].split(".")[0] for frame in frames}
    names |= {name[: -len("_noprof")] for name in names if name.endswith("_noprof")}
    return next((cause for function, cause in CAUSES if function in names), "other")


def stack_frames(text: str) -> tuple[str, ...]:
    """
    Take a stack as bpftrace writes it apart.

    Left out is what is the tracer's own or the same in all: BPF programs and trampolines (a hooked
    function stands there twice), and the statistics function that is hooked.
    """
    frames: list[str] = []
    names: list[str] = []
    for line in text.splitlines():
        frame = line.strip()
        name = frame.split("+")[0].split(".")[0]
        if not name or name.startswith(("bpf_prog_", "bpf_trampoline_")):
            continue
        if name in (*STAT_HOOKS, "mod_lruvec_page_state") or names[-1:] == [name]:
            continue
        frames.append(frame)
        names.append(name)
    return tuple(frames)


def read_totals(reading: Reading) -> Totals:
    """Make sense of a reading."""
    followed = "freed" in reading.maps or "unlinked_first" in reading.maps
    made, gone = _counts(reading, "made"), _counts(reading, "gone")
    freed: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for key, count in reading.keyed("freed").items():
        way, level = (int(part) for part in key.split(","))
        freed[way][level] += int(count)
    unlinked = sum(
        reading.number(name)
        for name in reading.maps
        if name.startswith(("unlinked_first", "unlinked_way"))
    )
    released = sum(sum(levels.values()) for levels in freed.values())
    lost = reading.number("lost_releases")
    processes = _processes(reading, followed)
    waiting = unlinked - released - lost if followed else None
    lost_records = 0
    if waiting is not None and reading.last:
        lost_records += abs(waiting - len(reading.keyed("pending")))
        if "live" in reading.maps:
            lost_records += abs(sum(p.live or 0 for p in processes) - len(reading.keyed("live")))
    return Totals(
        nsecs=reading.nsecs,
        made_pages=reading.number("made_pages"),
        gone_pages=reading.number("gone_pages"),
        levels=tuple(
            LevelTotal(name, made.get(code, 0), gone.get(code, 0))
            for code, name in enumerate(LEVELS)
            if made.get(code) or gone.get(code)
        ),
        ways=tuple(_way(reading, way, freed[way]) for way in sorted(freed)),
        processes=processes,
        waiting=waiting,
        lost_releases=lost,
        unattributed=sum(made.values()) - sum(sum(p.made) for p in processes),
        gone_unseen=sum(map(int, reading.keyed("gone_unseen").values())),
        lost_records=lost_records,
        # bpftrace 0.23 does not print a sum that nothing was added to.
        batch_tables=reading.number("batch_tables") if "batches" in reading.maps else None,
        batches=reading.number("batches") if "batches" in reading.maps else None,
        stacks=tuple(_stacks(reading)),
        pending=tuple(_pending(reading)),
        live=tuple(_live(reading)),
    )


def _counts(reading: Reading, name: str) -> dict[int, int]:
    return {int(key): int(count) for key, count in reading.keyed(name).items()}


def _way(reading: Reading, way: int, levels: dict[int, int]) -> WayTotal:
    buckets = reading.keyed("wait_us").get(str(way), [])
    histogram = tuple(
        (int(b.get("min", 0)), int(b.get("max", b.get("min", 0))), int(b["count"]))
        for b in buckets
        if b.get("count")
    )
    return WayTotal(
        way_name(way),
        tuple(levels.get(code, 0) for code in range(len(LEVELS))),
        quantile(histogram, 50),
        quantile(histogram, 99),
        max((high for _, high, _ in histogram), default=None),
        histogram,
    )


def quantile(histogram: Iterable[tuple[int, int, int]], percent: int) -> int | None:
    """Get the upper end of the bucket in which so many of a hundred are reached."""
    buckets = sorted(histogram)
    total = sum(count for _, _, count in buckets)
    reached = 0
    for _, high, count in buckets:
        reached += count
        if reached * 100 >= total * percent:
            return high
    return None


@dataclass
class _Process:
    made: list[int] = field(default_factory=lambda: [0] * len(LEVELS))
    gone: list[int] = field(default_factory=lambda: [0] * len(LEVELS))
    freed: list[int] = field(default_factory=lambda: [0] * len(WAYS))


def _processes(reading: Reading, followed: bool) -> tuple[ProcessTotal, ...]:
    found: dict[tuple[int, str], _Process] = defaultdict(_Process)
    for key, count in reading.keyed("made_by").items():
        pid, comm, level = _process_key(key, 1)
        found[pid, comm].made[level] += int(count)
    for name in ("gone_of", "gone_unseen"):
        for key, count in reading.keyed(name).items():
            pid, comm, level = _process_key(key, 1)
            found[pid, comm].gone[level] += int(count)
    for key, count in reading.keyed("freed_by").items():
        pid, comm, way = _process_key(key, 2)
        found[pid, comm].freed[way] += int(count)
    return tuple(
        ProcessTotal(
            pid,
            comm,
            tuple(process.made),
            tuple(process.gone) if followed else None,
            tuple(process.freed),
        )
        for (pid, comm), process in sorted(
            found.items(), key=lambda item: (-sum(item[1].made) - sum(item[1].freed), item[0])
        )
    )


def _process_key(key: str, numbers: int) -> tuple[int, str, int]:
    """Take ``pid,comm,number...`` apart: a name may have commas in it. Get the first number."""
    pid, _, rest = key.partition(",")
    comm, *codes = rest.rsplit(",", numbers)
    return int(pid), comm, int(codes[0])


def _stacks(reading: Reading) -> Iterable[StackTotal]:
    counts: dict[tuple[bool, int, tuple[str, ...]], int] = defaultdict(int)
    for name, value in reading.maps.items():
        made = name == "made_at"
        if not made and not name.startswith(("unlinked_at", "gone_at")):
            continue
        for key, count in value.items() if isinstance(value, dict) else ():
            text, _, level = key.rpartition(",")
            counts[made, int(level), stack_frames(text)] += int(count)
    for (made, level, frames), count in sorted(counts.items(), key=lambda item: -item[1]):
        yield StackTotal(made, level_name(level), count, frames, cause_of(frames))


def _pending(reading: Reading) -> Iterable[PendingTable]:
    for page, (since, way, level, pid, comm) in reading.keyed("pending").items():
        yield PendingTable(
            int(page),
            level_name(int(level)),
            way_name(int(way)),
            reading.nsecs - int(since),
            int(pid),
            str(comm),
        )


def _live(reading: Reading) -> Iterable[LiveTable]:
    ended = {int(mm): int(at) for mm, at in reading.keyed("exited").items()}
    waiting = reading.keyed("pending")
    stacks = reading.keyed("live_stack")
    for page, (since, level, mm, pid, comm) in reading.keyed("live").items():
        if page in waiting:
            continue  # unlinked; its destructor comes when it is released
        made, owner = int(since), int(mm)
        end = ended.get(owner)
        yield LiveTable(
            int(page),
            level_name(int(level)),
            reading.nsecs - made,
            owner or None,
            # An mm may have the address of one that ended before this table was made.
            reading.nsecs - end if end is not None and end > made else None,
            int(pid),
            str(comm),
            stack_frames(str(stacks.get(page, ""))),
        )
