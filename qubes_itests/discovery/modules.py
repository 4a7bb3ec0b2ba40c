"""The protection of plugins from others that change `sys.modules`."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from typing import Any

__all__ = ["ModuleWatch"]


class ModuleWatch:
    """Remembers the loaded modules, and puts them back."""

    def __init__(self) -> None:
        self._before = dict(sys.modules)

    def restore(self) -> list[str]:
        """Undo replacements, removals and stand-ins for modules of Qubes.

        :return: names of modules that had been there before and were not the same;
            a stand-in for one that is missing is removed without a word.
        """
        changed = [
            name
            for name, module in self._before.items()
            if sys.modules.get(name) is not module
        ]
        for name in changed:
            sys.modules[name] = self._before[name]
        for name in sys.modules.keys() - self._before.keys():
            of_qubes = name.partition(".")[0] in ("qubes", "qubesadmin", "qubes_itests")
            if of_qubes and _is_made_by_hand(name, sys.modules[name]):
                del sys.modules[name]
        for name in changed:
            # an import binds a module in its parent, too, where others find it
            parent, _, child = name.rpartition(".")
            if parent in sys.modules and child in vars(sys.modules[parent]):
                setattr(sys.modules[parent], child, sys.modules[name])
        return sorted(changed)


def _is_made_by_hand(name: str, module: Any) -> bool:
    """Return whether no import has made this: an import leaves a spec of its own."""
    try:
        spec = module.__spec__
    except AttributeError:
        return True
    return not isinstance(spec, ModuleSpec) or spec.name != name
