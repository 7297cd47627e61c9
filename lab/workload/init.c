/* Copyright (c) the ptinspect authors */
/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The first process of a lab guest: loads the modules it was given, makes page tables of every
 * interesting kind in processes of their own, waits until nothing moves any more, and writes on the
 * console what this kernel itself says about them (report.h). Then it does nothing at all, so that
 * the host can stop the guest and dump exactly the state that was reported.
 *
 * Words of the kernel command line that it knows (init gets them as environment):
 *	lab_sparse=N	sparse tables to make (48)
 *	lab_hugepages=N	huge pages for hugetlb (4)
 *	lab_load=1	after the report, keep forking, mapping and exiting for ever
 *	lab_load=2	the same with everything that changes page tables (load.h)
 *	lab_load=3	after the report, keep freeing tables of the kernel's own
 *	lab_seed=N	where the random choices of lab_load=2 begin
 *	lab_contend=N	after the report, N threads want the lock of one table for ever
 *	lab_mortal=N	after the report, N processes that each end when the host clears a byte in them
 *	lab_scatter=1	the sparse tables lie apart from each other, in another order than their addresses
 *	lab_quiet=1	no report: for measurements with very many tables
 *	lab_idle=1	only load modules, mount, and say @@ready
 */
#include "gmap.h"
#include "load.h"
#include "report.h"
#include "states.h"

static void mount_all(void)
{
	static const struct {
		const char *type, *at;
	} mounts[] = {
		{ "proc", "/proc" },	   { "sysfs", "/sys" },	      { "devtmpfs", "/dev" },
		{ "tmpfs", "/tmp" },	   { "hugetlbfs", "/huge" },  { "cgroup2", "/cgroup" },
		{ "debugfs", "/sys/kernel/debug" },
	};
	size_t i;

	for (i = 0; i < sizeof(mounts) / sizeof(*mounts); i++) {
		mkdir(mounts[i].at, 0755);
		/* What the kernel lacks shows later, as a state or a section that is missing. */
		mount(mounts[i].type, mounts[i].at, mounts[i].type, 0, NULL);
	}
}

/* Loads /modules/NAME for each line of /modules/order. */
static void load_modules(void)
{
	char order[4096], path[300], *name, *save = NULL;
	int fd;

	if (read_file("/modules/order", order, sizeof(order)) < 0)
		return;
	for (name = strtok_r(order, "\n", &save); name; name = strtok_r(NULL, "\n", &save)) {
		snprintf(path, sizeof(path), "/modules/%s", name);
		fd = open(path, O_RDONLY);
		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
			printf("@@error module %s: errno %d\n", name, errno);
		close(fd);
	}
}

static void make_states(void)
{
	int child;

	spawn("sparse", state_sparse);
	spawn("emptied", state_emptied);
	spawn("thp", state_thp);
	spawn("hugetlb-a", state_hugetlb);
	spawn("hugetlb-b", state_hugetlb);
	spawn("hugetlb-c", state_hugetlb_third);
	spawn("thp-moved", state_thp_moved);
	spawn("reclaimed", state_reclaimed);
	spawn("prot-none", state_prot_none);
	spawn("fork-tree", state_fork_tree);
	spawn("\x1b[31mred\nrow\xe2\x80\xae", state_hostile_name);
	spawn("files", state_files);
	spawn("high", state_high);
	spawn("mremap", state_mremap);
	spawn("shmem-writer", state_shmem);
	spawn("vfork-parent", state_vfork);
	spawn("guard", state_guard);
	spawn("ldt", state_ldt);
	spawn("contiguous", state_64k);
	spawn("halves", state_halves);
	/* One that has ended but that nobody waited for: a task without an address space. */
	child = fork();
	if (!child)
		_exit(0);
}

static const struct {
	const char *name;
	void (*state)(void);
} gmap_states[] = {
	{ "gmap", state_gmap },
	{ "gmap-twin", state_gmap_twin },
	{ "gmap-shadow", state_gmap_shadow },
	{ "gmap-user", state_gmap_user },
};

