"""pytest nodes for entry points, which are no files."""

from __future__ import annotations

import difflib
import os
import types
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.exc import HarnessError
from qubes_itests.program import typed
from qubes_itests.run.plugins import PROBLEM, meant, named_plugins
from qubes_itests.run.result import Prepared
from qubes_itests.run.settings import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from qubes_itests.discovery import Plugin

__all__ = [
    "PluginNode",
    "ProblemItem",
    "Selection",
    "collect",
    "nodes",
]


class ProblemItem(pytest.Item):
    """A test that fails because its plugin, or the test itself, cannot be run.

    :param text: what is wrong, for the plugin's author.
    """

    def __init__(self, *, text: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._text = text

    def runtest(self) -> None:
        """Fail."""
        raise HarnessError(self._text)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:  # type: ignore[override]
        """Return the text: where it was raised is of no interest."""
        # what ends with this item may have errors of its own: fixtures of a session
        if str(excinfo.value) == self._text:
            return self._text
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[str, int | None, str]:
        """Return where it comes from."""
        return str(self.path), None, f"{self.path.name}: the plugin itself"


class PluginNode(pytest.Module):
    """An entry point and the test classes that it lists.

    :param plugin: what discovery found of it.
    """

    def __init__(self, *, plugin: Plugin, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.plugin = plugin

    def _getobj(self) -> types.ModuleType:
        return self.plugin.module or types.ModuleType(self.name)

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """Hand each class to the plugin that makes nodes of classes."""
        if self.plugin.problems:
            text = "\n\n".join(map(str, self.plugin.problems))
            yield ProblemItem.from_parent(self, name=PROBLEM, text=text)
        # What pytest does for a file, so that setUpModule works.
        self._register_setup_module_fixture()
        for entry in self.plugin.classes:
            made = self.ihook.pytest_pycollect_makeitem(
                collector=self, name=entry.name, obj=entry.cls
            )
            for node in made if isinstance(made, list) else [made]:
                if isinstance(node, pytest.Class):
                    # pytest looks it up in our module; it may be of another one
                    node.obj = entry.cls
                if node is not None:
                    yield node


class Selection:
    """Which tests the words on the command line mean.

    :param words: ids of tests, or how ids begin; none for all tests.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(word.rstrip(":/") for word in words)

    def of(self, items: Sequence[pytest.Item]) -> list[pytest.Item]:
        """Return the items that are meant, in their order.

        :raise pytest.UsageError: when a word means no test.
        """
        if not self._words:
            return list(items)
        ids = [item.nodeid for item in items]
        chosen = {name for word in self._words for name in _meant(word, ids)}
        return [item for item in items if item.nodeid in chosen]


def nodes(
    session: pytest.Session, templates: Sequence[str], words: Sequence[str] = ()
) -> Iterator[PluginNode]:
    """Yield a node for each entry point.

    :param templates: for the classes that are run once per template.
    :param words: as for `named_plugins`.
    """
    for name, plugin in named_plugins(templates, words):
        # No such file: the path is what pytest makes the ids from.
        path = session.config.rootpath / name
        yield PluginNode.from_parent(session, name=name, path=path, plugin=plugin)


def collect(
    session: pytest.Session, nodes: Iterable[PluginNode], selection: Selection
) -> None:
    """Fill a session with the tests below some nodes, as pytest does with files."""
    hook = session.config.hook
    try:
        found = [item for node in nodes for item in session.genitems(node)]
        session.items = selection.of(found)
        session.config.pluginmanager.check_pending()
        hook.pytest_collection_modifyitems(
            session=session, config=session.config, items=session.items
        )
    finally:
        hook.pytest_collection_finish(session=session)
    session.testscollected = len(session.items)


def _meant(word: str, ids: Sequence[str]) -> list[str]:
    if found := meant(word, ids):
        return found
    # Of a plugin that cannot be run there is one test only, which says why.
    if (problem := f"{word.partition('::')[0]}::{PROBLEM}") in ids:
        return [problem]
    known = {"::".join(name.split("::")[:n]) for name in ids for n in (1, 2, 3)}
    close = difflib.get_close_matches(word, sorted(known), n=1)
    if os.path.isdir(word):  # noqa: PTH112 - Path raises for what is too long
        close = [f"--app {word}"]
    hint = f" Did you mean {close[0]}?" if close else ""
    told = Prepared.told().words
    taken = {o.spellings()[0] for o in OPTIONS.values() if "list" in o.commands}
    pairs = zip(told[::2], told[1::2], strict=True)
    words = [text for pair in pairs if pair[0] in taken for text in pair]
    raise pytest.UsageError(
        f"no test's id begins with {word!r}.{hint} `{typed('list', *words)}` shows all."
    )
