/* Copyright (c) the ptinspect authors */
/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The heavy load (lab_load=2): some workers, each of which again and again lets a child do one thing
 * that makes, changes, moves or frees page tables. What a kernel or machine lacks fails in silence.
 */
#ifndef LAB_LOAD_H
#define LAB_LOAD_H

#include "gmap.h"

#include <sys/resource.h>
#include <sys/swap.h>

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef FALLOC_FL_KEEP_SIZE
#define FALLOC_FL_KEEP_SIZE 1
#define FALLOC_FL_PUNCH_HOLE 2
#endif

#define WORKERS 4

static uint32_t load_seed;

/* xorshift: the same seed, the same sequence in each worker. */
static uint32_t chance(uint32_t below)
{
	load_seed ^= load_seed << 13;
	load_seed ^= load_seed >> 17;
	load_seed ^= load_seed << 5;
	return load_seed % below;
}

static void poke_all(char *at, size_t size, size_t step)
{
	size_t i;

	for (i = 0; i < size; i += step)
		poke(at + i);
}

static char *small_pages(size_t size)
{
	char *at = map_aligned(size, TABLE_SPAN, PROT_READ | PROT_WRITE, ANON);

	if (!at)
		_exit(1);
	madvise(at, size, MADV_NOHUGEPAGE);
	return at;
}

static size_t load_huge; /* bytes of a huge page; 0: none */

static char *huge_pages(int count)
{
	char *at = map_aligned(count * load_huge, load_huge, PROT_READ | PROT_WRITE, ANON);

	if (!at)
		_exit(1);
	madvise(at, count * load_huge, MADV_HUGEPAGE);
	poke_all(at, count * load_huge, load_huge);
	return at;
}

static void execute(const char *what)
{
	execl("/init", "/init", what, NULL);
	_exit(1);
}

/* A family that shares pages; some of it end before their parents, some execute. */
static void load_fork(void)
{
	char *at = small_pages(3 * TABLE_SPAN);
	int i, pid;

	poke_all(at, 3 * TABLE_SPAN, TABLE_SPAN / 4);
	for (i = 0; i < 4; i++) {
		pid = i == 3 ? vfork() : fork();
		if (pid)
			continue;
		if (i >= 2)
			execute("load-nothing");
		poke_all(at, 3 * TABLE_SPAN, TABLE_SPAN / 2);
		if (i && !fork())
			poke_all(at, TABLE_SPAN, page_size);
		_exit(0);
	}
}

static void load_map(void)
{
	size_t size = 8 * TABLE_SPAN;
	int i;

	for (i = 0; i < 12; i++) {
		char *at = small_pages(size);

		poke_all(at, size, TABLE_SPAN);
		madvise(at, TABLE_SPAN, MADV_DONTNEED);
		mprotect(at + 2 * TABLE_SPAN, page_size, i % 2 ? PROT_NONE : PROT_READ);
		munmap(at + 3 * TABLE_SPAN, 2 * TABLE_SPAN);
		/* Half of them stay until the process ends. */
		if (i % 2)
			munmap(at, size);
	}
}

