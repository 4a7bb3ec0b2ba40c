"""A module whose names live in other modules."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .table import ALIASES

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["AliasModule"]


class AliasModule(ModuleType):
    """A module whose public names are read from, and set in, the modules behind it.

    A test that patches a name in it patches the real thing.
    """

    def provide(self) -> None:
        """Learn which names there are, importing what must be asked for them.

        What the table lists name by name is imported when it is used: `import qubes`
        alone has to be quick.
        """
        homes: dict[str, tuple[str, str]] = {}
        for source in ALIASES[self.__name__]:
            for name, home, theirs in _names(source):
                homes.setdefault(name, (home, theirs))
        # past our own `__setattr__`, which asks for it
        vars(self)["_homes"] = homes

    def _home(self, name: str) -> tuple[ModuleType, str] | None:
        homes: dict[str, tuple[str, str]] = vars(self).get("_homes", {})
        if name not in homes:
            return None
        module, theirs = homes[name]
        return importlib.import_module(module), theirs

    def __getattr__(self, name: str) -> Any:
        if home := self._home(name):
            return getattr(*home)
        if name == "__all__":
            return sorted(vars(self).get("_homes", ()))
        if (full := f"{self.__name__}.{name}") in ALIASES:
            return importlib.import_module(full)
        raise AttributeError(
            f"qubes_itests does not provide {full}", name=name, obj=self
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if home := self._home(name):
            setattr(*home, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if home := self._home(name):
            delattr(*home)
        else:
            super().__delattr__(name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *vars(self).get("_homes", ())})


def _names(source: str) -> Iterator[tuple[str, str, str]]:
    """Yield (name here, module, name there) for an entry of the table."""
    module, _, one = source.partition(":")
    if one:
        theirs, _, ours = one.partition("=")
        yield ours or theirs, module, theirs
        return
    for name in importlib.import_module(module).__all__:
        yield name, module, name
