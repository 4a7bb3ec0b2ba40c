"""The extensions of a plugin: there while its tests run, and gone for those of others.

An extension listens to all VMs.  In Qubes OS what is installed is one system; here
plugins that do not know each other are tested in one process.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import importlib.metadata
    from collections.abc import Iterable, Iterator

    from qubes_itests.core.ext import Extension

__all__ = ["DEVICES_GROUP", "EXTENSIONS_GROUP", "PluginExtensions"]

#: Entry points whose classes are made once when the core starts.
EXTENSIONS_GROUP: Final = "qubes.ext"
#: Entry points that name classes of devices.
DEVICES_GROUP: Final = "qubes.devices"


class PluginExtensions:
    """What a distribution brings, and what its code makes while it loads or is tested.

    :param distribution: its name; empty for none.
    :param installed: the entry points of both groups, of all distributions.
    """

    def __init__(
        self, distribution: str, installed: Iterable[importlib.metadata.EntryPoint]
    ) -> None:
        own = [e for e in installed if e.dist and e.dist.name == distribution]
        self._extensions = [e for e in own if e.group == EXTENSIONS_GROUP]
        self._devices = [e.name for e in own if e.group == DEVICES_GROUP]
        self._kept: list[Extension] = []
        self._added: list[str] = []

    @contextlib.contextmanager
    def kept_away(self) -> Iterator[None]:
        """Have extensions that the plugin makes in here wait for `enter`."""
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Have the extensions called; what an entry point raises is the caller's."""
        for extension in self._kept:
            extension.register()
        if self._devices:
            from qubes_itests.core.device.collections import DEVICE_CLASSES  # noqa: PLC0415

            self._added = [n for n in self._devices if n not in DEVICE_CLASSES]
            DEVICE_CLASSES.extend(self._added)
        for entry in self._extensions:
            _make(entry)

    def leave(self) -> None:
        """Have them called no more, nor any other; an app's own ones go on."""
        if self._added:
            from qubes_itests.core.device.collections import DEVICE_CLASSES  # noqa: PLC0415

            for name in self._added:
                DEVICE_CLASSES.remove(name)
            self._added = []
        # to import it would take its time, and nobody has made an extension without it
        ext = sys.modules.get("qubes_itests.core.ext")
        registered = ext.registered_extensions() if ext is not None else ()
        # What tests have made is kept, too: for the next test of this plugin it is
        # there.
        self._kept = list(registered)
        for extension in self._kept:
            extension.unregister()


def _make(entry: importlib.metadata.EntryPoint) -> None:
    made: Any = entry.load()
    made()
