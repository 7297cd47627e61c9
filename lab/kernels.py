# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels: Debian's own with their debug information, and small ones built from its sources."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab import archive
from lab.arches import Arch, find_arch
from lab.errors import LabError
from lab.run import HERE, cache, made_whole, run, say, tool

CONFIGS = HERE / "configs"

#: Smaller debug information: no variable locations, and each type once.
_KCFLAGS = "-fno-var-tracking -gno-variable-location-views -fdebug-types-section"


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted and looked into."""

    arch: Arch
    release: str
    image: Path
    vmlinux: Path  #: with DWARF
    modules: tuple[Path, ...] = ()  #: uncompressed, in load order
    #: Where the debug package has vmlinux, below the root; not known of small kernels.
    packaged: Path | None = None


@dataclass(frozen=True)
class Edit:
    """A change to one source file: text that has to be there exactly once, and its successor."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Recipe:
    """How a small kernel is built."""

    arch: str
    suite: str
    source: str  #: Debian's source package
    fragments: tuple[str, ...]  #: in lab/configs, merged in this order
    edits: tuple[Edit, ...] = field(default=())


#: KVM's start-up looks for SIE and asks PLO what it can do; QEMU's TCG has neither. Without the
#: two tests guests can be made, though never run: enough for their address spaces. What a guest's
#: own guest would need (a shadow of its tables) is asked for in the words of lab/workload/gmap.h:
#: KVM's own functions then make it.
_KVM_START_SIE = ("if (!sclp.has_sief2) {", "if (0) {")
_KVM_START_PLO = ('"\tplo\t0,0,0,0(0)\\n"', '"\tcghi\t0,0\\n"')
_FAULT = "\tcase KVM_S390_VCPU_FAULT: {\n"
_SHADOW = """\
		if (arg & 1) {
			u64 want[3];
			struct gmap *sg;

			r = -EFAULT;
			if (copy_from_user(want, (void __user *)(arg - 1), sizeof(want)))
				break;
"""
_SHADOW_6 = """\
			sg = gmap_shadow(vcpu->arch.gmap, want[0], want[1]);
			r = IS_ERR(sg) ? PTR_ERR(sg) : kvm_s390_shadow_fault(vcpu, sg, want[2], NULL);
			break;
		}
"""
_SHADOW_7 = """\
			r = kvm_s390_mmu_cache_topup(vcpu->arch.mc);
			if (r)
				break;
			guard(srcu)(&vcpu->kvm->srcu);
			sg = gmap_create_shadow(vcpu->arch.mc, vcpu->kvm->arch.gmap,
				(union asce){ .val = want[0] }, want[1]);
			r = PTR_ERR_OR_ZERO(sg);
			if (!r)
				r = gaccess_shadow_fault(vcpu, sg, want[2], NULL, true);
			break;
		}
"""


def _kvm_without_sie(path: str, shadow: str) -> tuple[Edit, ...]:
    return (
        Edit(path, *_KVM_START_SIE),
        Edit(path, *_KVM_START_PLO),
        Edit(path, _FAULT, _FAULT + _SHADOW + shadow),
    )


_KVM_6 = _kvm_without_sie("arch/s390/kvm/kvm-s390.c", _SHADOW_6)
_KVM_7 = _kvm_without_sie("arch/s390/kvm/s390/s390.c", _SHADOW_7)

#: Kernel tables are freed later where drivers of IOMMUs ask for it. Those want PCI and ACPI, which
#: double the debug file; without them the flush of the I/O TLBs does nothing, the rest is the same.
_FREE_LATER = Edit(
    "arch/x86/Kconfig",
    "\tselect ASYNC_KERNEL_PGTABLE_FREE\tif IOMMU_SVA\n",
    "\tselect ASYNC_KERNEL_PGTABLE_FREE\n",
)

