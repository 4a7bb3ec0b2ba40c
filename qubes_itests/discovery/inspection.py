"""Checks of a test class for what unittest would run wrongly or not at all."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
import unittest
from collections import Counter
from typing import TYPE_CHECKING

from .result import Problem

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["check_member", "has_tests", "twice_defined", "unrunnable_tests"]

_PREFIX = "test"


def check_member(member: object) -> Problem | None:
    """Return what is wrong with an element of a plugin's list, if anything is."""
    if not isinstance(member, type):
        return Problem(f"it lists {member!r}, which is no class")
    if not issubclass(member, unittest.TestCase):
        return Problem(f"it lists {member.__qualname__}, which is no unittest.TestCase")
    return None


def has_tests(member: object) -> bool:
    """Tell whether an element of a plugin's list is a class with a test to run."""
    if not isinstance(member, type) or not issubclass(member, unittest.TestCase):
        return False
    return bool(unittest.TestLoader().getTestCaseNames(member))


def unrunnable_tests(cls: type[unittest.TestCase]) -> list[str]:
    """Return names of tests that unittest would call without running their body.

    These are coroutine functions outside of IsolatedAsyncioTestCase, and generators:
    calling them makes an object that nobody awaits or iterates, and the test passes.
    """
    alone = not issubclass(cls, unittest.IsolatedAsyncioTestCase)
    names = unittest.TestLoader().getTestCaseNames(cls)
    functions = {name: inspect.unwrap(getattr(cls, name)) for name in names}
    return [
        name
        for name, function in functions.items()
        if inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
        or (alone and inspect.iscoroutinefunction(function))
    ]


def twice_defined(cls: type[unittest.TestCase]) -> list[str]:
    """Return names of tests that a class body defines twice: the first is lost.

    Base classes are looked at too; a class without source code counts as good.
    """
    ours = ("unittest", "qubes_itests", "qubes", "builtins")
    return sorted(
        {
            name
            for base in cls.__mro__
            if base.__module__.partition(".")[0] not in ours
            for name in _repeated(base)
        }
    )


def _repeated(cls: type) -> list[str]:
    body = _body(cls)
    names = Counter(
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith(_PREFIX)
        and not _is_overload(node)
    )
    return [name for name, count in names.items() if count > 1]


def _is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a decorator (``@test_x.setter``) builds upon the first."""
    return any(
        isinstance(child, ast.Name) and child.id == node.name
        for decorator in node.decorator_list
        for child in ast.walk(decorator)
    )


def _body(cls: type) -> list[ast.stmt]:
    """Return the statements directly in a class's body, as its file has them."""
    tree = _parse(sys.modules.get(cls.__module__))
    nodes: list[ast.AST] = [tree]
    for name in cls.__qualname__.split("."):
        nodes = [
            child
            for node in nodes
            for child in ast.walk(node)
            if isinstance(child, ast.ClassDef) and child.name == name
        ]
    # of several classes of that name, the last is the one that stayed
    return nodes[-1].body if nodes and isinstance(nodes[-1], ast.ClassDef) else []


@functools.lru_cache(maxsize=4)
def _parse(module: ModuleType | None) -> ast.Module:
    if module is not None:
        with contextlib.suppress(OSError, TypeError, SyntaxError, ValueError):
            return ast.parse(inspect.getsource(module))
    return ast.Module(body=[], type_ignores=[])
