"""The test plugins of this environment, with the ids of their tests."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import unittest
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests import import_alias
from qubes_itests.discovery import GROUP, Plugin, Selection, discover
from qubes_itests.discovery.core_suites import (
    core_imports,
    core_suites,
    suites_for_ours,
)
from qubes_itests.discovery.result import Problem
from qubes_itests.discovery.selection import TEMPLATES
from qubes_itests.discovery.sources import name_authors_files
from qubes_itests.dom0 import modules
from qubes_itests.run.result import Prepared

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


__all__ = ["PROBLEM", "meant", "named_plugins", "node_name", "test_ids"]

#: Name of the test that fails when something is wrong with a plugin itself.
PROBLEM = "plugin"


def named_plugins(
    templates: Sequence[str], words: Sequence[str] = ()
) -> list[tuple[str, Plugin]]:
    """Load the plugins that this environment includes.

    An entry point's name may stand in both groups: ``NAME@once`` is then the one
    whose tests do not depend on the template.

    :param templates: for the classes that are run once per template.
    :param words: ids of tests or how ids begin; of a core under test only suites that
        they can mean are loaded. None for all.
    :return: each with the name that the ids of its tests begin with.
    """
    told = Prepared.told()
    name_authors_files(told.copies)
    if told.core:
        return _on_core(told, templates, words)
    import_alias.install()
    if not told.core_suites:
        return _named(_chosen(told, templates))
    found = _named(_chosen(told, templates)) if told.entries is not None else []
    if words or told.entries is None:
        suites = suites_for_ours(Path(told.core_suites), templates, words)
        found += [(suite.name, suite) for suite in suites]
    return found


def _on_core(
    told: Prepared, templates: Sequence[str], words: Sequence[str]
) -> list[tuple[str, Plugin]]:
    """Load the plugins of apps, and suites of the core itself.

    Beside apps only such suites as words mean.
    """
    # a real `qubes` is found now, and what it imports has to be there before it is
    modules.install()
    source = Path(told.core)
    found: list[tuple[str, Plugin]] = []
    with core_imports(source, Path(told.copies[told.core]), templates) as programs:
        if told.entries is not None:
            found = [
                # the core itself loads the extensions that apps bring
                (name, dataclasses.replace(plugin, extensions=programs))
                for name, plugin in _named(_chosen(told, templates))
            ]
        if words or told.entries is None:
            suites = core_suites(source, programs, words)
            found += [(suite.name, suite) for suite in suites]
    return found


def _named(plugins: Sequence[Plugin]) -> list[tuple[str, Plugin]]:
    count = Counter(node_name(plugin.name) for plugin in plugins)
    taken: Counter[str] = Counter()
    result = []
    for plugin in plugins:
        name = node_name(plugin.name)
        if count[name] > 1 and plugin.group == GROUP:
            name += "@once"
        taken[name] += 1
        # Two distributions may use one name; `list` shows that, and one can be renamed.
        result.append((name + "+" * (taken[name] - 1), plugin))
    return result


def _chosen(prepared: Prepared, templates: Sequence[str]) -> list[Plugin]:
    """Return the plugins that the environment selects; of apps, if there are apps."""
    # The settings know that variable already; what they say is final.
    environment = {k: v for k, v in os.environ.items() if k != TEMPLATES}
    selection = Selection.from_environment(environment, templates)
    if prepared.entries is None:
        return discover(selection)
    if selection.include is None:
        only = frozenset(prepared.entries)
        selection = dataclasses.replace(selection, include=only)
    found = discover(selection) if selection.include else []
    found = [_limited(p, prepared.entries.get(p.name)) for p in found]
    broken = (
        Plugin(name=app, group=GROUP, problems=(Problem(text),))
        for app, text in prepared.apps.items()
    )
    return [*found, *broken]


def _limited(plugin: Plugin, templates: tuple[str, ...] | None) -> Plugin:
    """Return a plugin without the classes for templates that its app does not want."""
    classes = tuple(
        entry
        for entry in plugin.classes
        if None in (templates, entry.template) or entry.template in (templates or ())
    )
    return dataclasses.replace(plugin, classes=classes)


def test_ids(name: str, plugin: Plugin) -> Iterator[tuple[str, str | None]]:
    """Yield the ids of a plugin's tests, each with its template.

    :param name: what the ids begin with.
    """
    if plugin.problems:
        yield f"{name}::{PROBLEM}", None
    for entry in plugin.classes:
        cls = entry.cls
        if inspect.isabstract(cls) or not getattr(cls, "__test__", True):
            continue
        for method in unittest.TestLoader().getTestCaseNames(cls):
            if getattr(getattr(cls, method), "__test__", True):
                yield f"{name}::{entry.name}::{method}", entry.template


def meant(word: str, ids: Sequence[str]) -> list[str]:
    """Return the ids of tests that a selector means."""
    # Whole names first: `test_1` shall not run test_10 too.
    ends = tuple(word + end for end in ("::", "@", "["))
    whole = [name for name in ids if name == word or name.startswith(ends)]
    return whole or [name for name in ids if name.startswith(word)]


def node_name(name: str) -> str:
    """Return what the ids of an entry point's tests begin with."""
    return re.sub(r"[^A-Za-z0-9_.@+-]", "_", name) or "_"
