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

static void state_gmap(void)
{
	static const uint64_t guest[] = { 0, 1ULL << 32, 0x140000300000ULL };
	size_t i, j, size = MIB(4);
	int kvm = open("/dev/kvm", O_RDWR), vm, vcpu;

	if (kvm < 0)
		return skip("gmap: no /dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, 0UL);
	if (vm < 0)
		return skip("gmap: no virtual machine (errno %d)", errno);
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0UL);
	if (vcpu < 0)
		return skip("gmap: no virtual CPU (errno %d)", errno);
	for (i = 0; i < sizeof(guest) / sizeof(*guest); i++) {
		char *at = map_aligned(size, MIB(1), PROT_READ | PROT_WRITE, ANON);

		if (!at || vm_slot(vm, i, guest[i], at, size)) {
			skip("gmap-slot %" PRIx64 ": errno %d", guest[i], errno);
			continue;
		}
		made("gmap-slot %" PRIx64 " %p %zu MiB of guest memory", guest[i], at, size >> 20);
		/* Two pages in each of the first two segments; the others stay unmapped. */
		for (j = 0; j < 4; j++) {
			uint64_t offset = (j / 2) * MIB(1) + (j % 2) * 5 * page_size;

			poke(at + offset);
			if (ioctl(vcpu, KVM_S390_VCPU_FAULT, guest[i] + offset))
				skip("gmap-page %" PRIx64 ": errno %d", guest[i] + offset, errno);
			else
				made("gmap-page %" PRIx64 " %p", guest[i] + offset, at + offset);
		}
	}
}

/* A virtual machine whose guest mappings user space controls itself. */
static void state_gmap_user(void)
{
	struct kvm_s390_ucas_mapping mapping;
	int kvm = open("/dev/kvm", O_RDWR), vm, vcpu;
	char *at;

	vm = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, KVM_VM_S390_UCONTROL);
	vcpu = vm < 0 ? -1 : ioctl(vm, KVM_CREATE_VCPU, 0UL);
	if (vcpu < 0)
		return skip("gmap-user: no user controlled virtual machine (errno %d)", errno);
	at = map_aligned(MIB(4), MIB(1), PROT_READ | PROT_WRITE, ANON);
	mapping.user_addr = (uintptr_t)at;
	mapping.vcpu_addr = MIB(16);
	mapping.length = MIB(2);
	if (!at || ioctl(vcpu, KVM_S390_UCAS_MAP, &mapping))
		return skip("gmap-user: KVM_S390_UCAS_MAP failed (errno %d)", errno);
	poke(at);
	if (ioctl(vcpu, KVM_S390_VCPU_FAULT, (unsigned long)mapping.vcpu_addr))
		return skip("gmap-user: KVM_S390_VCPU_FAULT failed (errno %d)", errno);
	made("gmap-user-page %llx %p", (unsigned long long)mapping.vcpu_addr, at);
}
#else
static void state_gmap(void)
{
	skip("gmap: s390 only");
}

static void state_gmap_user(void)
{
	skip("gmap-user: s390 only");
}
#endif

#endif
