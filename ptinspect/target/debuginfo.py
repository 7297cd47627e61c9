# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Load the kernel's DWARF, or say exactly what is missing and where it comes from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from drgn import FaultError, MissingDebugInfoError, ModuleFileStatus, Program

from ptinspect.errors import DebugInfoError
from ptinspect.target import architecture, drgn_log
from ptinspect.target.elf import ET_CORE, ET_REL, MAGIC, ElfError, ElfFile, read_elf
from ptinspect.target.wording import reason

#: The name of drgn's finder that asks debuginfod servers.
_DEBUGINFOD = "debuginfod"
#: Set by the user (on some distributions for every login) to the servers to ask.
_DEBUGINFOD_URLS = "DEBUGINFOD_URLS"

#: Where drgn's own search looks for a kernel's vmlinux, apart from build IDs.
_STANDARD_PLACES = (
    "/usr/lib/debug/boot/vmlinux-{release}",
    "/usr/lib/debug/lib/modules/{release}/vmlinux",
    "/usr/lib/debug/lib/modules/{release}/vmlinux.debug",
    "/boot/vmlinux-{release}",
    "/lib/modules/{release}/build/vmlinux",
    "/lib/modules/{release}/vmlinux",
)

#: And in each --kernel-directory.
_KERNEL_DIRECTORY_PLACES = ("build/vmlinux", "vmlinux")

#: What SUSE calls its kernels' flavours, at the end of the release.
_SUSE_FLAVOURS = ("default", "azure", "rt", "kvmsmall", "64kb", "longterm")

#: "HdrS" at this offset marks an x86 boot image (Documentation/arch/x86/boot.rst).
_BOOT_IMAGE_MAGIC_OFFSET = 0x202


def load(prog: Program, symbols: Sequence[Path], kernel_directories: Sequence[Path]) -> None:
    """
    Load the debugging information of a kernel, and of modules only if given in *symbols*.

    :param symbols: Files to try first.
    :param kernel_directories: Where else to look for the kernel's own files.
    :raises DebugInfoError: if there is none, or a given file belongs to another kernel
    """
    build_id = kernel_build_id(prog)
    for path in symbols:
        _check_belongs(prog, path, build_id)
    if kernel_directories:
        options = prog.debug_info_options
        options.kernel_directories = (
            *(str(path) for path in kernel_directories),
            *options.kernel_directories,
        )
    _enable_debuginfod(prog)
    try:
        with drgn_log.without("missing debugging symbols"):
            prog.load_debug_info([str(path) for path in symbols], main=True)
    except MissingDebugInfoError:
        # It may be a module that is missing, or nothing but the symbol table was found: see below.
        pass
    except Exception as error:
        raise DebugInfoError(
            f"cannot load the kernel's debugging information: {reason(error)}"
        ) from None
    if not _has_debug_info(prog):
        raise DebugInfoError(_missing(prog, build_id, symbols, kernel_directories))
    _check_release(prog)


def load_types(path: Path, prog: Program) -> None:
    """
    Load a vmlinux (or module) into a program without a target.

    :raises DebugInfoError: if it has no DWARF
    """
    module = prog.extra_module(str(path.resolve()), create=True)
    try:
        module.try_file(str(path))
    except Exception as error:
        raise DebugInfoError(f"{path}: {reason(error)}") from None
    if module.debug_file_status != ModuleFileStatus.HAVE:
        raise DebugInfoError(f"{path}: it has no debugging information (DWARF): a stripped file?")


def kernel_build_id(prog: Program) -> str | None:
    """
    The build ID of a kernel in hexadecimal, if the target tells it.

    drgn is asked and not VMCOREINFO itself, where some stable releases have garbage.
    """
    for module, _ in prog.loaded_modules():
        return module.build_id.hex() if module.build_id is not None else None
    return None


def kernel_release(prog: Program) -> str:
    """The release of a kernel program, as ``uname -r`` gives it."""
    release: bytes = prog["UTS_RELEASE"].string_()
    return release.decode("utf-8", "replace")


