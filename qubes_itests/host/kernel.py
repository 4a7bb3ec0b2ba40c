"""The kernels that guests boot, taken from the distribution's packages.

The default one is small, as it is made for virtual machines. The generic one has all
modules; templates that ask for it have them in their root.

Packages are unpacked into the cache and never installed: the host's boot loader
and ``/boot`` stay as they are. ``python -m qubes_itests.host.kernel fetch`` does
that at set-up; a run downloads nothing.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.host import packages
from qubes_itests.host.cache import Cache
from qubes_itests.host.command import run
from qubes_itests.host.confined import FOLLOW_US
from qubes_itests.host.exc import CommandError, NoKernelError, NoNetworkError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["DEFAULT", "GENERIC", "KERNELS", "Kernel", "fetch", "find_kernel", "unpack"]

DEFAULT: Final = "default"
GENERIC: Final = "generic"
#: For each kernel that a template may ask for what it is in the cache and in the table
#: of packages.
KERNELS: Final = {DEFAULT: "kernel", GENERIC: "generic-kernel"}

_IMAGE = "vmlinuz-"
_DEPENDS = re.compile(
    r"^ +Depends: (linux-(?:image|modules(?:-extra)?)-\d\S*)$", re.MULTILINE
)
_CANDIDATE = re.compile(r"^Version: (\S+)$", re.MULTILINE)
_LONG = 600.0


@dataclass(frozen=True)
class Kernel:
    """A kernel for guests."""

    #: Its release, as ``uname -r`` says it in the guest.
    version: str
    #: The bootable image.
    image: Path
    #: The directory of its modules, ``…/lib/modules/VERSION``.
    modules: Path


def find_kernel(cache: Cache, name: str = DEFAULT, *, host: Path = Path("/")) -> Kernel:
    """Return the kernel to boot guests with; nothing is downloaded.

    The generic one is the newest in the cache. The default one is, in this order:
    QUBES_ITESTS_KERNEL (``IMAGE`` or ``IMAGE:MODULES``; the modules are by default in
    ``../lib/modules/VERSION``), the newest in the cache, the newest that is installed
    on the host.

    :param name: one of `KERNELS`.
    :param host: the root directory of the host.
    :raises NoKernelError: there is none.
    """
    if name != DEFAULT:
        other = _newest(cache.entries(KERNELS[name]))
        if other is None:
            raise NoKernelError(f"no {name} one in {cache.root / KERNELS[name]}", name)
        return other
    named = os.environ.get("QUBES_ITESTS_KERNEL")
    if named:
        return _named(named)
    kind = KERNELS[DEFAULT]
    found = _newest(cache.entries(kind)) or _newest([host])
    if found is None:
        raise NoKernelError(f"none in {cache.root / kind} nor in {host / 'boot'}")
    return found


def fetch(cache: Cache, name: str = DEFAULT) -> Kernel:
    """Download a kernel of the distribution into the cache, unless it is there.

    Without network, a kernel that was fetched earlier will do.

    :param name: one of `KERNELS`.
    :raises NoNetworkError: there is none and none could be downloaded.
    :raises NoKernelError: this distribution is not known.
    """
    if name == DEFAULT and os.environ.get("QUBES_ITESTS_KERNEL"):
        return find_kernel(cache)
    kind = KERNELS[name]
    try:
        names = _package_names(_guest_package(kind))
        shown = run(["apt-cache", "show", "--no-all-versions", names[0]])
        version = found[1] if (found := _CANDIDATE.search(shown)) else "unknown"
        key = f"{names[0]}_{version}".replace(":", "-")

        def build(place: Path) -> None:
            modules = _download(names, place).modules
            if name != DEFAULT:
                # as they are, 400 MiB would go into each image
                _run_on(modules.rglob("*.ko"), ["zstd", "-q", "--rm"])
                return
            # these are read at each build of a first stage
            for suffix, tool in ((".zst", "zstd"), (".xz", "xz"), (".gz", "gzip")):
                remove = ["--rm"] if tool == "zstd" else []
                _run_on(modules.rglob(f"*.ko{suffix}"), [tool, "-q", "-d", *remove])

        cache.entry(kind, key, build)
    except NoNetworkError:
        if not cache.entries(kind):
            raise
    return find_kernel(cache, name)


def unpack(archives: Sequence[Path], directory: Path) -> Kernel:
    """Unpack kernel packages and return the kernel in them.

    Only the image and the modules are kept.

    :param archives: ``.deb`` files that together hold one kernel.
    :param directory: an empty directory.
    :raises NoKernelError: they hold no image, or no modules for it.
    """
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for archive in archives:
            run(["dpkg-deb", "--extract", archive, scratch], timeout=_LONG)
        root = Path(scratch)
        modules = next(root.glob("lib/modules"), root / "usr/lib/modules")
        if not ((root / "boot").is_dir() and modules.is_dir()):
            raise NoKernelError(f"none in {', '.join(a.name for a in archives)}")
        (root / "boot").rename(directory / "boot")
        (directory / "lib").mkdir()
        modules.rename(directory / "lib/modules")
    found = _newest([directory])
    if found is None:
        raise NoKernelError(f"no modules in {', '.join(a.name for a in archives)}")
    return found


def _named(setting: str) -> Kernel:
    named, _, directory = setting.partition(":")
    image = Path(named).absolute()
    version = image.name.removeprefix(_IMAGE)
    modules = image.parent.parent / "lib/modules" / version
    if directory:
        modules = Path(directory).absolute()
        version = modules.name
    if not (image.is_file() and modules.is_dir()):
        reason = f"QUBES_ITESTS_KERNEL names {image} and modules in {modules}"
        raise NoKernelError(reason)
    return Kernel(version, image, modules)


def _newest(roots: Iterable[Path]) -> Kernel | None:
    found = [
        Kernel(version, image, root / "lib/modules" / version)
        for root in roots
        for image in root.glob(f"boot/{_IMAGE}*")
        if (version := image.name.removeprefix(_IMAGE))
        and (root / "lib/modules" / version).is_dir()
    ]
    return max(found, key=_age, default=None)


def _age(kernel: Kernel) -> tuple[list[int], str]:
    return [int(n) for n in re.findall(r"\d+", kernel.version)], kernel.version


def _guest_package(kind: str) -> str:
    column = packages.distribution() or ""
    for need in packages.needs():
        if (need.kind, need.name) == ("guest", kind) and column in need.packages:
            return need.packages[column]
    raise NoKernelError("the kernel package of this distribution is not known")


def _package_names(meta: str) -> list[str]:
    names = _versioned(meta)
    if not names:
        _update()
        names = _versioned(meta)
    if not names:
        raise NoNetworkError(f"The package {meta}", "no package source offers it")
    # Ubuntu has the modules in packages that the image depends on.
    return names + [more for name in names for more in _versioned(name)]


def _versioned(package: str) -> list[str]:
    command = ["apt-cache", "depends", "--no-recommends", "--no-suggests", package]
    try:
        return list(dict.fromkeys(_DEPENDS.findall(run(command))))
    except CommandError:
        return []


def _download(names: Sequence[str], place: Path) -> Kernel:
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        command = ["apt-get", *_options(), "download", *names]
        try:
            _run_in(Path(scratch), command)
        except CommandError:
            # Lists that are too old name files that the archive has dropped.
            _update()
            _try_in(Path(scratch), command, ", ".join(names))
        archives = sorted(Path(scratch).glob("*.deb"))
        return unpack(archives, place)


def _update() -> None:
    _try_in(Path("/"), ["apt-get", *_options(), "update"], "The package lists")


def _try_in(directory: Path, command: list[str], wanted: str) -> None:
    try:
        _run_in(directory, command)
    except CommandError as error:
        last = error.stderr.splitlines()[-1:] or ["silent"]
        raise NoNetworkError(wanted, last[0]) from error


def _run_in(directory: Path, command: list[str]) -> None:
    # A download takes minutes: it ends with us, also when we are killed.
    run([*FOLLOW_US, "env", f"--chdir={directory}", *command], timeout=_LONG)


def _options() -> list[str]:
    # The download directory is root's own, which apt's user cannot write.
    return ["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2"]


def _run_on(paths: Iterable[Path], command: list[str]) -> None:
    files = sorted(paths)
    for start in range(0, len(files), 500):
        run([*command, *files[start : start + 500]], timeout=_LONG)


def main(arguments: Sequence[str]) -> int:
    """Serve ``python -m qubes_itests.host.kernel fetch [generic]``.

    :return: the exit status.
    """
    name = GENERIC if list(arguments) == ["fetch", GENERIC] else DEFAULT
    if list(arguments) != ["fetch", name][: len(arguments)] or not arguments:
        sys.stderr.write("usage: python -m qubes_itests.host.kernel fetch [generic]\n")
        return 4
    try:
        kernel = fetch(Cache(), name)
    except EnvironmentNotReadyError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"kernel for guests: {kernel.version}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
