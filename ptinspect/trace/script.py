# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The bpftrace script for one kernel.

How it works. A function around each allocation leaves a note for its thread, which level it makes
and for which mm; the kernel's statistics function, through which every counted constructor goes,
reads the note. The same function with a negative change is the destructor. Whether the destructor
comes when a table is unlinked (6.1, 6.12) or when it is released (7.2) differs between kernels and
levels, so the script does not ask: a table waits from whatever of destructor and gather comes
first until its page goes back to the allocator.

Rules that keep the numbers right. A BPF program that is interrupted by itself is skipped, so making
and freeing are separate programs. An increment can be lost if two programs update one counter on a
CPU, so each map that counts is written by one program only. Maps that count by level and way are
so small that they cannot be full; those by process can, and then fall short of them visibly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ptinspect.errors import UsageError
from ptinspect.trace.hooks import LEVELS, WAYS, Hook, Hooks, LevelHook
from ptinspect.trace.offers import KernelOffers

#: The oldest bpftrace that knows what the script uses (``self:signal``, ``print_maps_on_exit``).
MINIMUM_VERSION = (0, 23)

_IMMEDIATE, _GATHER = WAYS.index("immediate"), WAYS.index("gather")
_RCU, _DEFERRED = WAYS.index("gather+RCU"), WAYS.index("deferred")
_KERNEL_ASYNC = WAYS.index("kernel-async")
_PGD = LEVELS.index("PGD")


@dataclass(frozen=True)
class ScriptOptions:
    """What is traced beyond the totals."""

    #: Only tables that this process (thread group) makes or frees are followed.
    pid: int | None = None
    #: Only tables that a thread of this name makes or frees are followed.
    comm: str | None = None
    #: Only tables made or freed in this cgroup (the inode number of its cgroup2 folder).
    cgroup: int | None = None
    #: Count only: no table is followed, so there are no waits, ways or leaks.
    counts_only: bool = False
    #: Keep kernel stacks of making and freeing.
    stacks: bool = False
    #: Hand the tables that are left over at the end to the reader.
    tables: bool = False
    #: Tell each table made and freed as it happens.
    events: bool = False
    #: Seconds between two readings of the totals.
    interval: int = 1
    #: How many tables can be followed at a time, and how many rows a map by process can have.
    max_tables: int = 262_144


def write_script(offers: KernelOffers, hooks: Hooks, options: ScriptOptions) -> str:
    """
    Write the script for a kernel.

    :raises UsageError: if an option cannot be said in a script
    """
    return "\n".join(_Writer(offers, hooks, options).lines()) + "\n"


