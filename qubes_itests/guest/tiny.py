"""The mini template `tiny`: the distribution's kernel, busybox, bash, and our agent."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.exc import ImageError
from qubes_itests.guest.ext4 import make_root_image
from qubes_itests.guest.initramfs import build_initramfs
from qubes_itests.guest.rootfs import TOOLS, fill_rootfs, find_tool
from qubes_itests.guest.template import Template
from qubes_itests.host.cache import Cache, digest
from qubes_itests.host.command import CommandError, run

if TYPE_CHECKING:
    from qubes_itests.host.kernel import Kernel

__all__ = ["build_agent", "build_stage_one", "build_tiny"]

_HERE: Final = Path(__file__).parent
_AGENT_SOURCES: Final = _HERE / "agent"
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
    sources = sorted(p for p in _AGENT_SOURCES.iterdir() if p.suffix in (".c", ".h"))
    key = digest(*sources, _AGENT_SOURCES / "Makefile")
    return cache.entry("agent", key, _compile) / "agent"


def _compile(place: Path) -> None:
    command: list[str | Path] = [
        "make",
        "--silent",
        "-C",
        _AGENT_SOURCES,
        f"O={place}",
        "all",
    ]
    try:
        run(command, timeout=_COMPILE_TIMEOUT)
    except CommandError as error:
        raise ImageError("agent", error.stderr) from error


def _build(place: Path, agent: Path) -> None:
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        fill_rootfs(Path(scratch), agent)
        Path(scratch).chmod(0o755)
        make_root_image(Path(scratch), place / "root.img", _ROOT_SIZE, "root")
