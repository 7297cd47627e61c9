/* Copyright (c) the ptinspect authors */
/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The report: what this guest's own kernel says about its page tables, as lines on the console.
 *
 *	@@report 1			first line, format version
 *	@section NAME [ARGUMENT]	then that section's lines, then
 *	@end N				with the number of its lines
 *	@@sum HEX			FNV-1a over every line before it, each ended with \n
 *	@@ready
 *
 * Bytes outside printable ASCII, and the backslash, are written \xNN. A line that starts with @
 * inside a section is written \x40...
 */
#ifndef LAB_REPORT_H
#define LAB_REPORT_H

#include "sys.h"

#define KPF_PGTABLE 26 /* include/uapi/linux/kernel-page-flags.h */
#define PM_PRESENT (1ULL << 63)
#define PM_SWAP (1ULL << 62)

static int report_fd = -1; /* -1: a rehearsal, nothing is written */
static uint32_t report_sum;
static unsigned long section_lines;
static char out_buf[1 << 15];
static size_t out_used;
static char file_buf[1 << 18];
static uint64_t entry_buf[4096];

static void out_flush(void)
{
	size_t done = 0;
	ssize_t n;

	while (report_fd >= 0 && done < out_used) {
		n = write(report_fd, out_buf + done, out_used - done);
		if (n < 0 && errno != EINTR && errno != EAGAIN)
			break;
		if (n > 0)
			done += n;
	}
	out_used = 0;
}

static void out_byte(unsigned char c)
{
	report_sum = (report_sum ^ c) * 16777619u;
	out_buf[out_used++] = c;
	if (out_used == sizeof(out_buf))
		out_flush();
}

static void out_line(const char *text, size_t len)
{
	static const char hex[] = "0123456789abcdef";
	size_t i;

	for (i = 0; i < len; i++) {
		unsigned char c = text[i];

		if (c == '\t')
			c = ' ';
		if (c < 0x20 || c > 0x7e || c == '\\' || (c == '@' && i == 0)) {
			out_byte('\\');
			out_byte('x');
			out_byte(hex[c >> 4]);
			out_byte(hex[c & 15]);
		} else {
			out_byte(c);
		}
	}
	out_byte('\n');
	section_lines++;
}

