"""The search: from entry points to classes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, Final

from .extensions import DEVICES_GROUP, EXTENSIONS_GROUP, PluginExtensions
from .inspection import check_member, has_tests, twice_defined, unrunnable_tests
from .modules import ModuleWatch
from .probes import Probes
from .result import GROUP, GROUP_FOR_TEMPLATE, Plugin, Problem, TestClass
from .selection import INCLUDE, TEMPLATES

if TYPE_CHECKING:
    import unittest
    from collections.abc import Iterable, Iterator, Sequence
    from types import ModuleType

    from .selection import Selection

__all__ = ["discover"]

#: So many missing modules say enough.
_MOST_NAMED: Final = 5


def discover(selection: Selection) -> list[Plugin]:
    """Load the installed plugins of a selection.

    :return: in the order of names; a name of the include list that no plugin has is
        there too, as a plugin with a problem.
    """
    entries = [entry for entry in _entry_points() if selection.takes(entry.name)]
    installed = [
        found
        for group in (EXTENSIONS_GROUP, DEVICES_GROUP)
        for found in importlib.metadata.entry_points(group=group)
    ]
    extensions = {
        name: PluginExtensions(name, installed) for name in map(_distribution, entries)
    }
    found = [
        _load(entry, selection.templates, extensions[_distribution(entry)])
        for entry in entries
    ]
    return [*found, *_missing(selection, {entry.name for entry in entries})]


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    # a distribution may be found twice, in-tree and installed: one of each is enough
    unique = {
        (entry.name, group, entry.value): entry
        for group in (GROUP, GROUP_FOR_TEMPLATE)
        for entry in reversed(tuple(importlib.metadata.entry_points(group=group)))
    }
    return [unique[key] for key in sorted(unique)]


def _missing(selection: Selection, found: set[str]) -> Iterator[Plugin]:
    wanted = (selection.include or frozenset()) - selection.exclude
    for name in sorted(wanted - found):
        problem = Problem(f"{INCLUDE} names {name!r}, and no installed plugin has it")
        yield Plugin(name=name, group=GROUP, problems=(problem,))


def _distribution(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else ""


def _load(
    entry: importlib.metadata.EntryPoint,
    templates: Sequence[str],
    extensions: PluginExtensions,
) -> Plugin:
    watch = ModuleWatch()
    problems: list[Problem] = []
    probes = Probes(entry.module.partition(".")[0])
    with _templates_named(templates), extensions.kept_away(), probes:
        members = list(_members(entry, problems))
    # before the modules are put back: one that replaces itself counts as what it became
    module = sys.modules.get(entry.module)
    if changed := watch.restore():
        problems.append(
            Problem(
                "while it loaded, it replaced or removed modules that others use:"
                f" {', '.join(changed)}; they were put back"
            )
        )
    chosen = templates if entry.group == GROUP_FOR_TEMPLATE else (None,)
    classes = [
        made
        for cls in _checked(members, problems)
        for made in _for_templates(cls, chosen, problems)
    ]
    if not problems and not any(map(has_tests, members)):
        problems.append(_without_tests(entry, members, probes.missing()))
    return Plugin(
        name=entry.name,
        group=entry.group,
        target=entry.value,
        distribution=_distribution(entry),
        module=module,
        classes=tuple(classes),
        extensions=extensions,
        problems=tuple(problems),
    )


def _members(
    entry: importlib.metadata.EntryPoint, problems: list[Problem]
) -> Iterator[object]:
    """Yield what the plugin lists, up to where it fails."""
    step = f"{entry.value} cannot be imported"
    try:
        listing = entry.load()
        step = f"{entry.value} cannot be called for its list of test classes"
        if not callable(listing):
            problems.append(Problem(f"{entry.value} is {listing!r}, no callable"))
            return
        listed = listing()
        step = f"the list that {entry.value} returned cannot be read"
        yield from listed
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a plugin may raise what it likes
        problems.append(_failed(entry, step, error))


@contextlib.contextmanager
def _templates_named(templates: Sequence[str]) -> Iterator[None]:
    """Let plugins that make classes per template themselves know the templates."""
    before = os.environ.get(TEMPLATES)
    os.environ[TEMPLATES] = " ".join(templates)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(TEMPLATES, None)
        else:
            os.environ[TEMPLATES] = before


def _failed(
    entry: importlib.metadata.EntryPoint, step: str, error: BaseException
) -> Problem:
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not _is_machinery(frame.filename)]
    lines = traceback.format_exception_only(error)
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing, own = error.name.partition(".")[0], entry.module.partition(".")[0]
        if missing == own:
            hint = "; where the app's tests are is said by --plugin, or by plugin"
        elif missing != "qubes":
            hint = "; what brings it is named by --requires, or by requires"
        hint += " in the app's section" if hint else ""
    return Problem(
        f"{step}: {type(error).__name__}: {error}{hint}",
        "".join([*traceback.format_list(theirs), *lines]).rstrip(),
    )


def _is_machinery(filename: str) -> bool:
    return (
        filename == __file__
        or filename.startswith("<frozen importlib")
        or (filename in (importlib.__file__, importlib.metadata.__file__))
    )


def _without_tests(
    entry: importlib.metadata.EntryPoint,
    members: Sequence[object],
    missing: Sequence[str],
) -> Problem:
    """Say what a plugin that hides its tests where it finds no Qubes OS asked for."""
    listed = f"{len(members)} classes without tests" if members else "no test class"
    reason = ""
    if missing:
        names = ", ".join(missing[:_MOST_NAMED])
        more = f" and {n} more" if (n := len(missing) - _MOST_NAMED) > 0 else ""
        reason = f"; while it loaded, it asked for what is not there: {names}{more}"
    return Problem(f"{entry.value} lists {listed}, so nothing is tested{reason}")


def _checked(
    members: Iterable[object], problems: list[Problem]
) -> list[type[unittest.TestCase]]:
    good: dict[str, Any] = {}
    for member in members:
        if problem := check_member(member):
            problems.append(problem)
        elif good.setdefault(member.__name__, member) is not member:  # type: ignore[attr-defined]
            problems.append(
                Problem(
                    f"it lists two classes named {member.__name__};"  # type: ignore[attr-defined]
                    " only the first is run"
                )
            )
    return list(good.values())


def _for_templates(
    cls: type[unittest.TestCase],
    templates: Iterable[str | None],
    problems: list[Problem],
) -> Iterator[TestClass]:
    unrunnable = unrunnable_tests(cls)
    problems += [
        Problem(
            f"{cls.__name__}.{name} would pass without being run: it is asynchronous or"
            " a generator in a plain TestCase; use self.loop.run_until_complete() in an"
            " ordinary method, or unittest.IsolatedAsyncioTestCase"
        )
        for name in unrunnable
    ]
    problems += [
        Problem(f"{cls.__name__} defines {name} twice; the first definition is lost")
        for name in twice_defined(cls)
    ]
    hidden = dict.fromkeys(unrunnable)
    for template in templates:
        yield TestClass(_class_for(cls, template, hidden), template)


def _class_for(
    cls: type[unittest.TestCase], template: str | None, hidden: dict[str, None]
) -> type[unittest.TestCase]:
    """Return what to run: the class itself where that is enough."""
    if template is None and not hidden:
        return cls
    body: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    if template is None:
        return type(cls.__name__, (cls,), body | hidden)
    name = f"{cls.__name__}_{template}"
    made = type(name, (cls,), body | hidden | {"template": template})
    module: ModuleType | None = sys.modules.get(cls.__module__)
    # under its name in its module, so that pickle and people find it
    if module is not None:
        setattr(module, name, made)
    return made
