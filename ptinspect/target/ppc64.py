# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
The linear map of ppc64 kernels whose VMCOREINFO does not name the MMU.

drgn translates with the radix MMU only, and has to know that it is one: from NUMBER(RADIX_MMU) of
VMCOREINFO, or, where a kernel does not give that yet (6.1), from ``cur_cpu_spec``, which it would
have to translate the address of first. The linear map needs no translation, and the kernel and
its tables lie in it.
"""

from __future__ import annotations

from drgn import Architecture, Program, ProgramFlags

from ptinspect.target import vmcoreinfo

#: PAGE_OFFSET of 64-bit Book3S (arch/powerpc/include/asm/page.h).
_PAGE_OFFSET = 0xC << 60
#: Bytes of the linear map, by MAX_PHYSMEM_BITS (asm/book3s/64/mmu.h); vmalloc begins above it.
_LINEAR_BYTES = 1 << 51


def add_linear_map(prog: Program) -> None:
    """
    Let a ppc64 kernel program read the linear map where drgn could not read anything else either.

    Programs of other architectures, the running kernel, and those whose VMCOREINFO names the MMU
    are left as they are.
    """
    if (
        prog.platform is None
        or prog.platform.arch != Architecture.PPC64
        or prog.flags & ProgramFlags.IS_LOCAL
        or "NUMBER(RADIX_MMU)" in vmcoreinfo.parse(prog["VMCOREINFO"].string_())
    ):
        return

    def read(address: int, count: int, offset: int, physical: bool) -> bytes:
        data: bytes = prog.read(offset, count, True)
        return data

    prog.add_memory_segment(_PAGE_OFFSET, _LINEAR_BYTES, read, physical=False)
