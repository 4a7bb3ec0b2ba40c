"""The result of a search for plugins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import unittest
    from types import ModuleType

    from .extensions import PluginExtensions

__all__ = ["GROUP", "GROUP_FOR_TEMPLATE", "Plugin", "Problem", "TestClass"]

#: Entry points of plugins whose tests are run once.
GROUP: Final = "qubes.tests.extra"

#: Entry points of plugins whose tests are run once per template.
GROUP_FOR_TEMPLATE: Final = "qubes.tests.extra.for_template"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something of a plugin that cannot be run as it is.

    :param summary: one sentence for the plugin's author.
    :param detail: a traceback, or nothing.
    """

    summary: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.summary}\n\n{self.detail}".rstrip()


@dataclass(frozen=True, slots=True)
class TestClass:
    """A class to run.

    :param cls: the class; for a template, a subclass made for it.  Methods that look
        like tests and would pass without being run are hidden in it (they are None);
        the plugin has a problem for each.
    :param template: the name of the template, None for a class that is run once.
    """

    __test__ = False  # pytest: not a class of tests

    cls: type[unittest.TestCase]
    template: str | None = None

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.cls.__name__


@dataclass(frozen=True, slots=True)
class Plugin:
    """One entry point, and what it came to.

    :param name: of the entry point.
    :param group: :data:`GROUP` or :data:`GROUP_FOR_TEMPLATE`; the same name may be in
        both.
    :param target: what the entry point names, as ``module:callable``.
    :param distribution: name of the distribution that it belongs to.
    :param module: the module that it names, None when that did not load.
    :param classes: what to run.
    :param extensions: of its distribution, which other plugins of that share.
    :param problems: all of them make up one failing test, named after the entry point.
    """

    name: str
    group: str
    target: str = ""
    distribution: str = ""
    module: ModuleType | None = None
    classes: tuple[TestClass, ...] = ()
    extensions: PluginExtensions | None = None
    problems: tuple[Problem, ...] = ()
