"""The finder behind all others."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from .module import AliasModule
from .table import ALIASES

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["AliasFinder", "install", "uninstall"]

_TOP = "qubes"


class AliasFinder(MetaPathFinder, Loader):
    """Finds the modules of :data:`.table.ALIASES`, and makes them."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a module of ours; None for what is not ours to answer.

        :raise ModuleNotFoundError: for a module below a ``qubes`` of ours that is in no
            table.
        """
        del path, target
        top, _, below = fullname.partition(".")
        if top != _TOP or (below and not isinstance(sys.modules.get(top), AliasModule)):
            return None
        if fullname not in ALIASES:
            # without name=, or `from qubes.x import y` would swallow the sentence
            raise ModuleNotFoundError(
                f"qubes_itests does not provide {fullname}, and no Qubes OS is"
                " installed"
            )
        # all are packages: then a missing name is asked for here, and gets our sentence
        return ModuleSpec(fullname, self, origin="qubes_itests", is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the empty module."""
        return AliasModule(spec.name, f"Stands for {spec.name} of Qubes OS.")

    def exec_module(self, module: ModuleType) -> None:
        """Fill it."""
        assert isinstance(module, AliasModule)  # noqa: S101 - it is from create_module
        module.provide()


def install() -> None:
    """Offer our modules where no real one is found; idempotent."""
    if not any(isinstance(finder, AliasFinder) for finder in sys.meta_path):
        # last, so that what is installed is found first, whenever it was installed
        sys.meta_path.append(AliasFinder())


def uninstall() -> None:
    """Take the finder away, and the modules that it made."""
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, AliasFinder)]
    for name, module in tuple(sys.modules.items()):
        if isinstance(module, AliasModule):
            del sys.modules[name]