/*
 * s390 before 7.0: only a program that was executed while this is set can have guests. The file is
 * gone since then, and any program can.
 */
static void make_gmaps(char *self)
{
	char path[32];
	size_t i;

	if (access("/dev/kvm", F_OK)) {
		skip("gmap: no /dev/kvm");
		return;
	}
	write_file("/proc/sys/vm/allocate_pgste", "1");
	for (i = 0; i < sizeof(gmap_states) / sizeof(*gmap_states); i++) {
		int ready = ledger->ready, waited, pid = fork();

		if (!pid) {
			snprintf(path, sizeof(path), "%s", gmap_states[i].name);
			execl(self, self, path, NULL);
			_exit(1);
		}
		for (waited = 0; ledger->ready <= ready && waited < 5000; waited += 5)
			sleep_ms(5);
	}
	write_file("/proc/sys/vm/allocate_pgste", "0");
}

/* Tables made after the counters were folded: each CPU then holds a remainder of its own. */
static void late_on_cpu(int cpu, int pages)
{
	/* With 64K pages ppc64 has 256 tables in a page. */
	int tables = pages * (page_size / (TABLE_SPAN / page_size * 8));
	size_t size = tables * TABLE_SPAN;
	char *at = map_aligned(size, TABLE_SPAN, PROT_READ, ANON | MAP_NORESERVE);
	cpu_set_t set;
	int i;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (!at || sched_setaffinity(0, sizeof(set), &set))
		return;
	madvise(at, size, MADV_NOHUGEPAGE);
	for (i = 0; i < tables; i++)
		peek(at + i * TABLE_SPAN);
}

/*
 * The kernel's own movers of pages are stopped for good: what is looked at long after the report
 * still has to be what was reported. What a kernel lacks cannot be written, and need not be.
 */
static void stop_movers(void)
{
	static const struct {
		const char *path, *text;
	} settings[] = {
		/*
		 * khugepaged ends when no huge page may be made any more (mm/khugepaged.c,
		 * start_stop_khugepaged); huge pages that are there stay. Writing its sleep or scan
		 * settings would only wake it up for another pass.
		 */
		{ "/sys/kernel/mm/transparent_hugepage/shmem_enabled", "never" },
		{ "/sys/kernel/mm/transparent_hugepage/enabled", "never" },
		{ "/sys/kernel/mm/ksm/run", "0" },
		{ "/proc/sys/kernel/numa_balancing", "0" },
		{ "/proc/sys/vm/compaction_proactiveness", "0" },
	};
	size_t i;

	for (i = 0; i < sizeof(settings) / sizeof(*settings); i++)
		write_file(settings[i].path, settings[i].text);
}

static unsigned long reported_flags;

static void report_counters(long folded, unsigned long folded_flags)
{
	section("counters", NULL);
	line("page_size %zu", page_size);
	line("table_span %zu", TABLE_SPAN);
	line("cpus %ld", sysconf(_SC_NPROCESSORS_ONLN));
	/* Right after stat_refresh: the global counter is then exact. */
	line("nr_page_table_pages_folded %ld", folded);
	line("kpageflags_pgtable_folded %lu", folded_flags);
	/* Now: the global counter without what each CPU has not added yet. */
	line("nr_page_table_pages_now %ld", vmstat_value("nr_page_table_pages"));
	reported_flags = kpageflags(false);
	line("kpageflags_pgtable_now %lu", reported_flags);
	section_end();
}