static void mark(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void mark(const char *format, ...)
{
	char text[256];
	va_list args;
	size_t i;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	for (i = 0; text[i]; i++)
		out_byte(text[i]);
	out_byte('\n');
}

static void line(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void line(const char *format, ...)
{
	char text[1024];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	out_line(text, strlen(text));
}

static void section(const char *name, const char *argument)
{
	mark("@section %s%s%s", name, argument ? " " : "", argument ? argument : "");
	section_lines = 0;
}

static void section_end(void)
{
	mark("@end %lu", section_lines);
}

/* A file of the kernel, line by line; with keep, only the lines that contain it. */
static void report_file(const char *name, const char *path, const char *keep)
{
	size_t start = 0, used = 0, i;
	ssize_t n;
	int fd = open(path, O_RDONLY);

	if (fd < 0)
		return;
	section(name, path);
	while ((n = read(fd, file_buf + used, sizeof(file_buf) - 1 - used)) > 0) {
		used += n;
		for (start = i = 0; i < used; i++) {
			if (file_buf[i] != '\n')
				continue;
			file_buf[i] = 0;
			if (!keep || strstr(file_buf + start, keep))
				out_line(file_buf + start, i - start);
			start = i + 1;
		}
		memmove(file_buf, file_buf + start, used - start);
		used -= start;
	}
	if (used)
		out_line(file_buf, used);
	close(fd);
	section_end();
}

static long vmstat_value(const char *name)
{
	size_t len = strlen(name);
	char *at;

	if (read_file("/proc/vmstat", file_buf, sizeof(file_buf)) < 0)
		return -1;
	for (at = file_buf; at && *at; at = strchr(at, '\n') ? strchr(at, '\n') + 1 : NULL)
		if (!strncmp(at, name, len) && at[len] == ' ')
			return atol(at + len);
	return -1;
}

/* Pages that /proc/kpageflags calls page tables; listed as ranges when asked for. */
static unsigned long kpageflags(bool list)
{
	unsigned long pfn = 0, count = 0, run = 0;
	int fd = open("/proc/kpageflags", O_RDONLY);
	ssize_t n;
	size_t i;

	if (fd < 0)
		return 0;
	while ((n = read(fd, entry_buf, sizeof(entry_buf))) > 0) {
		for (i = 0; i < n / sizeof(uint64_t); i++, pfn++) {
			if (entry_buf[i] >> KPF_PGTABLE & 1) {
				count++;
				run++;
			} else if (run) {
				if (list)
					line("%lx %lu", pfn - run, run);
				run = 0;
			}
		}
	}
	if (run && list)
		line("%lx %lu", pfn - run, run);
	close(fd);
	return count;
}

/* One mapping: how many pages the kernel calls present, and some of its entries, raw. */
static void report_mapping(int fd, unsigned long start, unsigned long end)
{
	const unsigned long max_scan = GIB(4) / 4096;
	unsigned long pages = (end - start) / page_size, scan = pages, present = 0, swapped = 0;
	unsigned long nonzero = 0, seen = 0, step, at, i, want;
	int pass;

	if (scan > max_scan)
		scan = max_scan;
	for (pass = 0; pass < 2; pass++) {
		step = pass ? (nonzero + 15) / 16 : 0;
		for (at = 0; at < scan; at += want) {
			ssize_t n;

			want = scan - at;
			if (want > sizeof(entry_buf) / 8)
				want = sizeof(entry_buf) / 8;
			n = pread(fd, entry_buf, want * 8, (start / page_size + at) * 8);
			if (n != (ssize_t)(want * 8))
				return;
			for (i = 0; i < want; i++) {
				unsigned long page = at + i;
				uint64_t entry = entry_buf[i];

				if (!pass) {
					present += !!(entry & PM_PRESENT);
					swapped += !!(entry & PM_SWAP);
					nonzero += !!entry;
				} else if ((entry && seen++ % step == 0) || !page ||
					   page == scan - 1) {
					line("page %lx %" PRIx64, start + page * page_size, entry);
				}
			}
		}
		if (!pass)
			line("mapping %lx %lx scanned %lu present %lu swapped %lu", start, end,
			     scan, present, swapped);
	}
}

static void report_pagemap(int pid)
{
	/* A copy, since the file buffer serves other files too. */
	static char maps[1 << 16];
	char path[64], pid_text[16], *at;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/maps", pid);
	if (read_file(path, maps, sizeof(maps)) < 0)
		return;
	snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	fd = open(path, O_RDONLY);
	if (fd < 0)
		return;
	snprintf(pid_text, sizeof(pid_text), "%d", pid);
	section("pagemap", pid_text);
	for (at = maps; at && *at; at = strchr(at, '\n') ? strchr(at, '\n') + 1 : NULL) {
		unsigned long start, end;

		if (sscanf(at, "%lx-%lx", &start, &end) == 2)
			report_mapping(fd, start, end);
	}
	section_end();
	close(fd);
}

static void report_process(int pid)
{
	static const char *const files[] = { "status", "maps", "smaps_rollup" };
	char path[64], hex[64];
	size_t i, used;
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/%d/comm", pid);
	n = read_file(path, file_buf, sizeof(file_buf));
	if (n < 0)
		return;
	/* The name as bytes: "status" writes some of them escaped. The last one is comm's \n. */
	for (i = used = 0; (ssize_t)i < n - 1 && used < sizeof(hex) - 3; i++)
		used += snprintf(hex + used, sizeof(hex) - used, "%02x",
				 (unsigned char)file_buf[i]);
	section("process", NULL);
	line("pid %d", pid);
	line("comm %s", hex);
	section_end();
	for (i = 0; i < sizeof(files) / sizeof(*files); i++) {
		snprintf(path, sizeof(path), "/proc/%d/%s", pid, files[i]);
		report_file(files[i], path, NULL);
	}
	report_pagemap(pid);
}

#endif
