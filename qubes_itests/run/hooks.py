"""Hooks: the offers of plugins, and those of the bundled one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING, Any, Final

import pluggy

from qubes_itests import hookspec
from qubes_itests.exc import HarnessError
from qubes_itests.hookspec import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping
    from pathlib import Path

    from qubes_itests.guest.image.template import Template
    from qubes_itests.host.cache import Cache
    from qubes_itests.host.kernel import Kernel
    from qubes_itests.hypervisor.contract import Hypervisor

__all__ = ["Bundled", "offer", "offers", "registry"]

#: As in guest.image.debian, which is not imported before it is used.
_DEBIAN: Final = ("debian-12", "debian-13")


class Bundled:
    """The bundled plugin; what it offers is imported when it is used."""

    @hookimpl
    def qubes_itests_templates(
        self,
    ) -> Mapping[str, Callable[[Cache, Kernel], Template]]:
        """Return the mini template, and those of Debian."""
        return {
            "tiny": _tiny,
            **{name: functools.partial(_debian, name) for name in _DEBIAN},
        }

    @hookimpl
    def qubes_itests_downloads(
        self,
    ) -> Mapping[str, Callable[[Cache, Callable[[str], None]], object]]:
        """Return what fetches the packages of Debian."""
        return {name: functools.partial(_fetch_debian, name) for name in _DEBIAN}

    @hookimpl
    def qubes_itests_filesystems(
        self,
    ) -> Mapping[str, Callable[[Path, int], contextlib.AbstractContextManager[Path]]]:
        """Return the filesystems over loop devices."""

        def maker(
            name: str,
        ) -> Callable[[Path, int], contextlib.AbstractContextManager[Path]]:
            return lambda directory, size: _filesystem(name, directory, size)

        return {name: maker(name) for name in ("btrfs", "xfs", "ext4")}

    @hookimpl
    def qubes_itests_hypervisors(
        self,
    ) -> Mapping[str, Callable[[Path, Cache, Kernel], Coroutine[Any, Any, Hypervisor]]]:
        """Return the back ends over libvirt."""
        return {"qemu": _qemu, "test": _test}


def registry() -> pluggy.PluginManager:
    """Return a plugin manager with the bundled plugin and all installed ones."""
    plugins = pluggy.PluginManager(hookspec.PROJECT)
    plugins.add_hookspecs(hookspec)
    plugins.register(Bundled(), "bundled")
    plugins.load_setuptools_entrypoints(hookspec.PROJECT)
    return plugins


def _tiny(cache: Cache, kernel: Kernel) -> Template:
    from qubes_itests.guest.image.tiny import build_tiny

    return build_tiny(cache, kernel)


def _debian(name: str, cache: Cache, kernel: Kernel) -> Template:
    from qubes_itests.guest.image.debian import RELEASES, build_debian

    return build_debian(cache, kernel, RELEASES[name])


def _fetch_debian(name: str, cache: Cache, say: Callable[[str], None]) -> object:
    from qubes_itests.guest.image.debian import RELEASES, fetch_base

    return fetch_base(cache, RELEASES[name], say)


@contextlib.contextmanager
def _filesystem(name: str, directory: Path, size: int) -> Iterator[Path]:
    from qubes_itests.host.filesystem import (
        FilesystemType,
        LoopFilesystem,
    )

    image, place = directory / f"{name}.img", directory / name
    with LoopFilesystem(image, place, kind=FilesystemType(name), size=size) as made:
        yield made.mount_point


async def _qemu(directory: Path, cache: Cache, kernel: Kernel) -> Hypervisor:
    from qubes_itests.hypervisor.kvm import kvm_usable
    from qubes_itests.hypervisor.qemu import QemuHypervisor

    verdict = await asyncio.to_thread(kvm_usable, cache, kernel.image)
    return await QemuHypervisor.open(directory, cache, kvm=verdict.usable)


async def _test(directory: Path, cache: Cache, _kernel: Kernel) -> Hypervisor:
    from qubes_itests.hypervisor.testdriver import TestHypervisor

    return await TestHypervisor.open(directory, cache)


def offers(plugins: pluggy.PluginManager, kind: str) -> Mapping[str, Any]:
    """Return what all plugins offer of one kind, by name.

    :param kind: ``templates``, ``filesystems`` or ``hypervisors``.
    """
    # The first plugin in pluggy's order wins, so that others can replace ours.
    found: dict[str, Any] = {}
    for offered in getattr(plugins.hook, f"qubes_itests_{kind}")():
        for name, value in offered.items():
            found.setdefault(name, value)
    return found


def offer(plugins: pluggy.PluginManager, kind: str, name: str) -> Any:
    """Return what the plugins offer of one kind under a name.

    :raise HarnessError: when there is none of that name; it lists those that there are.
    """
    found = offers(plugins, kind)
    if name not in found:
        known = ", ".join(sorted(found))
        raise HarnessError(f"there is no {kind[:-1]} {name!r}; there are: {known}")
    return found[name]
