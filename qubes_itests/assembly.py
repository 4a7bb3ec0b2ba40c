"""Puts a testbed together from what the plugins offer."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qubes_itests.balancing.app_memory import machine
from qubes_itests.exc import HarnessError
from qubes_itests.host.kernel import find_kernel
from qubes_itests.testbed import Parts, Testbed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import pluggy

    from qubes_itests.configuration import Settings
    from qubes_itests.core.policy.directory import PolicyFile
    from qubes_itests.host.cache import Cache
    from qubes_itests.portal import Portal

__all__ = ["offers", "open_testbed"]

#: Bytes of the filesystem with the VMs' disks; its image is sparse.
_POOL_SIZE = 64 << 30


@contextlib.contextmanager
def open_testbed(
    portal: Portal,
    cache: Cache,
    directory: Path,
    settings: Settings,
    plugins: pluggy.PluginManager,
    *,
    pool: Path | None = None,
    policy: tuple[PolicyFile, ...] = (),
) -> Iterator[Testbed]:
    """Make the pool's filesystem, connect to the hypervisor, open the testbed.

    :param directory: of the run; it has a short path.
    :param pool: a directory on a filesystem with reflinks; None to make one.
    :param policy: files of qrexec policy that apps begin with, beside the default.
    :raise EnvironmentNotReadyError: when the machine lacks something.
    """
    kernel = find_kernel(cache)
    templates = {
        name: functools.partial(build, cache, kernel)
        for name, build in offers(plugins, "templates").items()
    }
    connect = _one(plugins, "hypervisors", settings.hypervisor)
    # tests write beside it, under any names, and an opening that failed has left some
    directory = Path(tempfile.mkdtemp(dir=directory, prefix=""))
    own, vms = directory / "hv", directory / "vm"
    for place in (own, vms):
        place.mkdir()
    with _pool(plugins, settings, directory, pool) as mounted:
        parts = Parts(
            run_directory=vms,
            pool_directory=mounted,
            cache=cache,
            open_hypervisor=functools.partial(connect, own, cache, kernel),
            templates=templates,
            warm=settings.warm,
            memory=machine(size) if (size := settings.memory_budget) else None,
            host_memory=settings.host_memory or None,
            start_timeout=settings.start_timeout or None,
            run_templates=settings.templates,
            policy=policy,
        )
        with Testbed(portal, parts) as testbed:
            yield testbed


def _pool(
    plugins: pluggy.PluginManager,
    settings: Settings,
    directory: Path,
    given: Path | None,
) -> contextlib.AbstractContextManager[Path]:
    if given is not None:
        return contextlib.nullcontext(given)
    make = _one(plugins, "filesystems", settings.filesystem)
    place = directory / "pool"
    place.mkdir()
    made: contextlib.AbstractContextManager[Path] = make(place, _POOL_SIZE)
    return made


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


def _one(plugins: pluggy.PluginManager, kind: str, name: str) -> Any:
    found = offers(plugins, kind)
    if name not in found:
        known = ", ".join(sorted(found))
        raise HarnessError(f"there is no {kind[:-1]} {name!r}; there are: {known}")
    return found[name]
