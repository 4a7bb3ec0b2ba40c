"""The modules that a plugin looked for while it loaded, and did not find."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any, Self

__all__ = ["Probes"]


class Probes(MetaPathFinder):
    """Listens to the imports of a package, as a context; finds nothing itself.

    A plugin may catch the error of an import and then list no test: this tells why.

    :param package: the top of the names of the modules that are listened to.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._asked: dict[str, None] = {}

    def __enter__(self) -> Self:
        # first: one of the others may raise
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *_exc: object) -> None:
        sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Take note of a name that a module of the package asks for."""
        del path, target
        frame = sys._getframe(1)  # noqa: SLF001 - there is no other way
        while frame.f_back is not None and str(
            frame.f_globals.get("__name__")
        ).startswith("importlib"):
            frame = frame.f_back
        if str(frame.f_globals.get("__name__")).partition(".")[0] == self._package:
            self._asked[fullname] = None

    def missing(self) -> list[str]:
        """Return the names of modules that were not found, in the order of asking.

        A name that a module was asked for, as in ``from module import name``, is looked
        for as a module too; where there is none, it is one of these.
        """
        parts = {name: name.rpartition(".") for name in self._asked}
        return [
            name
            for name, (parent, _, child) in parts.items()
            if name not in sys.modules and not hasattr(sys.modules.get(parent), child)
        ]
