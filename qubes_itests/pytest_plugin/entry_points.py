"""The installed plugins as pytest nodes."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

from qubes_itests.discovery import GROUP, Selection, discover
from qubes_itests.discovery.selection import TEMPLATES
from qubes_itests.pytest_plugin.collection import PluginNode, node_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pytest

    from qubes_itests.discovery import Plugin

__all__ = ["find", "named", "nodes"]


def find(templates: Sequence[str]) -> list[Plugin]:
    """Return the installed plugins that this environment includes.

    :param templates: for the classes that are run once per template.
    """
    # The settings know that variable already; what they say is final.
    environment = {k: v for k, v in os.environ.items() if k != TEMPLATES}
    return discover(Selection.from_environment(environment, templates))


def named(plugins: Sequence[Plugin]) -> list[tuple[str, Plugin]]:
    """Return the plugins with the names that test ids begin with.

    An entry point's name may stand in both groups: ``NAME@once`` is then the one
    whose tests do not depend on the template.
    """
    count = Counter(node_name(plugin.name) for plugin in plugins)
    taken: Counter[str] = Counter()
    result = []
    for plugin in plugins:
        name = node_name(plugin.name)
        if count[name] > 1 and plugin.group == GROUP:
            name += "@once"
        taken[name] += 1
        result.append((name + "+" * (taken[name] - 1), plugin))
    return result


def nodes(session: pytest.Session, templates: Sequence[str]) -> Iterator[PluginNode]:
    """Yield a node for each entry point."""
    for name, plugin in named(find(templates)):
        yield PluginNode.from_parent(
            session,
            name=name,
            path=session.config.rootpath / name,
            plugin=plugin,
        )
