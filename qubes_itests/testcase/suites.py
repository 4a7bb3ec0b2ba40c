"""Functions and decorators of `qubes.tests` that suites of Qubes OS import.

Test classes for each template, tests that are skipped or expected to fail, and a pause
for debugging.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import subprocess
import traceback
import unittest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import ModuleType

__all__ = [
    "create_testcases_for_templates",
    "expectedFailureIfTemplate",
    "expects_failure",
    "in_dom0",
    "list_templates",
    "maybe_create_testcases_on_import",
    "skipIfTemplate",
    "skipUnlessDom0",
    "skipUnlessEnv",
    "skipUnlessGit",
    "skipped_template",
    "substitute_entry_points",
    "wait_on_fail",
]

P = ParamSpec("P")
R = TypeVar("R")

#: Here tests always have the part of dom0.
in_dom0: Final = True

#: Names of templates; set while plugins load.
_TEMPLATES: Final = "QUBES_TEST_TEMPLATES"


def list_templates() -> tuple[str, ...]:
    """Return the names of the templates that the run is about.

    :raise HarnessError: outside a run, unless QUBES_TEST_TEMPLATES names them.
    """
    if named := os.environ.get(_TEMPLATES, "").split():
        return tuple(dict.fromkeys(named))
    from qubes_itests.run import testbed  # noqa: PLC0415 - `list` has no need of it

    return testbed.current().run_templates


def create_testcases_for_templates(
    name: str, *bases: type, module: ModuleType, **attributes: Any
) -> Iterator[str]:
    """Make a class per template, in a module; one that is there already stays.

    Suites do this twice: on import, and when they are asked for their tests.

    :param name: what the classes are called; ``_TEMPLATE`` is added.
    :param bases: their base classes.
    :param module: that they become part of.
    :param attributes: that they have beside `template`.
    :return: yields their full names, as `unittest.TestLoader.loadTestsFromNames` takes.
    """
    for template in list_templates():
        full = f"{name}_{template}"
        if not hasattr(module, full):
            body = {"template": template, "__module__": module.__name__, **attributes}
            setattr(module, full, type(full, bases, body))
        yield f"{module.__name__}.{full}"


def maybe_create_testcases_on_import(
    create_testcases_gen: Callable[[], Iterable[str]],
) -> None:
    """Call a function that makes classes when the templates are known already."""
    if os.environ.get(_TEMPLATES) or os.environ.get("QUBES_TEST_LOAD_ALL"):
        list(create_testcases_gen())


def skipIfTemplate(*templates: str) -> Callable[[Any], Any]:
    """Return a decorator that skips a test, or a class, on some templates.

    :param templates: parts of their names.
    """

    def mark(test_item: Any) -> Any:
        test_item.skipped_templates = templates
        return test_item

    return mark


def expectedFailureIfTemplate(
    templates: str | Iterable[str],
) -> Callable[[Any], Any]:
    """Return a decorator that expects a test to fail on some templates.

    :param templates: a text, or several; a template whose name is in one is meant.
    """

    def mark(test_item: Any) -> Any:
        named = [templates] if isinstance(templates, str) else list(templates)
        test_item.failing_templates = named
        return test_item

    return mark


def skipped_template(case: Any, method: Any) -> str | None:
    """Return the text of `skipIfTemplate` that matches the test's template, or None."""
    named = (
        *getattr(case, "skipped_templates", ()),
        *getattr(method, "skipped_templates", ()),
    )
    return next((part for part in named if part in (case.template or "")), None)


def expects_failure(case: Any, method: Any) -> bool:
    """Tell whether `expectedFailureIfTemplate` said so of a test and its template."""
    named = getattr(method, "failing_templates", ())
    return case.template is not None and any(case.template in text for text in named)


def skipUnlessDom0(test_item: Any) -> Any:
    """Return the test as it is: everything that dom0 has to have is here."""
    return unittest.skipUnless(in_dom0, "outside dom0")(test_item)


def skipUnlessGit(test_item: Any) -> Any:
    """Skip the test outside a git working tree."""
    command = ["git", "rev-parse", "--is-inside-work-tree"]  # where the run began
    try:
        found = subprocess.run(command, capture_output=True, timeout=10, check=False)
        inside = found.stdout.strip() == b"true"
    except (OSError, subprocess.TimeoutExpired):
        inside = False
    return unittest.skipUnless(inside, "outside a git working tree")(test_item)


def skipUnlessEnv(varname: str) -> Callable[[Any], Any]:
    """Return a decorator that skips tests where a variable is not set, or empty."""
    return unittest.skipUnless(os.environ.get(varname), f"{varname} is not set")


def wait_on_fail(func: Callable[P, R]) -> Callable[P, R]:
    """Decorate a test that, when it fails, shows why and waits for the return key.

    Meanwhile its VMs are there to be looked at. The key is read from the terminal of
    the run; without one the test goes on at once. The test's time limit goes on while
    it waits: `--timeout 0` switches it off.
    """

    @functools.wraps(func)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return func(*args, **kwargs)
        except unittest.SkipTest:
            raise
        except BaseException:
            text = f"\n{traceback.format_exc()}\nPress return to go on: "
            # Not stdin, which pytest captures.
            with (
                contextlib.suppress(OSError),
                Path("/dev/tty").open("r+b", 0) as terminal,
            ):
                terminal.write(text.encode())
                terminal.readline()
            raise

    return waiting


@contextlib.contextmanager
def substitute_entry_points(group: str, tempgroup: str) -> Iterator[None]:
    """Replace the entry points of a group by those of another, for a ``with`` block.

    :param group: the group whose entry points are replaced.
    :param tempgroup: the group that is read in its place.
    """
    from unittest import mock  # noqa: PLC0415 - `list` has no need of it

    real = importlib.metadata.entry_points

    def entry_points(**selection: Any) -> object:
        if selection.get("group") == group:
            selection["group"] = tempgroup
        return real(**selection)

    with mock.patch("importlib.metadata.entry_points", entry_points):
        yield