RECIPES: dict[str, Recipe] = {
    "x86_64-7.3": Recipe(
        "x86_64", "trixie-backports", "linux-source-7.3", ("common", "x86_64", "x86_64-7.3")
    ),
    "x86_64-7.3-owner": Recipe(
        "x86_64",
        "trixie-backports",
        "linux-source-7.3",
        ("common", "x86_64", "x86_64-7.3", "x86_64-7.3-owner"),
    ),
    "x86_64-7.3-async": Recipe(
        "x86_64",
        "trixie-backports",
        "linux-source-7.3",
        ("common", "x86_64", "x86_64-7.3", "x86_64-7.3-async"),
        (_FREE_LATER,),
    ),
    "x86_64-7.3-lockdep": Recipe(
        "x86_64",
        "trixie-backports",
        "linux-source-7.3",
        ("common", "x86_64", "x86_64-7.3", "x86_64-7.3-lockdep"),
    ),
    "x86_64-6.1": Recipe(
        "x86_64", "bookworm", "linux-source-6.1", ("common", "x86_64", "x86_64-6.1")
    ),
    "x86_64-6.12-lockdep": Recipe(
        "x86_64",
        "trixie",
        "linux-source-6.12",
        ("common", "x86_64", "x86_64-6.12-lockdep"),
    ),
    "s390x-6.12": Recipe(
        "s390x", "trixie", "linux-source-6.12", ("common", "s390x", "s390x-6.12"), _KVM_6
    ),
    "s390x-6.1": Recipe(
        "s390x", "bookworm", "linux-source-6.1", ("common", "s390x", "s390x-6.1"), _KVM_6
    ),
    "s390x-7.3": Recipe(
        "s390x", "trixie-backports", "linux-source-7.3", ("common", "s390x", "s390x-7.3"), _KVM_7
    ),
    "aarch64-7.3": Recipe(
        "aarch64",
        "trixie-backports",
        "linux-source-7.3",
        ("common", "aarch64", "aarch64-4k", "aarch64-48", "aarch64-7.3"),
    ),
    "aarch64-7.3-16k": Recipe(
        "aarch64",
        "trixie-backports",
        "linux-source-7.3",
        ("common", "aarch64", "aarch64-16k", "aarch64-52", "aarch64-7.3"),
    ),
    "aarch64-7.3-64k": Recipe(
        "aarch64",
        "trixie-backports",
        "linux-source-7.3",
        ("common", "aarch64", "aarch64-64k", "aarch64-52", "aarch64-7.3"),
    ),
    "ppc64le-6.12": Recipe(
        "ppc64le", "trixie", "linux-source-6.12", ("common", "ppc64le", "ppc64le-6.12")
    ),
    "ppc64le-7.3-4k": Recipe(
        "ppc64le",
        "trixie-backports",
        "linux-source-7.3",
        ("common", "ppc64le", "ppc64le-4k", "ppc64le-7.3"),
    ),
    "ppc64le-7.3-64k": Recipe(
        "ppc64le",
        "trixie-backports",
        "linux-source-7.3",
        ("common", "ppc64le", "ppc64le-64k", "ppc64le-7.3"),
    ),
    "riscv64-7.3": Recipe(
        "riscv64", "trixie-backports", "linux-source-7.3", ("common", "riscv64", "riscv64-7.3")
    ),
}


def find_recipe(name: str) -> Recipe:
    """
    Get the recipe of a small kernel.

    :raises LabError: if there is none of that name
    """
    if name not in RECIPES:
        raise LabError(f"no small kernel {name!r}: there are {', '.join(RECIPES)}")
    return RECIPES[name]


def fragment_text(name: str) -> str:
    """Get the configuration that a small kernel has besides "tinyconfig"."""
    return "".join(
        (CONFIGS / f"{fragment}.config").read_text() for fragment in find_recipe(name).fragments
    )


def lost_lines(fragment: str, config: str) -> list[str]:
    """
    Get the lines of a fragment that a final configuration does not have.

    A symbol that the kernel does not know at all counts as not set.
    """
    have = set(config.splitlines())
    lost = []
    for line in fragment.splitlines():
        unset = re.match(r"# (CONFIG_\w+) is not set$", line)
        if unset:
            if any(other.startswith(f"{unset[1]}=") for other in have):
                lost.append(line)
        elif line.startswith("CONFIG_") and line not in have:
            lost.append(line)
    return lost


def _source(recipe: Recipe, folder: Path) -> Path:
    """Get the source tree: Debian's as it is, or a copy (hard links) with the edits."""
    pristine = archive.source_tree(recipe.suite, recipe.source)
    if not recipe.edits:
        return pristine
    edited = folder / f"{pristine.name}.edited"
    if edited.exists():
        return edited
    say(f"editing a copy of {pristine.name}")
    with made_whole(edited) as unfinished:
        run(["cp", "-al", pristine, unfinished])
        for edit in recipe.edits:
            path = unfinished / edit.path
            text = path.read_text()
            if text.count(edit.old) != 1:
                raise LabError(f"{edit.path} has not exactly one {edit.old!r}")
            path.unlink()  # the other name of this file is in the pristine tree
            path.write_text(text.replace(edit.old, edit.new))
    return edited


def _digest(name: str) -> str:
    """Get what a build is made of, in short: another digest, another kernel."""
    text = f"{find_recipe(name)!r}\n{_KCFLAGS}\n{fragment_text(name)}"
    return hashlib.sha256(text.encode()).hexdigest()


