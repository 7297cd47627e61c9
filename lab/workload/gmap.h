/* Copyright (c) the ptinspect authors */
/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * s390: guest address spaces (gmaps). A virtual machine that never runs still has its memory mapped
 * when KVM is asked to resolve guest faults.
 */
#ifndef LAB_GMAP_H
#define LAB_GMAP_H

#include "states.h"

#if defined(__s390x__)
#include <linux/kvm.h>

static int vm_slot(int vm, unsigned int slot, uint64_t gaddr, char *at, size_t size)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .guest_phys_addr = gaddr, .memory_size = size,
		.userspace_addr = (uintptr_t)at,
	};

	return ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

/* What a page of guest memory holds: its guest address first, the complement of it last. */
static void fill_page(char *at, uint64_t gaddr)
{
	((volatile uint64_t *)at)[0] = gaddr;
	((volatile uint64_t *)(at + page_size))[-1] = ~gaddr;
}

static int new_vm(int kvm, unsigned long type, int *vm)
{
	int vcpu;

	*vm = ioctl(kvm, KVM_CREATE_VM, type);
	if (*vm < 0)
		return -1;
	vcpu = ioctl(*vm, KVM_CREATE_VCPU, 0UL);
	return vcpu;
}

/* A slot of 4 MiB: two written pages in each of the first two segments, one that is only read. */
static char *vm_memory(int vm, int vcpu, unsigned int slot, uint64_t gaddr)
{
	size_t size = MIB(4), j;
	char *at = map_aligned(size, MIB(1), PROT_READ | PROT_WRITE, ANON);

	if (!at || vm_slot(vm, slot, gaddr, at, size)) {
		skip("gmap-slot %" PRIx64 ": errno %d", gaddr, errno);
		return NULL;
	}
	made("gmap-slot %" PRIx64 " %p %zu MiB of guest memory", gaddr, at, size >> 20);
	for (j = 0; j < 4; j++) {
		uint64_t offset = (j / 2) * MIB(1) + (j % 2) * 5 * page_size;

		fill_page(at + offset, gaddr + offset);
		if (ioctl(vcpu, KVM_S390_VCPU_FAULT, gaddr + offset))
			skip("gmap-page %" PRIx64 ": errno %d", gaddr + offset, errno);
		else
			made("gmap-page %" PRIx64 " %p", gaddr + offset, at + offset);
	}
	peek(at + 9 * page_size);
	if (!ioctl(vcpu, KVM_S390_VCPU_FAULT, gaddr + 9 * page_size))
		made("gmap-zero-page %" PRIx64 " %p", gaddr + 9 * page_size, at + 9 * page_size);
	return at;
}

static void state_gmap(void)
{
	static const uint64_t guest[] = { 0, 1ULL << 32, 0x140000300000ULL };
	int kvm = open("/dev/kvm", O_RDWR), vm, vcpu;
	size_t i;

	if (kvm < 0)
		return skip("gmap: no /dev/kvm");
	vcpu = new_vm(kvm, 0, &vm);
	if (vcpu < 0)
		return skip("gmap: no virtual CPU (errno %d)", errno);
	for (i = 0; i < sizeof(guest) / sizeof(*guest); i++)
		vm_memory(vm, vcpu, i, guest[i]);
}

/* Two virtual machines of one process. */
static void state_gmap_twin(void)
{
	int kvm = open("/dev/kvm", O_RDWR), vm, vcpu, i;

	for (i = 0; i < 2; i++) {
		vcpu = kvm < 0 ? -1 : new_vm(kvm, 0, &vm);
		if (vcpu < 0)
			return skip("gmap-twin: no virtual machine (errno %d)", errno);
		vm_memory(vm, vcpu, 0, (uint64_t)i * MIB(16));
	}
}

/* A request that only the lab's small kernels know: to shadow an address of a guest's guest. */
struct shadow_request {
	uint64_t asce, edat, address;
};

static void shadow(int vcpu, uint64_t asce, uint64_t edat, uint64_t address, uint64_t gaddr)
{
	struct shadow_request request = { asce, edat, address };

	if (ioctl(vcpu, KVM_S390_VCPU_FAULT, (unsigned long)&request | 1))
		return skip("gmap-shadow-page %" PRIx64 ": errno %d", address, errno);
	made("gmap-shadow-page %" PRIx64 " %" PRIx64 " asce %" PRIx64 " edat %" PRIu64, address,
	     gaddr, asce, edat);
}