/* Huge pages: split in several ways, moved, shared by a child, collapsed. */
static void load_thp(void)
{
	char *at = huge_pages(6), *to;
	int pid;

	madvise(at + 3 * page_size, 4 * page_size, MADV_DONTNEED);
	mprotect(at + load_huge + page_size, page_size, PROT_READ);
	munmap(at + 2 * load_huge + page_size, page_size);
	to = map_aligned(load_huge, load_huge, PROT_NONE, ANON);
	if (to)
		mremap(at + 3 * load_huge, load_huge, load_huge, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	pid = fork();
	if (!pid) {
		poke(at + 4 * load_huge + page_size);
		_exit(0);
	}
	poke(at + 5 * load_huge);
	madvise(at, load_huge, MADV_COLLAPSE);
	madvise(at + 4 * load_huge, load_huge, MADV_PAGEOUT);
	peek(at + 4 * load_huge);
	waitpid(pid, NULL, 0);
}

/* Small pages that khugepaged may put together while they are used. */
static void load_khugepaged(void)
{
	char *at = small_pages(2 * load_huge);
	int i;

	poke_all(at, 2 * load_huge, page_size);
	madvise(at, 2 * load_huge, MADV_HUGEPAGE);
	for (i = 0; i < 40; i++) {
		sleep_ms(20);
		poke(at + chance(2 * load_huge));
	}
	madvise(at + page_size, page_size, MADV_DONTNEED);
}

/* Whole tables, whole PMD tables and single pages, there and back. */
static void load_mremap(void)
{
	static char *const places[] = { (char *)GIB(96), (char *)GIB(104) };
	size_t size = GIB(1) + 2 * TABLE_SPAN;
	char *at = map(places[0], size, PROT_READ | PROT_WRITE,
		       ANON | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1);
	int i;

	if (!at)
		_exit(1);
	madvise(at, size, MADV_NOHUGEPAGE);
	poke_all(at, size, 64 * TABLE_SPAN);
	for (i = 0; i < 20; i++) {
		char *to = places[!(i % 2)] + (i % 3 ? 0 : page_size);

		at = mremap(at, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to);
		if (at == MAP_FAILED)
			_exit(1);
		poke(at + chance(16) * 64 * TABLE_SPAN);
	}
}

/* A shared GiB whose PMD table is everybody's, with pages punched out under the others. */
static void load_hugetlb(void)
{
	int fd = open("/huge/load", O_RDWR | O_CREAT, 0600), pid;
	char *at;

	if (!option("lab_hugepages", 0) || fd < 0 || ftruncate(fd, GIB(1)))
		_exit(1);
	at = map(HUGETLB_AT, GIB(1), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd);
	if (!at)
		_exit(1);
	/* Where no page is left the touch ends the child. */
	poke(at);
	pid = fork();
	if (!pid) {
		poke(at);
		munmap(at + MIB(512), MIB(256));
		_exit(0);
	}
	sleep_ms(chance(50));
	mprotect(at, MIB(64), PROT_READ);
	if (!chance(3))
		fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, GIB(1));
	waitpid(pid, NULL, 0);
}

static void load_swap(void)
{
	char *at = small_pages(TABLE_SPAN);
	int i, pid;

	for (i = 0; i < 4; i++) {
		poke_all(at, TABLE_SPAN, page_size);
		madvise(at, TABLE_SPAN, MADV_PAGEOUT);
		pid = fork();
		if (!pid) {
			poke_all(at, TABLE_SPAN, 3 * page_size);
			_exit(0);
		}
		poke_all(at, TABLE_SPAN / 2, page_size);
		waitpid(pid, NULL, 0);
	}
}

/* Tables charged to one cgroup, then moved to another; the first may go with tables charged to it. */
static void load_memcg(void)
{
	char one[64], file[96];
	char *at;

	snprintf(one, sizeof(one), "/cgroup/load-%d", getpid());
	mkdir(one, 0755);
	snprintf(file, sizeof(file), "%s/cgroup.procs", one);
	write_file(file, "0");
	at = small_pages(8 * TABLE_SPAN);
	poke_all(at, 8 * TABLE_SPAN, TABLE_SPAN);
	write_file("/cgroup/lab/cgroup.procs", "0");
	rmdir(one);
	sleep_ms(chance(100));
	munmap(at, 4 * TABLE_SPAN);
}

static void load_ksm(void)
{
	char *at = small_pages(TABLE_SPAN);
	int i;

	for (i = 0; i < 3; i++) {
		memset(at, 7, TABLE_SPAN);
		madvise(at, TABLE_SPAN, MADV_MERGEABLE);
		sleep_ms(300);
		poke_all(at, TABLE_SPAN / 2, page_size);
		if (i == 1)
			madvise(at, TABLE_SPAN, MADV_UNMERGEABLE);
	}
}

static void on_cpu(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof(set), &set);
}

/* Memory that is used from one node, then from the other; and pages moved by hand. */
static void load_numa(void)
{
	char *at = chance(2) && load_huge ? huge_pages(2) : small_pages(2 * TABLE_SPAN);
	void *pages[64];
	int nodes[64], status[64], round, i;

	for (round = 0; round < 12; round++) {
		on_cpu(round % 2);
		for (i = 0; i < 20; i++) {
			poke_all(at, TABLE_SPAN, page_size);
			sleep_ms(2);
		}
		for (i = 0; i < 64; i++) {
			pages[i] = at + i * page_size;
			nodes[i] = round % 2;
		}
		syscall(SYS_move_pages, 0, 64UL, pages, nodes, status, 2 /* MPOL_MF_MOVE */);
	}
}