def built_kernel(name: str) -> Kernel | None:
    """
    Get a small kernel if the cache has it as the recipe says, else ``None``.

    :raises LabError: if there is no recipe of that name
    """
    arch = find_arch(find_recipe(name).arch)
    folder = cache("kernels", name)
    objects, stamp = folder / "objects", folder / "stamp"
    image, vmlinux = objects / arch.image_path, objects / "vmlinux"
    if not (stamp.exists() and stamp.read_text() == _digest(name)):
        return None
    if not (vmlinux.exists() and image.exists()):
        return None
    release = (objects / "include/config/kernel.release").read_text().strip()
    return Kernel(arch, release, image, vmlinux)


def build_kernel(name: str, jobs: int | None = None) -> Kernel:
    """
    Build a small kernel, unless the cache has it already.

    :raises LabError: if a line of the fragments did not survive, or the build fails
    """
    kernel = built_kernel(name)
    if kernel is None:
        _build(name, jobs)
        kernel = built_kernel(name)
        assert kernel is not None
    return kernel


def _build(name: str, jobs: int | None) -> None:
    """Configure and build a small kernel in its folder of the cache."""
    recipe = find_recipe(name)
    arch = find_arch(recipe.arch)
    folder = cache("kernels", name)
    objects = folder / "objects"
    fragment = fragment_text(name)
    for program, package in (("flex", "flex"), ("bison", "bison"), ("bc", "bc")):
        tool(program, package)
    compiler = f"{arch.cross}gcc"
    tool(compiler, f"gcc-{arch.triplet}" if arch.cross else "gcc")
    source = _source(recipe, folder)
    objects.mkdir(exist_ok=True)
    make = ["make", "-s", "-C", str(source), f"O={objects}", f"ARCH={arch.kernel}"]
    # Debug information names sources; it shall not name folders of this machine.
    renamed = {source: "/kernel/source", objects: "/kernel/objects"}
    maps = [f"-fdebug-prefix-map={real}={said}" for real, said in renamed.items()]
    make += [f"CROSS_COMPILE={arch.cross}", f"KAFLAGS={' '.join(maps)}"]
    make += [f"KCFLAGS={_KCFLAGS} {' '.join(maps)}"]
    say(f"configuring {name}")
    run([*make, "tinyconfig"])
    (objects / "fragment").write_text(fragment)
    merge = source / "scripts/kconfig/merge_config.sh"
    run([merge, "-m", "-O", objects, objects / ".config", objects / "fragment"], cwd=source)
    run([*make, "olddefconfig"])
    lost = lost_lines(fragment, (objects / ".config").read_text())
    if lost:
        raise LabError(f"the configuration of {name} lost: {', '.join(lost)}")
    log = folder / "build.log"
    say(f"building {name} (10 to 30 minutes of CPU time; log: {log})")
    # The same build each time: neither the time nor who made it goes into the kernel.
    fixed = {
        "KBUILD_BUILD_USER": "ptinspect",
        "KBUILD_BUILD_HOST": "lab",
        "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
    }
    targets = dict.fromkeys(["vmlinux", arch.image])
    parallel = f"-j{jobs or os.cpu_count() or 1}"
    run(["nice", *make, parallel, *targets], env=fixed, log=log)
    (folder / "stamp").write_text(_digest(name))


def _series_packages(
    suite: str, arch: Arch, series: str, flavour: str
) -> dict[str, archive.Package]:
    """
    Get the packages of the newest plain kernel of a series: image, modules, dbg, by role.

    Up to 6.x the image package has everything; from 7.x on the image is linux-binary and the
    modules are linux-modules.
    """
    pattern = rf"linux-image-({re.escape(series)}[.][0-9][^-]*(?:-[0-9]+)?)-{flavour}-dbg"
    index = archive.Index(suite, arch.debian)
    debug = index.find(pattern)
    kernel = re.fullmatch(pattern, debug.name)
    assert kernel is not None
    release = f"{kernel[1]}-{flavour}"
    exactly = re.escape(release)
    found = {"dbg": debug}
    for role, names in {
        "image": (f"linux-binary-(?:unsigned-)?{exactly}", f"linux-image-{exactly}(?:-unsigned)?"),
        "modules": (f"linux-modules-{exactly}", f"linux-image-{exactly}(?:-unsigned)?"),
    }.items():
        for wanted in names:
            try:
                found[role] = index.find(wanted)
                break
            except LabError:
                continue
        else:
            raise LabError(f"{suite} has {debug.name} but neither of {', '.join(names)}")
    return found


#: What Debian calls the plain kernel, where it is not called after the architecture.
_FLAVOURS = {"ppc64el": "powerpc64le"}