static void report_files(void)
{
	static const char *const whole[] = {
		"/proc/version",
		"/proc/cmdline",
		"/proc/meminfo",
		"/proc/vmstat",
		"/proc/zoneinfo",
		"/proc/iomem",
		"/sys/kernel/mm/transparent_hugepage/enabled",
		"/sys/kernel/debug/page_tables/kernel",
		"/sys/kernel/debug/page_tables/current_kernel",
		"/sys/kernel/debug/page_tables/current_user",
		"/sys/kernel/debug/page_tables/efi",
		"/sys/kernel/debug/kernel_page_tables",
	};
	char path[96];
	size_t i;

	for (i = 0; i < sizeof(whole) / sizeof(*whole); i++)
		report_file("file", whole[i], NULL);
	for (i = 0; i < 8; i++) {
		snprintf(path, sizeof(path), "/sys/devices/system/node/node%zu/vmstat", i);
		report_file("file", path, "nr_");
	}
	report_file("file", "/cgroup/memory.stat", NULL);
	report_file("file", "/cgroup/lab/memory.stat", NULL);
}

static void report(int fd, long folded, unsigned long folded_flags)
{
	char pid[16];
	int i;

	report_fd = fd;
	report_sum = 2166136261u;
	out_used = 0;
	mark("@@report 1");
	report_counters(folded, folded_flags);
	section("notes", NULL);
	for (i = 0; i < ledger->count; i++)
		line("%d %s", ledger->notes[i].pid, ledger->notes[i].text);
	section_end();
	report_files();
	section("pgtable_pfns", NULL);
	kpageflags(true);
	section_end();
	snprintf(pid, sizeof(pid), "%d", getpid());
	report_process(getpid());
	for (i = 0; i < ledger->pids; i++)
		report_process(ledger->pid[i]);
	mark("@@sum %08x", report_sum);
	out_flush();
	report_fd = -1;
}

static void keep_loading(void)
{
	for (;;) {
		int pid = fork();

		if (!pid) {
			state_sparse();
			state_mremap();
			ledger->count = 0;
			_exit(0);
		}
		waitpid(pid, NULL, 0);
	}
}

/* mincore() has the lock of a table for as long as it looks at its entries. */
static void *contend(void *at)
{
	static unsigned char seen[TABLE_SPAN / 4096];

	for (;;)
		mincore(at, TABLE_SPAN, seen);
	return NULL;
}

static void keep_contending(unsigned long threads)
{
	char *at = map_aligned(TABLE_SPAN, TABLE_SPAN, PROT_READ, ANON | MAP_NORESERVE);
	pthread_t thread;
	size_t i;

	prctl(PR_SET_NAME, "contend");
	madvise(at, TABLE_SPAN, MADV_NOHUGEPAGE);
	for (i = 0; i < TABLE_SPAN; i += page_size)
		peek(at + i);
	printf("@@contended %p\n@@begun\n", at);
	for (i = 1; i < threads; i++)
		pthread_create(&thread, NULL, contend, at);
	contend(at);
}

/* Four tables with a page each. The host writes into the memory of the guest, the first page here. */
static void state_mortal(void)
{
	char *at = map_aligned(4 * TABLE_SPAN, TABLE_SPAN, PROT_READ | PROT_WRITE, ANON);
	size_t i;

	madvise(at, 4 * TABLE_SPAN, MADV_NOHUGEPAGE);
	for (i = 0; i < 4; i++)
		poke(at + i * TABLE_SPAN);
	printf("@@mortal %p\n", at);
	now_ready();
	while (*(volatile char *)at)
		sleep_ms(100);
	_exit(0);
}

static void keep_mortals(unsigned long number)
{
	char name[16];
	unsigned long i;

	for (i = 0; i < number; i++) {
		snprintf(name, sizeof(name), "mortal-%lu", i);
		spawn(name, state_mortal);
	}
	printf("@@begun\n");
}