/* One of the modules that init loaded goes, if nobody uses it, and comes again. */
static void load_module(void)
{
	char order[4096], path[300], name[128], *file = order, *next;
	int fd, count = 0;

	if (read_file("/modules/order", order, sizeof(order)) <= 0)
		_exit(1);
	for (next = order; *next; next++)
		count += *next == '\n';
	for (count = chance(count); count; count--)
		file = strchr(file, '\n') + 1;
	file[strcspn(file, "\n")] = 0;
	/* NN-NAME.ko */
	snprintf(path, sizeof(path), "/modules/%.200s", file);
	snprintf(name, sizeof(name), "%.100s", file + strcspn(file, "-") + 1);
	name[strcspn(name, ".")] = 0;
	syscall(SYS_delete_module, name, O_NONBLOCK);
	fd = open(path, O_RDONLY);
	if (fd >= 0)
		syscall(SYS_finit_module, fd, "", 0);
}

static void *rest(void *unused)
{
	sleep_ms(5);
	return unused;
}

/*
 * The kernel's own tables: many stacks (small pages of the vmalloc area), and tables of open files
 * that are so large that they get huge pages there, in place of the tables that the stacks had.
 */
static void many_stacks(int count)
{
	pthread_t threads[800];
	pthread_attr_t attr;
	int i, made = 0;

	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, KIB(256));
	for (i = 0; i < count; i++)
		made += !pthread_create(&threads[made], &attr, rest, NULL);
	for (i = 0; i < made; i++)
		pthread_join(threads[i], NULL);
}

static void large_tables(int count)
{
	int i, pid;

	for (i = 0; i < count; i++) {
		pid = fork();
		if (!pid) {
			dup2(1, (1 << 20) - 1);
			_exit(0);
		}
		waitpid(pid, NULL, 0);
	}
}

static bool many_files(void)
{
	struct rlimit most = { 1 << 20, 1 << 20 };

	return !setrlimit(RLIMIT_NOFILE, &most);
}

static void load_kernel(void)
{
	if (many_files()) {
		many_stacks(200);
		large_tables(4);
	}
}

/*
 * lab_load=3: frees tables of the kernel and then keeps their CPU from everything else for a while,
 * so that who would free them later has to wait.
 */
static void keep_freeing(void)
{
	struct sched_param first = { 1 }, plain = { 0 };
	struct timespec now;
	long long end;

	many_files();
	on_cpu(1);
	printf("@@begun\n");
	for (;;) {
		many_stacks(800);
		/* So much that addresses are given back (lazy_max_pages() in mm/vmalloc.c). */
		large_tables(10);
		write_file("/proc/sys/vm/drop_caches", "2");
		sched_setscheduler(0, SCHED_FIFO, &first);
		large_tables(3);
		clock_gettime(CLOCK_MONOTONIC, &now);
		end = now.tv_sec * 1000LL + now.tv_nsec / 1000000 + 300;
		while (now.tv_sec * 1000LL + now.tv_nsec / 1000000 < end)
			clock_gettime(CLOCK_MONOTONIC, &now);
		sched_setscheduler(0, SCHED_OTHER, &plain);
		sleep_ms(50);
	}
}

static void load_gmap(void)
{
	if (access("/dev/kvm", F_OK))
		_exit(1);
	execute(chance(2) ? "load-gmap" : "load-gmap-shadow");
}

static void load_compact(void)
{
	write_file("/proc/sys/vm/compact_memory", "1");
	write_file("/proc/sys/vm/drop_caches", "3");
}

static const struct {
	void (*load)(void);
	unsigned int weight;
	bool huge;
} loads[] = {
	{ load_fork, 6, false },   { load_map, 6, false },     { load_thp, 6, true },
	{ load_khugepaged, 3, true }, { load_mremap, 4, false }, { load_hugetlb, 4, false },
	{ load_swap, 4, false },   { load_memcg, 4, false },   { load_ksm, 2, false },
	{ load_numa, 3, false },   { load_module, 1, false },  { load_kernel, 4, false },
	{ load_gmap, 3, false },   { state_high, 2, false },   { state_ldt, 1, false },
	{ state_sparse, 2, false }, { load_compact, 1, false },
};

