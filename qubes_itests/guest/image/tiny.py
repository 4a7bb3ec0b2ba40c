"""The mini template `tiny`: the distribution's kernel, busybox, bash, and our agent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.exc import ImageError
from qubes_itests.guest.image.ext4 import make_root_image, root_directory
from qubes_itests.guest.image.initramfs import build_initramfs
from qubes_itests.guest.image.rootfs import SHARED, TOOLS, fill_rootfs, find_tool
from qubes_itests.guest.image.template import Template
from qubes_itests.host.cache import Cache, digest
from qubes_itests.host.command import CommandError, run

if TYPE_CHECKING:
    from qubes_itests.host.kernel import Kernel

__all__ = ["build_agent", "build_stage_one", "build_tiny"]

_HERE: Final = Path(__file__).parent
_AGENT_SOURCES: Final = _HERE.parent / "agent"
_ROOT_SIZE: Final = 128 << 20
_COMPILE_TIMEOUT: Final = 300.0
#: Whose text shapes the image.
_BUILDERS: Final = ("ext4", "rootfs", "tiny")
_STAGE_ONE_BUILDERS: Final = ("cpio", "initramfs", "modules")


def build_tiny(cache: Cache, kernel: Kernel) -> Template:
    """Return the mini template, built on first use. Blocking, about a second then.

    :param cache: where it is kept.
    :param kernel: what it boots; its modules go into the initramfs.
    :raise ImageError: it does not build.
    :raise MissingToolError: a program that builds it is not installed.
    """
    agent = build_agent(cache)
    key = digest(
        agent,
        *(find_tool(name) for name in ("busybox", *TOOLS)),
        *(_HERE / f"{name}.py" for name in _BUILDERS),
        *SHARED,
    )
    place = cache.entry("tiny", key, lambda where: _build(where, agent))
    return Template(
        name="tiny",
        kernel=kernel.image,
        initramfs=build_stage_one(cache, kernel),
        root_image=place / "root.img",
    )


def build_stage_one(cache: Cache, kernel: Kernel) -> Path:
    """Return the initramfs that all templates share, built on first use. Blocking.

    Templates that share it share its saved states, too.

    :raise ImageError: it does not build.
    """
    agent = build_agent(cache)
    key = digest(
        agent,
        kernel.version,
        kernel.image,
        *(_HERE / f"{name}.py" for name in _STAGE_ONE_BUILDERS),
    )

    def build(place: Path) -> None:
        initramfs = build_initramfs(agent, kernel.modules)
        (place / "initramfs.cpio").write_bytes(initramfs)

    return cache.entry("initramfs", key, build) / "initramfs.cpio"


def build_agent(cache: Cache) -> Path:
    """Return the guest's program, compiled on first use. Blocking.

    :raise ImageError: it does not compile.
    """
    return cache.entry("agent", digest(*_sources()), _compile) / "agent"


def _sources() -> list[Path]:
    found = (p for p in _AGENT_SOURCES.iterdir() if p.suffix in (".c", ".h"))
    return [*sorted(found), _AGENT_SOURCES / "Makefile"]


def _compile(place: Path) -> None:
    # a copy in the current directory: make has no way to quote what paths may hold
    for source in _sources():
        shutil.copyfile(source, place / source.name)
    try:
        command = ("env", f"--chdir={place}", "make", "--silent", "all")
        run(command, timeout=_COMPILE_TIMEOUT)
    except CommandError as error:
        raise ImageError("agent", error.stderr) from error


def _build(place: Path, agent: Path) -> None:
    with root_directory(place) as root:
        fill_rootfs(root, agent)
        make_root_image(root, place / "root.img", _ROOT_SIZE, "root")
