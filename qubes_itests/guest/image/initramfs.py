"""Initramfs of stage one: the agent as init, and the modules it loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_itests.guest.image.cpio import Archive
from qubes_itests.guest.image.modules import STAGE_ONE, STAGE_ONE_IF_THERE, ModuleTree

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["build_initramfs"]


def build_initramfs(
    agent: Path, modules: Path, wanted: Iterable[str] = STAGE_ONE
) -> bytes:
    """Return an initramfs; the same input gives the same bytes. Blocking.

    It is not compressed: unpacking costs an emulated CPU more than reading.

    :param agent: the guest's program.
    :param modules: the kernel's ``lib/modules/VERSION``.
    :param wanted: names of modules; what they need comes along.
    :raise ImageError: a module is missing.
    """
    tree = ModuleTree(modules)
    names = tree.resolve(wanted, STAGE_ONE_IF_THERE)
    archive = Archive()
    for directory in ("dev", "lib", "proc", "root", "run", "sys", "tmp"):
        archive.directory(directory)
    # what the kernel opens for init before anything is mounted
    archive.device("dev/console", 5, 1)
    archive.file("init", agent.read_bytes(), 0o755)
    for name in names:
        archive.file(f"lib/{name}.ko", tree.read(name))
    listed = "".join(f"/lib/{name}.ko\n" for name in names)
    archive.file("modules", listed.encode())
    return archive.to_bytes()