static void load_for_ever(unsigned int worker)
{
	unsigned int all = 0, pick;
	size_t i;
	int pid;

	load_seed = option("lab_seed", 1) * 2654435761u ^ (worker + 1) * 40503u;
	load_seed += !load_seed;
	for (i = 0; i < sizeof(loads) / sizeof(*loads); i++)
		all += loads[i].weight;
	for (;;) {
		pick = chance(all);
		for (i = 0; pick >= loads[i].weight; i++)
			pick -= loads[i].weight;
		ledger->count = 0;
		if (loads[i].huge && !load_huge)
			continue;
		chance(2); /* the child goes on from another place than its parent */
		pid = fork();
		if (!pid) {
			loads[i].load();
			_exit(0);
		}
		if (pid < 0)
			sleep_ms(20);
		/* Now and then the next one begins before this one ends. */
		else if (chance(4))
			waitpid(pid, NULL, 0);
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}

/* A RAM disk (or any block device that the modules made) to swap to. */
static void swap_on(void)
{
	static const char *const devices[] = { "/dev/zram0", "/dev/ram0" };
	char *header = calloc(1, page_size);
	uint32_t *words = (uint32_t *)(header + 1024);
	long long bytes;
	size_t i;
	int fd;

	for (i = 0; header && i < sizeof(devices) / sizeof(*devices); i++) {
		fd = open(devices[i], O_RDWR);
		if (fd < 0)
			continue;
		bytes = lseek(fd, 0, SEEK_END);
		words[0] = 1; /* version of the header: include/linux/swap.h, union swap_header */
		words[1] = bytes / page_size - 1;
		memcpy(header + page_size - 10, "SWAPSPACE2", 10);
		if (bytes > 0 && pwrite(fd, header, page_size, 0) == (ssize_t)page_size &&
		    !fsync(fd) && !swapon(devices[i], 0))
			printf("@@swap %s\n", devices[i]);
		close(fd);
	}
	free(header);
}

static void keep_loading_all(void)
{
	static const struct {
		const char *path, *text;
	} settings[] = {
		{ "/sys/kernel/mm/transparent_hugepage/enabled", "always" },
		{ "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs", "20" },
		{ "/sys/kernel/mm/transparent_hugepage/khugepaged/alloc_sleep_millisecs", "20" },
		{ "/sys/kernel/mm/transparent_hugepage/khugepaged/pages_to_scan", "8192" },
		{ "/sys/kernel/mm/ksm/sleep_millisecs", "20" },
		{ "/sys/kernel/mm/ksm/pages_to_scan", "1000" },
		{ "/sys/kernel/mm/ksm/run", "1" },
		{ "/sys/kernel/debug/sched/numa_balancing/scan_delay_ms", "50" },
		{ "/sys/kernel/debug/sched/numa_balancing/scan_period_min_ms", "50" },
		{ "/sys/kernel/debug/sched/numa_balancing/scan_period_max_ms", "200" },
		{ "/proc/sys/kernel/numa_balancing", "1" },
		{ "/proc/sys/vm/compaction_proactiveness", "60" },
		{ "/proc/sys/vm/stat_interval", "1" },
		{ "/proc/sys/vm/allocate_pgste", "1" },
	};
	char text[64];
	unsigned int worker;
	size_t i;

	for (i = 0; i < sizeof(settings) / sizeof(*settings); i++)
		write_file(settings[i].path, settings[i].text);
	if (read_file("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", text, sizeof(text)) > 0)
		load_huge = strtoul(text, NULL, 10);
	if (load_huge > MIB(4))
		load_huge = 0;
	swap_on();
	printf("@@begun\n");
	for (worker = 0; worker < WORKERS; worker++)
		if (!fork())
			load_for_ever(worker);
	for (;;)
		if (waitpid(-1, NULL, 0) < 0)
			sleep_ms(100);
}

#endif