def debian_kernel(suite: str, arch_name: str, series: str, flavour: str | None = None) -> Kernel:
    """
    Get Debian's newest kernel of a series (``6.12``) in a suite, from the cache or the archive.

    Only what is needed is kept: image, vmlinux with DWARF, and the modules of
    :attr:`Arch.vmcoreinfo_modules`. Without network the newest one in the cache is taken.

    :param flavour: what Debian appends to the release (``powerpc64le-64k``); by default the plain
        kernel's
    :raises LabError: if the suite has no such kernel
    """
    arch = find_arch(arch_name)
    flavour = flavour or _FLAVOURS.get(arch.debian, arch.debian)
    prefix = f"{suite}-{arch.name}-{series}-{flavour}"
    try:
        packages = _series_packages(suite, arch, series, flavour)
    except archive.ArchiveUnreachableError as error:
        kept = sorted(
            (path for path in cache("debian").glob(f"{prefix}_*") if path.is_dir()),
            key=lambda path: path.stat().st_mtime,
        )
        if not kept:
            raise
        say(f"{error}; taking {kept[-1].name} from the cache")
        return _kept_kernel(arch, kept[-1])
    folder = cache("debian") / f"{prefix}_{packages['dbg'].version.replace(':', '_')}"
    if not folder.exists():
        with made_whole(folder) as unfinished:
            unfinished.mkdir()
            _unpack_kernel(arch, packages, unfinished)
    return _kept_kernel(arch, folder)


def _unpack_kernel(arch: Arch, packages: dict[str, archive.Package], into: Path) -> None:
    """Fill a folder with image, vmlinux and modules."""
    kernel = re.fullmatch(r"linux-image-(.*)-dbg", packages["dbg"].name)
    assert kernel is not None
    release = kernel[1]
    (into / "release").write_text(release)
    wanted = {
        "image": [
            f"./boot/vmlinuz-{release}",
            f"./boot/vmlinux-{release}",
            "./boot/image-*",
            f"./usr/lib/modules/{release}/vmlinu*",
            f"./lib/modules/{release}/vmlinu*",
        ],
        "modules": [f"*/{name}.ko*" for name in arch.vmcoreinfo_modules],
        "dbg": [
            f"./usr/lib/debug/boot/vmlinux-{release}",
            f"./usr/lib/debug/lib/modules/{release}/vmlinux",
            f"./usr/lib/debug/usr/lib/modules/{release}/vmlinux",
        ],
    }
    names = {"image": "image", "dbg": "vmlinux"}
    for role, patterns in wanted.items():
        if not patterns:
            continue
        deb = archive.download(packages[role])
        folder = into / f"unpacking-{role}"
        archive.extract(deb, patterns, folder)
        # Some packages have a symbolic link from where the file was to where it is.
        found = sorted(
            path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
        )
        if role == "modules":
            for index, module in enumerate(arch.vmcoreinfo_modules):
                paths = [path for path in found if path.name.split(".ko")[0] == module]
                if not paths:
                    raise LabError(f"{packages[role].name} has no module {module}")
                target = into / "modules" / f"{index:02}-{module}.ko"
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(archive.uncompressed(paths[0]))
        elif len(found) != 1:
            raise LabError(f"{packages[role].name} has {len(found)} files for {role}")
        else:
            if role == "dbg":
                (into / "packaged").write_text(str(found[0].relative_to(folder)))
            shutil.move(str(found[0]), into / names[role])
        shutil.rmtree(folder)
    for package in packages.values():
        archive.forget(package)


def _kept_kernel(arch: Arch, folder: Path) -> Kernel:
    packaged = folder / "packaged"
    return Kernel(
        arch,
        (folder / "release").read_text(),
        folder / "image",
        folder / "vmlinux",
        tuple(sorted((folder / "modules").glob("*.ko"))) if arch.vmcoreinfo_modules else (),
        Path(packaged.read_text()) if packaged.exists() else None,
    )


def debian_modules(suite: str, kernel: Kernel, names: Sequence[str]) -> tuple[Path, ...]:
    """
    Get more modules of one of Debian's kernels, uncompressed, in the order of their names.

    A name that the kernel has no module for is left out: it is built in, or has another name in
    another series.

    :param kernel: What :func:`debian_kernel` gave for this suite.
    """
    folder = cache("modules") / f"{kernel.image.parent.name}-{_key(*names)}"
    if not folder.exists():
        release = re.escape(kernel.release)
        index = archive.Index(suite, kernel.arch.debian)
        try:
            package = index.find(f"linux-modules-{release}")
        except LabError:
            package = index.find(f"linux-image-{release}(?:-unsigned)?")
        with made_whole(folder) as unfinished:
            unpacked = unfinished / "package"
            archive.extract(
                archive.download(package), [f"*/{name}.ko*" for name in names], unpacked
            )
            found = {path.name.split(".ko")[0]: path for path in unpacked.rglob("*.ko*")}
            for number, name in enumerate(name for name in names if name in found):
                target = unfinished / f"{number:02}-{name}.ko"
                target.write_bytes(archive.uncompressed(found[name]))
            shutil.rmtree(unpacked)
        archive.forget(package)
    return tuple(sorted(folder.glob("*.ko")))


def _key(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
