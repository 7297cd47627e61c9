// SPDX-License-Identifier: LGPL-2.1-or-later OR GPL-2.0-only
/*
 * Does once what a healthy kernel does not do, or what no system call does alone, for tests of
 * ptinspect trace. Loading it does the work and then fails on purpose (ECANCELED): there is
 * nothing to unload, and it can be loaded again.
 *
 *   what=leak addr=A   clear the PMD entry that maps A in the process that loads the module: its
 *                      PTE table is then in no tree, and nothing will free it
 *   what=stall ms=N    hold up RCU: stay in a read-side critical section until a signal comes
 *   what=vmap pages=N  map one page N times into vmalloc space and unmap it again
 *   what=huge pages=N  the same, then allocate as much there with huge pages, so that tables of
 *                      small ones are thrown away
 */
#include <linux/delay.h>
#include <linux/init.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pgtable.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

static char *what = "";
static unsigned long addr;
static unsigned int ms = 1000;
static unsigned int pages = 1024;
module_param(what, charp, 0);
module_param(addr, ulong, 0);
module_param(ms, uint, 0);
module_param(pages, uint, 0);

static int __init leak(void)
{
	pgd_t *pgd;
	p4d_t *p4d;
	pud_t *pud;
	pmd_t *pmd;

	if (!current->mm)
		return -EINVAL;
	pgd = pgd_offset(current->mm, addr);
	if (pgd_none(*pgd))
		return -ENOENT;
	p4d = p4d_offset(pgd, addr);
	if (p4d_none(*p4d))
		return -ENOENT;
	pud = pud_offset(p4d, addr);
	if (pud_none(*pud))
		return -ENOENT;
	pmd = pmd_offset(pud, addr);
	if (pmd_none(*pmd))
		return -ENOENT;
	pr_info("ptprovoke: leaked %lx page %lx\n", addr, (unsigned long)pmd_page(*pmd));
	pmd_clear(pmd);
	return 0;
}

static void __init stall(void)
{
	pr_info("ptprovoke: holds RCU up\n");
	rcu_read_lock();
	/*
	 * RCU of preemptible kernels waits for a reader that sleeps too, and warns of it once. One that
	 * kept its CPU busy would also hold up collapse, which drains the caches of every CPU.
	 */
	msleep_interruptible(ms);
	rcu_read_unlock();
}

static int __init map_often(bool huge)
{
	struct page *page = alloc_page(GFP_KERNEL);
	struct page **all = kvmalloc_array(pages, sizeof(*all), GFP_KERNEL);
	void *there, *again = NULL;
	unsigned int i;
	int status = -ENOMEM;

	if (!page || !all)
		goto out;
	for (i = 0; i < pages; i++)
		all[i] = page;
	there = vmap(all, pages, VM_MAP, PAGE_KERNEL);
	if (!there)
		goto out;
	vunmap(there);
	vm_unmap_aliases();
	if (huge)
		again = vmalloc_huge((unsigned long)pages << PAGE_SHIFT, GFP_KERNEL);
	pr_info("ptprovoke: mapped %u pages at %lx, then at %lx\n", pages, (unsigned long)there,
		(unsigned long)again);
	vfree(again);
	status = 0;
out:
	kvfree(all);
	if (page)
		__free_page(page);
	return status;
}

static int __init provoke(void)
{
	int status = 0;

	if (!strcmp(what, "leak"))
		status = leak();
	else if (!strcmp(what, "stall"))
		stall();
	else if (!strcmp(what, "vmap"))
		status = map_often(false);
	else if (!strcmp(what, "huge"))
		status = map_often(true);
	else
		status = -EINVAL;
	return status ? status : -ECANCELED;
}
module_init(provoke);

MODULE_DESCRIPTION("Provokes what ptinspect trace shall find");
MODULE_LICENSE("GPL");
