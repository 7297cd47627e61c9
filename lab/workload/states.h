/* Copyright (c) the ptinspect authors */
/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The states: each function runs in a process of its own, makes one kind of page-table state and
 * returns; the process then waits for ever. A state that this kernel or machine cannot make says so
 * with skip().
 */
#ifndef LAB_STATES_H
#define LAB_STATES_H

#include "sys.h"

/* Shared by every process: what was made, in which process, and what could not be. */
struct note {
	int pid;
	char text[200];
};

struct ledger {
	int count, pids, ready;
	struct note notes[160];
	int pid[64];
};

static struct ledger *ledger;

static void note(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void note(const char *format, ...)
{
	int i = __atomic_fetch_add(&ledger->count, 1, __ATOMIC_SEQ_CST);
	va_list args;

	if (i >= (int)(sizeof(ledger->notes) / sizeof(*ledger->notes)))
		return;
	ledger->notes[i].pid = getpid();
	va_start(args, format);
	vsnprintf(ledger->notes[i].text, sizeof(ledger->notes[i].text), format, args);
	va_end(args);
}

#define made(format, ...) note("made " format, ##__VA_ARGS__)
#define skip(format, ...) note("skipped " format, ##__VA_ARGS__)

static void list_process(void)
{
	int i = __atomic_fetch_add(&ledger->pids, 1, __ATOMIC_SEQ_CST);

	if (i < (int)(sizeof(ledger->pid) / sizeof(*ledger->pid)))
		ledger->pid[i] = getpid();
}

static void now_ready(void)
{
	__atomic_fetch_add(&ledger->ready, 1, __ATOMIC_SEQ_CST);
}

static void wait_for_ever(void)
{
	for (;;)
		pause();
}

/* Starts a process that runs state and then waits; returns once the state is made. */
static int spawn(const char *name, void (*state)(void))
{
	int pid, status, ready = __atomic_load_n(&ledger->ready, __ATOMIC_SEQ_CST);

	pid = fork();
	if (!pid) {
		prctl(PR_SET_NAME, name);
		list_process();
		state();
		now_ready();
		wait_for_ever();
	}
	while (__atomic_load_n(&ledger->ready, __ATOMIC_SEQ_CST) <= ready) {
		if (waitpid(pid, &status, WNOHANG) == pid) {
			skip("%s: the process ended with status %x", name, status);
			break;
		}
		sleep_ms(2);
	}
	return pid;
}

static char *map(void *hint, size_t size, int prot, int flags, int fd)
{
	char *at = mmap(hint, size, prot, flags, fd, 0);

	if (at == MAP_FAILED)
		return NULL;
	return at;
}

#define ANON (MAP_PRIVATE | MAP_ANONYMOUS)

/* An anonymous mapping that starts at a multiple of align. */
static char *map_aligned(size_t size, size_t align, int prot, int flags)
{
	char *at = map(NULL, size + align, PROT_NONE, flags | MAP_NORESERVE, -1);
	uintptr_t aligned;

	if (!at)
		return NULL;
	aligned = ((uintptr_t)at + align - 1) & ~(align - 1);
	munmap(at, aligned - (uintptr_t)at);
	munmap((char *)aligned + size, (uintptr_t)at + align - aligned);
	if (mprotect((char *)aligned, size, prot))
		return NULL;
	return (char *)aligned;
}

static void peek(const char *at)
{
	(void)*(const volatile char *)at;
}

static void poke(char *at)
{
	*(volatile char *)at = 0x5a;
}

static unsigned long sparse_tables = 48;
static bool sparse_scattered;

/*
 * One table of PTEs a touch, each with the zero page in one entry. Scattered: the tables of a second
 * region are made in between and given back, so that free pages lie between those that stay; and the
 * order of the addresses is not that of the tables.
 */
static void state_sparse(void)
{
	size_t size = sparse_tables * TABLE_SPAN, i, step = sparse_scattered ? 7919 : 1;
	char *at = map_aligned(size, TABLE_SPAN, PROT_READ, ANON | MAP_NORESERVE);
	char *between = NULL;

	if (sparse_scattered)
		between = map_aligned(size, TABLE_SPAN, PROT_READ, ANON | MAP_NORESERVE);
	if (!at || (sparse_scattered && !between))
		return skip("sparse: mmap failed");
	madvise(at, size, MADV_NOHUGEPAGE);
	if (between)
		madvise(between, size, MADV_NOHUGEPAGE);
	for (i = 0; i < sparse_tables; i++) {
		/* The step is a prime: unless the number is a multiple of it, no table is left out. */
		size_t n = i * step % sparse_tables;

		peek(at + n * TABLE_SPAN + (n % 16) * page_size);
		if (between)
			peek(between + n * TABLE_SPAN);
	}
	if (between)
		munmap(between, size);
	made("sparse %p %lu tables, one zero page each", at, sparse_tables);
}

/* Tables whose entries have all been zapped again, a part of a table at a time. */
static void state_emptied(void)
{
	size_t i, tables = 8;
	char *at = map_aligned(tables * TABLE_SPAN, TABLE_SPAN, PROT_READ | PROT_WRITE, ANON);

	if (!at)
		return skip("emptied: mmap failed");
	madvise(at, tables * TABLE_SPAN, MADV_NOHUGEPAGE);
	for (i = 0; i < tables; i++) {
		poke(at + i * TABLE_SPAN + 3 * page_size);
		poke(at + i * TABLE_SPAN + 5 * page_size);
	}
	/* The last two tables stay as they are. */
	for (i = 0; i < tables - 2; i++)
		madvise(at + i * TABLE_SPAN + page_size, 8 * page_size, MADV_DONTNEED);
	made("emptied %p %zu tables without an entry, then 2 with two pages each", at, tables - 2);
}

static bool has_huge_pages(void)
{
	char text[4096], *at;

	return read_file("/proc/self/smaps_rollup", text, sizeof(text)) > 0 &&
	       (at = strstr(text, "AnonHugePages:")) && strtoul(at + 14, NULL, 10) > 0;
}

/* Bytes of a transparent huge page; 0 if there are none, or they are too large for a small guest. */
static size_t huge_page_bytes(const char *state)
{
	char text[64];
	size_t huge;

	if (read_file("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", text, sizeof(text)) < 0) {
		skip("%s: the kernel or the machine has no transparent huge pages", state);
		return 0;
	}
	huge = strtoul(text, NULL, 10);
	if (huge > MIB(4)) {
		skip("%s: a huge page of %zu MiB is too large here", state, huge >> 20);
		return 0;
	}
	return huge;
}

/* Huge anonymous pages, each with a table deposited; one of them split, one PROT_NONE. */
static void state_thp(void)
{
	size_t huge = huge_page_bytes("thp"), i;
	char *at, *zero;

	if (!huge)
		return;
	at = map_aligned(4 * huge, huge, PROT_READ | PROT_WRITE, ANON);
	if (!at)
		return skip("thp: mmap failed");
	madvise(at, 4 * huge, MADV_HUGEPAGE);
	for (i = 0; i < 4; i++)
		poke(at + i * huge);
	if (!has_huge_pages())
		return skip("thp: no huge page was given");
	made("thp %p 4 huge pages of %zu KiB", at, huge >> 10);
	madvise(at + huge + 16 * page_size, 4 * page_size, MADV_DONTNEED);
	made("thp-split %p a huge page split, 4 of its pages gone", at + huge);
	mprotect(at + 2 * huge, huge, PROT_NONE);
	made("thp-prot-none %p a huge page without access", at + 2 * huge);
	zero = map_aligned(2 * huge, huge, PROT_READ, ANON | MAP_NORESERVE);
	if (!zero)
		return skip("thp-zero: mmap failed");
	madvise(zero, 2 * huge, MADV_HUGEPAGE);
	peek(zero);
	peek(zero + huge);
	made("thp-zero %p 2 reads that may map the huge zero page", zero);
}

/* In different PMD tables: these cover a GiB or less. */
#define MOVED_FROM ((void *)GIB(80))
#define MOVED_TO ((void *)GIB(82))

/* A huge page that moves to another PMD table, its deposited table with it; two that are split. */
static void state_thp_moved(void)
{
	size_t huge = huge_page_bytes("thp-moved"), i;
	char *at, *to;

	if (!huge)
		return;
	at = map(MOVED_FROM, 4 * huge, PROT_READ | PROT_WRITE, ANON | MAP_FIXED_NOREPLACE, -1);
	if (!at)
		return skip("thp-moved: mmap failed (errno %d)", errno);
	madvise(at, 4 * huge, MADV_HUGEPAGE);
	for (i = 0; i < 4; i++)
		poke(at + i * huge);
	if (!has_huge_pages())
		return skip("thp-moved: no huge page was given");
	to = mremap(at + 2 * huge, huge, huge, MREMAP_MAYMOVE | MREMAP_FIXED, MOVED_TO);
	if (to != MOVED_TO)
		return skip("thp-moved: the kernel refused (errno %d)", errno);
	made("thp-moved %p a huge page moved from %p", to, at + 2 * huge);
	for (i = 0; i < 2; i++)
		madvise(at + i * huge + 3 * page_size, page_size, MADV_DONTNEED);
	made("thp-withdrawn %p 2 huge pages split, the third was moved, the fourth is whole", at);
}

/* Whole tables zapped at once: kernels with PT_RECLAIM (7.x) give such tables back. */
static void state_reclaimed(void)
{
	size_t i, tables = 6;
	char *at = map_aligned(tables * TABLE_SPAN, TABLE_SPAN, PROT_READ | PROT_WRITE, ANON);

	if (!at)
		return skip("reclaimed: mmap failed");
	madvise(at, tables * TABLE_SPAN, MADV_NOHUGEPAGE);
	for (i = 0; i < tables; i++)
		poke(at + i * TABLE_SPAN + i * page_size);
	madvise(at, tables * TABLE_SPAN, MADV_DONTNEED);
	made("reclaimed %p %zu tables, zapped whole", at, tables);
}

/* Anonymous memory in pieces of 64 KiB: arm64 marks each piece's 16 entries as contiguous. */
static void folios_64k(void)
{
	const char *enabled = "/sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled";
	char *at = map_aligned(KIB(256), KIB(64), PROT_READ | PROT_WRITE, ANON);
	size_t i;

	if (!at || !write_file(enabled, "madvise"))
		return skip("folios-64k: the kernel has no huge pages of 64 KiB");
	madvise(at, KIB(256), MADV_HUGEPAGE);
	for (i = 0; i < 4; i++)
		poke(at + i * KIB(64));
	/* The last piece's entries differ: they are not contiguous any more. */
	mprotect(at + KIB(192) + 4 * page_size, page_size, PROT_READ);
	write_file(enabled, "never");
	made("folios-64k %p 4 pieces of 64 KiB, a page of the last one read-only", at);
}

/* Pages of hugetlb that are smaller than what a PMD entry maps: contiguous entries of a table. */
static void hugetlb_64k(void)
{
	const char *number = "/sys/kernel/mm/hugepages/hugepages-64kB/nr_hugepages";
	char *at;

	if (!write_file(number, "2"))
		return skip("hugetlb-64k: the kernel has no such pages");
	at = map(NULL, KIB(128), PROT_READ | PROT_WRITE,
		 ANON | MAP_HUGETLB | 16 << MAP_HUGE_SHIFT, -1);
	if (!at)
		return skip("hugetlb-64k: mmap failed (errno %d)", errno);
	poke(at);
	poke(at + KIB(64));
	made("hugetlb-64k %p 2 pages of 64 KiB", at);
}

static void state_64k(void)
{
	if (page_size > KIB(16))
		return skip("folios-64k, hugetlb-64k: pages are that large already");
	folios_64k();
	hugetlb_64k();
}

/* The sharing of PMD tables needs a shared mapping that covers an aligned GiB. */
#define HUGETLB_AT ((void *)GIB(64))

#define HUGETLB_STEP MIB(64)
#define HUGETLB_TOUCHED 3

/* A page that is touched but not there would end the process. */
static bool enough_huge_pages(void)
{
	char text[8192], *total, *size;
	unsigned long bytes;

	if (read_file("/proc/meminfo", text, sizeof(text)) < 0)
		return false;
	total = strstr(text, "HugePages_Total:");
	size = strstr(text, "Hugepagesize:");
	if (!total || !size)
		return false;
	bytes = KIB(strtoul(strchr(size, ':') + 1, NULL, 10));
	return strtoul(strchr(total, ':') + 1, NULL, 10) * (bytes > HUGETLB_STEP ? bytes : HUGETLB_STEP) >=
	       HUGETLB_TOUCHED * HUGETLB_STEP;
}

static char *map_hugetlb(const char *state)
{
	int fd = open("/huge/shared", O_RDWR | O_CREAT, 0600);
	size_t i;
	char *at = NULL;

	if (!option("lab_hugepages", 0) || !enough_huge_pages())
		skip("%s: the kernel or the machine has no huge pages", state);
	else if (fd < 0)
		skip("%s: no huge page file system", state);
	else if (ftruncate(fd, GIB(1)))
		skip("%s: the file could not be made", state);
	else if (!(at = map(HUGETLB_AT, GIB(1), PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_NORESERVE | MAP_FIXED_NOREPLACE, fd)))
		skip("%s: mmap failed (errno %d)", state, errno);
	for (i = 0; i < HUGETLB_TOUCHED && at; i++)
		poke(at + i * HUGETLB_STEP);
	close(fd);
	return at;
}

static void state_hugetlb(void)
{
	char *at = map_hugetlb("hugetlb");

	if (at)
		made("hugetlb %p 1 GiB of a shared file, 3 pages touched", at);
}

/* A third process with the same file, and a fourth that has shared it and is gone. */
static void state_hugetlb_third(void)
{
	char *at = map_hugetlb("hugetlb-third");
	int child, status;

	if (!at)
		return;
	child = fork();
	if (!child) {
		poke(at);
		_exit(0);
	}
	if (child > 0 && waitpid(child, &status, 0) == child && !status)
		made("hugetlb-third %p the same file; a child that mapped it has ended", at);
}

/* Present pages without access, next to readable ones. */
static void state_prot_none(void)
{
	size_t i;
	char *at = map(NULL, 16 * page_size, PROT_READ | PROT_WRITE, ANON, -1);

	if (!at)
		return skip("prot-none: mmap failed");
	for (i = 0; i < 16; i++)
		poke(at + i * page_size);
	mprotect(at + 4 * page_size, 4 * page_size, PROT_NONE);
	mprotect(at + 10 * page_size, page_size, PROT_READ);
	mprotect(at + 12 * page_size, page_size, PROT_READ | PROT_EXEC);
	made("prot-none %p pages 4 to 7 of 16 without access", at);
}

static char *forked_area;

static void leaf(void)
{
	poke(forked_area + page_size); /* breaks the sharing of one page */
}

static void branch(void)
{
	poke(forked_area);
	spawn("leaf", leaf);
}

static void join_group(void)
{
	write_file("/cgroup/lab/cgroup.procs", "0");
}

/* A tree of processes that share pages copy-on-write; charged to a memory cgroup of its own. */
static void state_fork_tree(void)
{
	size_t i;

	join_group();
	forked_area = map_aligned(2 * TABLE_SPAN, TABLE_SPAN, PROT_READ | PROT_WRITE, ANON);
	if (!forked_area)
		return skip("fork-tree: mmap failed");
	madvise(forked_area, 2 * TABLE_SPAN, MADV_NOHUGEPAGE);
	for (i = 0; i < 32; i++)
		poke(forked_area + i * page_size);
	poke(forked_area + TABLE_SPAN);
	spawn("branch-1", branch);
	spawn("branch-2", branch);
	spawn("twig \xc3\xa9", leaf);
	made("fork-tree %p 33 pages shared copy-on-write in six processes", forked_area);
}

static void state_hostile_name(void)
{
	made("hostile-name: escape, newline and bidi bytes in the name");
}

/* Private and shared maps of files. */
static void state_files(void)
{
	char block[4096] = "lab", *at;
	int i, fd = open("/init", O_RDONLY);

	at = fd < 0 ? NULL : map(NULL, KIB(64), PROT_READ, MAP_PRIVATE, fd);
	if (!at)
		skip("file-private: /init could not be mapped");
	else {
		peek(at);
		peek(at + KIB(32));
		made("file-private %p 64 KiB of /init", at);
	}
	fd = open("/tmp/data", O_RDWR | O_CREAT, 0600);
	for (i = 0; i < 64 && fd >= 0; i++)
		if (write(fd, block, sizeof(block)) != sizeof(block))
			break;
	at = fd < 0 ? NULL : map(NULL, KIB(256), PROT_READ | PROT_WRITE, MAP_SHARED, fd);
	if (!at)
		return skip("file-shared: the tmpfs file could not be mapped");
	for (i = 0; i < 4; i++)
		poke(at + i * KIB(64));
	made("file-shared %p 256 KiB of a tmpfs file", at);
}

/* Addresses that need more levels than a process has by default. */
static void state_high(void)
{
#if defined(__s390x__)
	/* Above 4 TiB three region levels are needed, above 8 PiB four. */
	const uintptr_t hints[] = { 1UL << 42, 1UL << 53 };
#elif defined(__powerpc64__)
	const uintptr_t hints[] = { 1UL << 47, 1UL << 49 };
#else
	const uintptr_t hints[] = { 1UL << 46, 1UL << 48 };
#endif
	size_t i;

	for (i = 0; i < sizeof(hints) / sizeof(*hints); i++) {
		char *at = map((void *)(hints[i] + 3 * TABLE_SPAN), 2 * page_size,
			       PROT_READ | PROT_WRITE, ANON, -1);

		if (!at || (uintptr_t)at < hints[i]) {
			skip("high: no mapping at or above %" PRIxPTR, hints[i]);
			continue;
		}
		poke(at);
		made("high %p one page", at);
	}
}

/* Whole tables moved from one place to another. */
static void state_mremap(void)
{
	size_t i, size = 4 * TABLE_SPAN;
	char *from = map_aligned(size, TABLE_SPAN, PROT_READ | PROT_WRITE, ANON);
	char *to = map_aligned(size, TABLE_SPAN, PROT_NONE, ANON);

	if (!from || !to)
		return skip("mremap: mmap failed");
	madvise(from, size, MADV_NOHUGEPAGE);
	for (i = 0; i < 4; i++)
		poke(from + i * TABLE_SPAN + 7 * page_size);
	if (mremap(from, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		return skip("mremap: the kernel refused (errno %d)", errno);
	made("mremap %p 4 tables moved from %p", to, from);
}

static char *shared_area;

static void share_reader(void)
{
	peek(shared_area);
	peek(shared_area + page_size);
}

static void state_shmem(void)
{
	shared_area = map(NULL, KIB(256), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
	if (!shared_area)
		return skip("shmem: mmap failed");
	poke(shared_area);
	poke(shared_area + page_size);
	spawn("shmem-reader", share_reader);
	made("shmem %p 256 KiB shared by two processes", shared_area);
}

/* A child of vfork has its parent's address space until it ends or executes: it does neither. */
static void state_vfork(void)
{
	made("vfork: parent and child have one address space");
	if (!vfork()) {
		prctl(PR_SET_NAME, "vfork-child");
		list_process();
		now_ready();
		wait_for_ever();
	}
}

/* Markers in PTEs that are not present. */
static void state_guard(void)
{
	char *at = map(NULL, 16 * page_size, PROT_READ | PROT_WRITE, ANON, -1);

	if (!at)
		return skip("guard: mmap failed");
	poke(at);
	if (madvise(at + 8 * page_size, 2 * page_size, MADV_GUARD_INSTALL))
		return skip("guard: the kernel has no guard regions (errno %d)", errno);
	made("guard %p pages 8 and 9 of 16 are guard markers", at);
}

#if defined(__x86_64__)
#include <asm/ldt.h>

/* With page-table isolation a local descriptor table is mapped through tables of the process. */
static void state_ldt(void)
{
	struct user_desc entry = { .entry_number = 1, .limit = 0xfffff, .seg_32bit = 1,
				   .limit_in_pages = 1, .useable = 1 };

	if (syscall(SYS_modify_ldt, 0x11, &entry, sizeof(entry)))
		return skip("ldt: modify_ldt failed (errno %d)", errno);
	made("ldt: a local descriptor table");
}
#else
static void state_ldt(void)
{
	skip("ldt: x86 only");
}
#endif

#endif
