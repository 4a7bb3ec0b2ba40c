"""What other distributions can add: templates, filesystems, back ends, artefacts.

A plugin is a module of a distribution with an entry point in the group
``qubes_itests``; its functions are marked by `hookimpl`::

    from qubes_itests.hookspec import hookimpl

    @hookimpl
    def qubes_itests_templates():
        return {"alpine": build_alpine}

A conftest.py of a plain pytest suite may have such functions too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.guest.image.template import Template
    from qubes_itests.host.cache import Cache
    from qubes_itests.host.kernel import Kernel
    from qubes_itests.hypervisor.contract import Hypervisor

__all__ = ["PROJECT", "hookimpl", "hookspec"]

PROJECT = "qubes_itests"

hookspec = pluggy.HookspecMarker(PROJECT)
#: Marks a function that implements a hook.
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def qubes_itests_templates() -> Mapping[str, Callable[[Cache, Kernel], Template]]:
    """Return templates: by name, a function that builds it.

    The function blocks; it puts what it builds into the cache, and is quick when it
    is there already.
    """
    raise NotImplementedError


@hookspec
def qubes_itests_downloads() -> Mapping[
    str, Callable[[Cache, Callable[[str], None]], object]
]:
    """Return what templates need of the network: by name, a function that fetches it.

    A run has no network, so the function is called before it begins. It blocks, puts
    what it fetches into the cache, and is quick when it is there already; its second
    argument takes short phrases that say what is going on.
    """
    raise NotImplementedError


@hookspec
def qubes_itests_filesystems() -> Mapping[
    str, Callable[[Path, int], AbstractContextManager[Path]]
]:
    """Return filesystems: by name, a function that makes a fresh one.

    It gets an empty directory for the image and the mount point, and the size in
    bytes; it returns a context manager whose value is where the filesystem is mounted.
    """
    raise NotImplementedError


@hookspec
def qubes_itests_hypervisors() -> Mapping[
    str, Callable[[Path, Cache, Kernel], Coroutine[Any, Any, Hypervisor]]
]:
    """Return back ends: by name, a coroutine function that opens one.

    It gets a directory of the run's own, the cache, and the kernel for guests.
    """
    raise NotImplementedError


@hookspec
def qubes_itests_artifacts(test: str, vm: QubesVM, directory: Path) -> Iterable[Path]:
    """Write more files about a VM of a failed test, before the VM is removed.

    :param test: the test's id.
    :param vm: the VM, as the core knows it; it may be in any state.
    :param directory: an existing directory to write into.
    :return: the files written.
    """
    raise NotImplementedError