def read_symbols_header(path: Path) -> tuple[ElfFile, str | None]:
    """
    Read what a file given with --symbols is.

    :return: its headers and its build ID
    :raises DebugInfoError: if it is no ELF file with symbols
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DebugInfoError(f"--symbols {path}: {reason(error)}") from None
    try:
        start = os.pread(fd, 1024, 0)
        if not start.startswith(MAGIC):
            raise DebugInfoError(f"--symbols {path}: {_not_elf(start)}")
        elf = read_elf(fd)
        if elf.type == ET_CORE:
            raise DebugInfoError(
                f"--symbols {path}: this is a core dump (open it with --core); "
                "the kernel's vmlinux is needed"
            )
        return elf, elf.build_id()
    except OSError as error:
        raise DebugInfoError(f"--symbols {path}: {reason(error)}") from None
    except ElfError as error:
        raise DebugInfoError(f"--symbols {path}: not a usable ELF file: {reason(error)}") from None
    finally:
        os.close(fd)


def _not_elf(start: bytes) -> str:
    if start[_BOOT_IMAGE_MAGIC_OFFSET:].startswith(b"HdrS") or start.startswith(b"MZ"):
        return "this is a boot image without debugging information; the kernel's vmlinux is needed"
    if not start:
        return "the file is empty"
    return "not an ELF file; the kernel's vmlinux with debugging information is needed"


def _check_belongs(prog: Program, path: Path, kernel_id: str | None) -> None:
    """Refuse a vmlinux of another kernel. drgn would ignore it and name something else missing."""
    elf, build_id = read_symbols_header(path)
    assert prog.platform is not None
    expected = architecture.by_platform("the target", prog.platform)
    if elf.machine != expected.machine:
        raise DebugInfoError(
            f"--symbols {path}: ELF machine {elf.machine}, but the target is {expected.name}"
        )
    if elf.type == ET_REL or kernel_id is None or build_id == kernel_id:
        return
    found = f"build ID {build_id}" if build_id else "no build ID"
    raise DebugInfoError(
        f"--symbols {path}: wrong vmlinux: it has {found}, "
        f"but the kernel ({kernel_release(prog)}) has {kernel_id}"
    )


def _enable_debuginfod(prog: Program) -> None:
    """
    Let drgn ask debuginfod servers, last, if the user has configured any.

    drgn itself does so for Fedora's kernels only, since other servers are slow with kernels; yet
    slow is better than an error to one who has set DEBUGINFOD_URLS.
    """
    finders = prog.enabled_debug_info_finders()
    if (
        os.environ.get(_DEBUGINFOD_URLS)
        and _DEBUGINFOD in prog.registered_debug_info_finders()
        and _DEBUGINFOD not in finders
    ):
        prog.set_enabled_debug_info_finders([*finders, _DEBUGINFOD])


def _has_debug_info(prog: Program) -> bool:
    try:
        return bool(prog.main_module().debug_file_status == ModuleFileStatus.HAVE)
    except LookupError:
        return False


def _check_release(prog: Program) -> None:
    """
    Compare the release in memory with VMCOREINFO's, at the address that the DWARF gives.

    This catches what build IDs cannot (kernels without them), and memory that is translated
    wrongly. Memory that the dump does not have proves nothing.
    """
    try:
        release = prog["init_uts_ns"].name.release.string_()
    except (FaultError, LookupError, AttributeError):
        return
    expected = kernel_release(prog)
    if release != expected.encode():
        raise DebugInfoError(
            f"wrong vmlinux: VMCOREINFO says release {expected!r}, but where this vmlinux has "
            f"init_uts_ns the target has {release[:65]!r}"
        )


def _without_dwarf(path: Path) -> str:
    elf, _ = read_symbols_header(path)
    has_dwarf = any(section.name in (".debug_info", ".zdebug_info") for section in elf.sections)
    return "" if has_dwarf else " (stripped: it has no .debug_info)"


def _missing(
    prog: Program,
    build_id: str | None,
    symbols: Sequence[Path],
    kernel_directories: Sequence[Path],
) -> str:
    release = kernel_release(prog)
    places = [f"--symbols {path}{_without_dwarf(path)}" for path in symbols]
    places += [f"{path / name}" for path in kernel_directories for name in _KERNEL_DIRECTORY_PLACES]
    places += [place.format(release=release) for place in _STANDARD_PLACES]
    if build_id:
        places.append(f"/usr/lib/debug/.build-id/{build_id[:2]}/{build_id[2:]}.debug")
    if _DEBUGINFOD in prog.enabled_debug_info_finders():
        places.append(f"debuginfod ({_DEBUGINFOD_URLS}={os.environ.get(_DEBUGINFOD_URLS, '')})")
    else:
        places.append(f"not debuginfod ({_DEBUGINFOD_URLS} is not set)")
    suse_flavour = release.rpartition("-")[2]
    if suse_flavour not in _SUSE_FLAVOURS:
        suse_flavour = _SUSE_FLAVOURS[0]
    lines = (
        f"no debugging information (DWARF) for Linux {release}, build ID {build_id or 'not known'}",
        f"  tried: {', '.join(places)}",
        "  give its vmlinux with --symbols FILE or --kernel-directory DIR, or install it:",
        f"    Debian       apt install linux-image-{release}-dbg",
        f"    Ubuntu       apt install linux-image-unsigned-{release}-dbgsym "
        f"(or linux-image-{release}-dbgsym), from ddebs",
        f"    Fedora/RHEL  dnf debuginfo-install kernel-core-{release}",
        f"    SUSE         zypper --plus-content debug install kernel-{suse_flavour}-debuginfo",
        f"    debuginfod   set {_DEBUGINFOD_URLS} to your distribution's server",
    )
    return "\n".join(lines)
