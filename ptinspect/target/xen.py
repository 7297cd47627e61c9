# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Refuse Xen PV: its page tables hold machine addresses, which nothing here translates."""

from __future__ import annotations

from drgn import FaultError, Program

from ptinspect.errors import TargetError

MESSAGE = (
    "a Xen PV kernel: its page tables hold machine frame numbers of the hypervisor, "
    "which ptinspect does not translate (PVH and HVM guests are fine)"
)


def refuse_xen_pv(prog: Program) -> None:
    """
    Refuse a kernel that runs as a paravirtualised Xen domain.

    ``xen_domain_type`` is set at boot (arch/x86/xen/enlighten.c, enlighten_pv.c); PVH and HVM
    domains have XEN_HVM_DOMAIN.

    :raises TargetError: if it is one
    """
    try:
        is_pv = prog["xen_domain_type"].value_() == prog["XEN_PV_DOMAIN"].value_()
    except (LookupError, FaultError):
        # No such variable: built without Xen. Not readable: then nothing else of the kernel is.
        return
    if is_pv:
        raise TargetError(MESSAGE)