class _Writer:
    """One script in the making."""

    def __init__(self, offers: KernelOffers, hooks: Hooks, options: ScriptOptions) -> None:
        self._offers, self._hooks, self._options = offers, hooks, options
        self._wanted = " && ".join(_filters(options)) or None
        self._follow = not options.counts_only and hooks.release
        self._named: set[str] = set()

    def lines(self) -> Iterator[str]:
        """Yield the script's lines."""
        yield from self._head()
        yield from self._gate()
        for allocator in self._hooks.allocators:
            yield from self._note("making", allocator, "1")
        for unlinker in self._hooks.unlinkers:
            way = _IMMEDIATE if unlinker.level == _PGD else _GATHER
            yield from self._note("unlinking", unlinker, str(way))
        yield from self._made()
        yield from self._gone()
        if self._follow:
            yield from self._unlinked(
                self._hooks.gather, 1, _RCU, "A table joins the batch that RCU releases."
            )
            yield from self._unlinked(
                self._hooks.defer, 1, _DEFERRED, "Huge-page code hands a PTE table to RCU."
            )
            yield from self._unlinked(
                self._hooks.kernel_defer,
                0,
                _KERNEL_ASYNC,
                "A kernel table is queued; a worker releases it.",
            )
        yield from self._batch()
        if self._follow:
            yield from self._released()
        if (self._options.tables or self._options.events) and self._hooks.exit is not None:
            yield "// An mm has ended: tables made for it before now should be gone soon."
            yield f"{self._entry(self._hooks.exit)} /@on/ {{"
            ended = self._argument(self._hooks.exit, 0)
            if self._options.tables:
                yield f"  @exited[{ended}] = nsecs;"
            if self._options.events:
                yield f'  printf("ended %llu %llx\\n", nsecs, {ended});'
            yield "}"
            yield ""
        yield from self._readings()

    def _head(self) -> Iterator[str]:
        offers, options = self._offers, self._options
        yield "// Page tables as they are made and freed; written by ptinspect trace for"
        yield f"// Linux {offers.release} ({offers.machine})."
        yield f"// Needs bpftrace {'.'.join(map(str, MINIMUM_VERSION))} or newer, and root."
        yield "//"
        numbered = ", ".join(f"{i} {name}" for i, name in enumerate(LEVELS))
        yield f"// Levels: {numbered}."
        numbered = ", ".join(f"{i} {name}" for i, name in enumerate(WAYS) if i)
        yield f"// Ways of being freed: {numbered}."
        if not self._hooks.trampolines:
            yield "//"
            yield "// Hooks are kprobes: fentry and fexit need a BPF compiler in the kernel."
        if self._hooks.missing:
            yield "//"
            yield "// Not seen on this kernel:"
            yield from (f"// - {sentence}" for sentence in self._hooks.missing)
        yield ""
        yield f"config = {{ max_map_keys = {options.max_tables}; print_maps_on_exit = 0 }}"
        yield ""

    def _gate(self) -> Iterator[str]:
        yield "// The gate. Hooks are attached one after the other, so nothing counts until all are"
        yield "// there and SIGUSR1 opens the gate; a second one closes it."
        yield "BEGIN { @on = (uint64)0; }"
        yield "self:signal:SIGUSR1 {"
        yield "  if (@on) { @on = 0; } else { @on = 1; }"
        yield '  printf("gate %llu %llu\\n", @on, nsecs);'
        yield "}"
        yield ""

    def _note(self, name: str, level: LevelHook, way: str) -> Iterator[str]:
        """Leave a note for the thread while it is inside a function."""
        if name not in self._named:
            self._named.add(name)
            if name == "making":
                yield "// While a thread is in an allocator: (level, mm); mm is 0 for the kernel."
            else:
                yield "// While a thread unlinks a table: (level, way as far as it is known)."
        function = level.hook.function
        if name == "making":
            second = "(uint64)0" if level.mm is None else self._argument(level.hook, level.mm)
        else:
            second = f"(uint64){way}"
        note = f"@{name}[tid] = ((uint64){level.level}, {second});"
        yield f"{self._entry(level.hook)} {{ {note} }}  // {LEVELS[level.level]}"
        yield f"{self._exit(function)} {{ delete(@{name}, tid); }}"
        yield ""

    def _made(self) -> Iterator[str]:
        options, stat = self._options, self._hooks.stat
        page, counter, change = (self._argument(stat, i) for i in range(3))
        counter, change = self._raw(stat, 1), self._raw(stat, 2)
        yield "// A table is made: its constructor counts it."
        yield f"{self._entry(stat)} /{counter} == {self._hooks.counter} && {change} > 0 && @on/ {{"
        yield "  $note = @making[tid];"
        yield "  @made[$note.0] = count();"
        yield f"  @made_pages = sum({change});"
        body = ["@made_by[(uint64)pid, comm, $note.0] = count();"]
        if self._follow:
            yield f"  $page = {page};"
            # Its page cannot be waiting: the release was not seen.
            yield "  if (@pending[$page].0) { @lost_releases = count(); delete(@pending, $page); }"
            body.append("@live[$page] = (nsecs, $note.0, $note.1, (uint64)pid, comm);")
            if options.stacks and options.tables:
                body.append("@live_stack[$page] = kstack(24);")
        if options.stacks:
            body.append("@made_at[kstack(24), $note.0] = count();")
        if options.events:
            body.append(
                f'printf("made %llu %llx %llu %llx %llu %s\\n", nsecs, {page}, '
                "$note.0, $note.1, (uint64)pid, comm);"
            )
        yield from self._if_wanted(body)
        yield "}"
        yield ""

    def _gone(self) -> Iterator[str]:
        options, stat = self._options, self._hooks.stat
        page, counter, change = self._argument(stat, 0), self._raw(stat, 1), self._raw(stat, 2)
        yield "// A table is no longer one: its destructor takes it out of the count. It may be"
        yield "// unlinked only now (then it begins to wait), or wait already."
        yield f"{self._entry(stat)} /{counter} == {self._hooks.counter} && {change} < 0 && @on/ {{"
        noted = bool(self._hooks.unlinkers)
        if noted:
            yield "  $note = @unlinking[tid];"
        if not self._follow:
            yield "  $level = $note.0;" if noted else "  $level = (uint64)0;"
            yield "  @gone[$level] = count();"
            yield f"  @gone_pages = sum(0 - {change});"
            body = ["@gone_by[(uint64)pid, comm, $level] = count();"]
            if options.stacks:
                body.append("@gone_at[kstack(24), $level] = count();")
            yield from self._if_wanted(body)
            yield "}"
            yield ""
            return
        yield f"  $page = {page};"
        yield "  $live = @live[$page];"
        yield "  $waits = @pending[$page];"
        yield "  $level = $live.1;"
        if noted:
            yield "  if ($note.0) { $level = $note.0; }"
        yield "  if ($waits.0) { $level = $waits.2; }"
        yield "  @gone[$level] = count();"
        yield f"  @gone_pages = sum(0 - {change});"
        yield "  if ($live.0) {"
        yield "    @gone_of[$live.3, $live.4, $level] = count();"
        yield "    delete(@live, $page);"
        if options.stacks and options.tables:
            yield "    delete(@live_stack, $page);"
        yield "  }"
        begins = "$waits.0 == 0"
        if self._wanted:
            begins += f" && ($live.0 || ({self._wanted}))"
        yield f"  if ({begins}) {{"
        yield f"    $way = (uint64){_IMMEDIATE};"
        if noted:
            yield "    if ($note.1) { $way = $note.1; }"
        yield "    @pending[$page] = (nsecs, $way, $level, (uint64)pid, comm);"
        yield "    @unlinked_first = count();"
        if options.events:
            yield f"    {_unlinked_event('$way')}"
        if options.stacks:
            yield "    @unlinked_at[kstack(24), $level] = count();"
        yield "  }"
        yield "}"
        yield ""

    def _unlinked(self, hook: Hook | None, position: int, way: int, what: str) -> Iterator[str]:
        options = self._options
        if hook is None:
            return
        name = f"@unlinked_way{way}"
        yield f"// {what}"
        yield f"{self._entry(hook)} /@on/ {{"
        yield from self._page(hook, position)
        yield "  $waits = @pending[$page];"
        yield "  if ($waits.0) {"
        yield f"    @pending[$page] = ($waits.0, (uint64){way}, $waits.2, $waits.3, $waits.4);"
        yield "  } else {"
        yield "    $live = @live[$page];"
        if way == _DEFERRED:
            yield f"    $level = (uint64){LEVELS.index('PTE')};"
        else:
            yield "    $level = $live.1;"
        if self._hooks.unlinkers and way == _RCU:
            yield "    $note = @unlinking[tid];"
            yield "    if ($note.0) { $level = $note.0; }"
        body = [
            f"@pending[$page] = (nsecs, (uint64){way}, $level, (uint64)pid, comm);",
            f"{name} = count();",
        ]
        if options.events:
            body.append(_unlinked_event(f"(uint64){way}"))
        if options.stacks:
            body.append(f"@unlinked_at{way}[kstack(24), $level] = count();")
        if self._wanted:
            yield f"    if ($live.0 || ({self._wanted})) {{"
            yield from (f"      {line}" for line in body)
            yield "    }"
        else:
            yield from (f"    {line}" for line in body)
        yield "  }"
        yield "}"
        yield ""

    def _page(self, hook: Hook, position: int) -> Iterator[str]:
        """Yield lines that set ``$page`` to a table's struct page."""
        yield f"  $page = {self._argument(hook, position)};"
        if not self._hooks.addresses:
            return
        # s390 hands tables over by address (6.12) or by page (7.2: tlb_remove_table only). The
        # memory map lies above all memory.
        layout = self._offers.structs.get("vm_layout", ())
        base = (
            '((struct vm_layout *)kaddr("vm_layout"))->identity_base'
            if "identity_base" in layout and "vm_layout" in self._offers.symbols
            else "0"
        )
        yield '  $map = *(uint64 *)kaddr("vmemmap");'
        yield f"  $base = (uint64){base};"
        yield "  if ($page < $map) {"
        yield "    $page = $map + (($page - $base) >> 12) * (uint64)sizeof(struct page);"
        yield "  }"

    def _batch(self) -> Iterator[str]:
        hook = self._hooks.batch_release
        if hook is None:
            return
        yield "// RCU releases a batch: a second count, of whole batches."
        yield f"{self._entry(hook)} /@on/ {{"
        head = self._raw(hook, 0)
        yield f"  @batch_tables = sum((uint64)((struct mmu_table_batch *){head})->nr);"
        yield "  @batches = count();"
        yield "}"
        yield ""

    def _released(self) -> Iterator[str]:
        options = self._options
        yield "// A page goes back to the allocator. If it was a table, it has waited until now."
        yield "rawtracepoint:mm_page_free /@on/ {"
        yield "  $page = (uint64)arg0;"
        yield "  $waits = @pending[$page];"
        yield "  if ($waits.0) {"
        yield "    @freed[$waits.1, $waits.2] = count();"
        yield "    @freed_by[$waits.3, $waits.4, $waits.1, $waits.2] = count();"
        yield "    @wait_us[$waits.1] = hist((nsecs - $waits.0) / (uint64)1000, 2);"
        if options.events:
            yield (
                '    printf("freed %llu %llx %llu %llu %llu %llu %s\\n", nsecs, $page, '
                "$waits.2, $waits.1, nsecs - $waits.0, $waits.3, $waits.4);"
            )
        yield "    delete(@pending, $page);"
        yield "    $live = @live[$page];"
        yield "    if ($live.0) {  // its destructor was missed"
        yield "      @gone_unseen[$live.3, $live.4, $live.1] = count();"
        yield "      delete(@live, $page);"
        if options.stacks and options.tables:
            yield "      delete(@live_stack, $page);"
        yield "    }"
        yield "  }"
        yield "}"
        yield ""

    def _readings(self) -> Iterator[str]:
        options = self._options
        maps = ["made", "made_pages", "gone", "gone_pages", "made_by"]
        if self._follow:
            maps += [
                "gone_of",
                "gone_unseen",
                "freed",
                "freed_by",
                "wait_us",
                "lost_releases",
                "unlinked_first",
            ]
            for hook, way in (
                (self._hooks.gather, _RCU),
                (self._hooks.defer, _DEFERRED),
                (self._hooks.kernel_defer, _KERNEL_ASYNC),
            ):
                maps += [f"unlinked_way{way}"] if hook is not None else []
        else:
            maps.append("gone_by")
        if self._hooks.batch_release is not None:
            maps += ["batch_tables", "batches"]
        yield "// Once all hooks are there (this is attached last): wait for the gate, then totals."
        yield f"interval:s:{options.interval} {{"
        yield "  if (@on) {"
        yield '    printf("reading %llu\\n", nsecs);'
        yield from (f"    print(@{name});" for name in maps)
        yield '    printf("read\\n");'
        yield "  } else {"
        yield '    printf("waiting\\n");'
        yield "  }"
        yield "}"
        yield ""
        if options.stacks:
            maps.append("made_at")
            if self._follow:
                maps.append("unlinked_at")
                for hook, way in (
                    (self._hooks.gather, _RCU),
                    (self._hooks.defer, _DEFERRED),
                    (self._hooks.kernel_defer, _KERNEL_ASYNC),
                ):
                    maps += [f"unlinked_at{way}"] if hook is not None else []
            else:
                maps.append("gone_at")
        if self._follow:
            maps.append("pending")
            if options.tables:
                maps.append("live")
                maps += ["live_stack"] if options.stacks else []
                maps += ["exited"] if self._hooks.exit is not None else []
        yield "// The last word, after SIGTERM or SIGINT."
        yield "END {"
        yield '  printf("reading %llu\\n", nsecs);'
        yield from (f"  print(@{name});" for name in maps)
        yield '  printf("end\\n");'
        yield "}"

    def _if_wanted(self, body: list[str]) -> Iterator[str]:
        if self._wanted is None:
            yield from (f"  {line}" for line in body)
            return
        yield f"  if ({self._wanted}) {{"
        yield from (f"    {line}" for line in body)
        yield "  }"

    def _entry(self, hook: Hook) -> str:
        kind = "fentry:vmlinux" if self._hooks.trampolines else "kprobe"
        return f"{kind}:{hook.function}"

    def _exit(self, function: str) -> str:
        kind = "fexit:vmlinux" if self._hooks.trampolines else "kretprobe"
        return f"{kind}:{function}"

    def _raw(self, hook: Hook, position: int) -> str:
        """A parameter as it is (a counter's number, a change)."""
        if self._hooks.trampolines:
            return f"args.{hook.parameters[position]}"
        return f"(int32)arg{position}"

    def _argument(self, hook: Hook, position: int) -> str:
        """A parameter as an address."""
        if self._hooks.trampolines:
            return f"(uint64)args.{hook.parameters[position]}"
        return f"(uint64)arg{position}"


def _unlinked_event(way: str) -> str:
    return (
        'printf("unlinked %llu %llx %llu %llu %llu %s\\n", nsecs, $page, $level, '
        f"{way}, (uint64)pid, comm);"
    )


def _filters(options: ScriptOptions) -> Iterator[str]:
    if options.pid is not None:
        yield f"pid == {options.pid}"
    if options.comm is not None:
        if not options.comm or len(options.comm.encode()) > 15:
            raise UsageError("the name of a thread has 1 to 15 bytes")
        if any(not " " <= sign <= "~" or sign in '"\\' for sign in options.comm):
            raise UsageError("bpftrace cannot look for a name with such signs in it")
        yield f'comm == "{options.comm}"'
    if options.cgroup is not None:
        yield f"cgroup == {options.cgroup}"