/* A guest that has page tables of its own, which KVM shadows for the guest's guest. */
static void state_gmap_shadow(void)
{
	/* Guest addresses of the guest's tables, and of two pages of its guest. */
	const uint64_t region3 = 0x10000, segment = 0x14000, page = 0x18000, data = 0x200000;
	const uint64_t asce = region3 | 0x4 | 0x3;
	int kvm = open("/dev/kvm", O_RDWR), vm, vcpu;
	char *at;

	vcpu = kvm < 0 ? -1 : new_vm(kvm, 0, &vm);
	if (vcpu < 0)
		return skip("gmap-shadow: no virtual machine (errno %d)", errno);
	at = vm_memory(vm, vcpu, 0, 0);
	if (!at)
		return;
	/* Everything invalid, but for one way through: 2 GiB, then 1 MiB, then 3 pages. */
	for (uint64_t i = 0; i < 2048; i++) {
		((uint64_t *)(at + region3))[i] = 0x24;
		((uint64_t *)(at + segment))[i] = 0x20;
	}
	for (uint64_t i = 0; i < 256; i++)
		((uint64_t *)(at + page))[i] = 0x400;
	((uint64_t *)(at + region3))[1] = segment | 0x7;
	((uint64_t *)(at + segment))[1] = page;
	/* A large segment, for a CPU with EDAT. */
	((uint64_t *)(at + segment))[2] = data | 0x400;
	((uint64_t *)(at + page))[3] = data;
	((uint64_t *)(at + page))[7] = data + 0x2000;
	made("gmap-guest-tables %" PRIx64 " %p %" PRIx64 " bytes", region3, at + region3,
	     page + 0x1000 - region3);
	for (uint64_t i = 0; i < 2; i++) {
		uint64_t here = data + i * 0x2000;

		fill_page(at + here, here);
		if (!ioctl(vcpu, KVM_S390_VCPU_FAULT, here))
			made("gmap-page %" PRIx64 " %p", here, at + here);
	}
	shadow(vcpu, asce, 0, 0x80103000, data);
	shadow(vcpu, asce, 0, 0x80107000, data + 0x2000);
	shadow(vcpu, asce, 1, 0x80202000, data + 0x2000);
	/* A real space: no tables at all. */
	shadow(vcpu, 0x20, 0, data, data);
}

/* Page tables of which one half of a page is gone again, where a page holds two. */
static void state_halves(void)
{
	char *at = map_aligned(16 * TABLE_SPAN, TABLE_SPAN, PROT_READ | PROT_WRITE, ANON);
	static const int gone[] = { 0, 3, 7, 10, 13 };
	size_t i;

	if (!at)
		return skip("halves: mmap failed");
	for (i = 0; i < 16; i++)
		poke(at + i * TABLE_SPAN);
	for (i = 0; i < sizeof(gone) / sizeof(*gone); i++)
		munmap(at + gone[i] * TABLE_SPAN, TABLE_SPAN);
	made("halves %p 5 of 16 tables are gone again", at);
}

/* A virtual machine whose guest mappings user space controls itself. */
static void state_gmap_user(void)
{
	struct kvm_s390_ucas_mapping mapping;
	int kvm = open("/dev/kvm", O_RDWR), vm, vcpu;
	char *at;

	vcpu = kvm < 0 ? -1 : new_vm(kvm, KVM_VM_S390_UCONTROL, &vm);
	if (vcpu < 0)
		return skip("gmap-user: no user controlled virtual machine (errno %d)", errno);
	at = map_aligned(MIB(4), MIB(1), PROT_READ | PROT_WRITE, ANON);
	mapping.user_addr = (uintptr_t)at;
	mapping.vcpu_addr = MIB(16);
	mapping.length = MIB(2);
	if (!at || ioctl(vcpu, KVM_S390_UCAS_MAP, &mapping))
		return skip("gmap-user: KVM_S390_UCAS_MAP failed (errno %d)", errno);
	fill_page(at, mapping.vcpu_addr);
	if (ioctl(vcpu, KVM_S390_VCPU_FAULT, (unsigned long)mapping.vcpu_addr))
		return skip("gmap-user: KVM_S390_VCPU_FAULT failed (errno %d)", errno);
	made("gmap-user-page %llx %p", (unsigned long long)mapping.vcpu_addr, at);
}
#else
static void state_gmap(void)
{
	skip("gmap: s390 only");
}

static void state_gmap_twin(void)
{
	skip("gmap-twin: s390 only");
}

static void state_gmap_shadow(void)
{
	skip("gmap-shadow: s390 only");
}

static void state_gmap_user(void)
{
	skip("gmap-user: s390 only");
}

static void state_halves(void)
{
	skip("halves: s390 only");
}
#endif

#endif