int main(int argc, char **argv)
{
	unsigned long flags, attempt;
	char huge[16];
	long folded;

	page_size = sysconf(_SC_PAGESIZE);
	if (argc > 1 && !strcmp(argv[1], "load-nothing"))
		return 0;
	if (argc > 1 && getpid() != 1) {
		/* Executed again by make_gmaps(): the ledger is a file that both map. */
		int fd = open("/tmp/ledger", O_RDWR);

		ledger = mmap(NULL, sizeof(*ledger), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (ledger == MAP_FAILED)
			return 1;
		prctl(PR_SET_NAME, argv[1]);
		if (!strncmp(argv[1], "load-", 5)) {
			ledger->count = 0;
			if (strcmp(argv[1], "load-gmap"))
				state_gmap_shadow();
			else
				state_gmap();
			return 0;
		}
		list_process();
		for (size_t i = 0; i < sizeof(gmap_states) / sizeof(*gmap_states); i++)
			if (!strcmp(argv[1], gmap_states[i].name))
				gmap_states[i].state();
		now_ready();
		wait_for_ever();
	}
	mount_all();
	load_modules();
	setvbuf(stdout, NULL, _IONBF, 0);
	/* From here on the console is the report's. */
	write_file("/proc/sys/kernel/printk", "1 1 1 1");
	if (option("lab_idle", 0)) {
		printf("@@ready\n");
		wait_for_ever();
	}
	{
		int fd = open("/tmp/ledger", O_RDWR | O_CREAT, 0600);

		if (fd < 0 || ftruncate(fd, sizeof(*ledger)))
			printf("@@error the ledger could not be made: errno %d\n", errno);
		ledger = mmap(NULL, sizeof(*ledger), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (ledger == MAP_FAILED)
			printf("@@error the ledger could not be mapped: errno %d\n", errno);
		close(fd);
	}
	sparse_tables = option("lab_sparse", sparse_tables);
	sparse_scattered = option("lab_scatter", 0);
	snprintf(huge, sizeof(huge), "%lu", option("lab_hugepages", 0));
	if (option("lab_hugepages", 0))
		write_file("/proc/sys/vm/nr_hugepages", huge);
	/* Below 512 MiB the kernel switches transparent huge pages off (mm/huge_memory.c). */
	write_file("/sys/kernel/mm/transparent_hugepage/enabled", "always");
	write_file("/sys/kernel/mm/transparent_hugepage/defrag", "always");
	write_file("/sys/kernel/mm/transparent_hugepage/use_zero_page", "1");
	mkdir("/cgroup/lab", 0755);
	write_file("/cgroup/cgroup.subtree_control", "+memory");
	write_file("/proc/sys/vm/compact_memory", "1");

	make_states();
	make_gmaps(argv[0]);

	/* Nothing may move any more: no write-back, no folding of counters, no exits under way. */
	stop_movers();
	sync();
	write_file("/proc/sys/vm/drop_caches", "3");
	write_file("/proc/sys/vm/stat_interval", "100000");
	if (!option("lab_quiet", 0))
		report(-1, 0, 0); /* the rehearsal: buffers and kernel tables that a report needs are made */
	for (attempt = 0; attempt < 5 && !option("lab_quiet", 0); attempt++) {
		sleep_ms(1500);
		write_file("/proc/sys/vm/stat_refresh", "1");
		folded = vmstat_value("nr_page_table_pages");
		flags = kpageflags(false);
		if (!attempt) {
			late_on_cpu(0, 2);
			late_on_cpu(1, 3);
		}
		if (attempt)
			note("made repeat: the page tables moved during a report");
		report(STDOUT_FILENO, folded, flags);
		/* The same as at the start of the report, or it described two states. */
		if (kpageflags(false) == reported_flags)
			break;
	}
	printf("@@ready\n");
	if (option("lab_load", 0) == 3)
		keep_freeing();
	if (option("lab_load", 0) == 2)
		keep_loading_all();
	if (option("lab_load", 0))
		keep_loading();
	if (option("lab_contend", 0))
		keep_contending(option("lab_contend", 0));
	if (option("lab_mortal", 0))
		keep_mortals(option("lab_mortal", 0));
	wait_for_ever();
	return 0;
}
