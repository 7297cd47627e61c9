// SPDX-License-Identifier: LGPL-2.1-or-later
// Copyright (c) the ptinspect authors
/*
 * A driver with a bug in page tables, for the crash that docs/panic.md looks into.
 *
 * It gives a process's empty PTE table back to the kernel, with all the accounting, but leaves the
 * PMD entry that leads to it. Then it takes memory for a ring of descriptors, and gets that very
 * page. The next access of the process makes the CPU walk through the ring.
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/pid.h>
#include <linux/sched/mm.h>
#include <asm/pgalloc.h>

struct descriptor {
	u32 flags;
	u32 length;
	void *ring;
};

#define OWNED_BY_DEVICE 1
#define DESCRIPTORS (PAGE_SIZE / sizeof(struct descriptor))
/* Pages that may come before the wanted one: what other CPUs or interrupts left behind. */
#define MOST_PAGES 64

static struct ring {
	struct descriptor *descriptors;
} ring;

static struct page *pages[MOST_PAGES];

static int pid;
module_param(pid, int, 0);
static unsigned long address;
module_param(address, ulong, 0);

static pmd_t *find_pmd(struct mm_struct *mm, unsigned long at)
{
	pgd_t *pgd = pgd_offset(mm, at);
	p4d_t *p4d = pgd_none(*pgd) ? NULL : p4d_offset(pgd, at);
	pud_t *pud = !p4d || p4d_none(*p4d) ? NULL : pud_offset(p4d, at);

	return !pud || pud_none(*pud) ? NULL : pmd_offset(pud, at);
}

/* The bug: pmd_clear() and the flush of the TLB are missing. */
static struct page *reclaim_table(struct mm_struct *mm, unsigned long at)
{
	pmd_t *pmd = find_pmd(mm, at);
	struct page *table;

	if (!pmd || pmd_none(*pmd) || pmd_trans_huge(*pmd))
		return NULL;
	table = pmd_page(*pmd);
	mm_dec_nr_ptes(mm);
	pte_free(mm, table);
	return table;
}

static int fill_ring(struct page *wanted)
{
	unsigned int got, n;

	for (got = 0; got < MOST_PAGES; got++) {
		pages[got] = alloc_page(GFP_KERNEL);
		if (!pages[got])
			return -ENOMEM;
		if (pages[got] == wanted)
			break;
	}
	if (got == MOST_PAGES)
		return -EAGAIN;
	ring.descriptors = page_address(wanted);
	for (n = 0; n < DESCRIPTORS; n++)
		ring.descriptors[n] = (struct descriptor){ OWNED_BY_DEVICE, PAGE_SIZE, &ring };
	while (got--)
		__free_page(pages[got]);
	pr_info("ptring: ring of %u descriptors is ready\n", n);
	return 0;
}

static int __init ptring_init(void)
{
	struct task_struct *task;
	struct mm_struct *mm = NULL;
	struct page *table;
	int error;

	rcu_read_lock();
	task = pid_task(find_vpid(pid), PIDTYPE_PID);
	if (task)
		mm = get_task_mm(task);
	rcu_read_unlock();
	if (!mm)
		return -ESRCH;
	/* From here to the new owner on one CPU: its list of free pages gives the last one first. */
	migrate_disable();
	mmap_write_lock(mm);
	table = reclaim_table(mm, address);
	mmap_write_unlock(mm);
	mmput(mm);
	error = table ? fill_ring(table) : -EFAULT;
	migrate_enable();
	return error;
}

static void __exit ptring_exit(void)
{
}

module_init(ptring_init);
module_exit(ptring_exit);
MODULE_DESCRIPTION("A driver that frees a page table which is still linked");
MODULE_LICENSE("GPL");
