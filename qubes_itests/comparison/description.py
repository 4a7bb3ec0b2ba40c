"""What users see of the core that `import qubes` finds: a text for each name.

Runs as a program for ours: ``python -m qubes_itests.comparison.description``. It uses
what both cores have, and nothing else of either.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import pkgutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.import_alias.table import ALIASES

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["description"]

#: Parts of a core that are no modules for others: programs, tests, the Admin API.
_NOT_FOR_OTHERS: Final = ("qubes.api", "qubes.tests", "qubes.tools")
#: Of handlers of events, which only the core itself calls.
_HANDLER: Final = "on_"
#: What properties are set to: what is typed, what programs have, and what is none.
_VALUES: Final = (
    *("", "text", "1", "0", "-1", "True", "yes", "red", "a b", "é", "\n"),
    *("dom0", "work", "tmpl", "missing"),
    *(0, 1, -1, 10, 100_000, True, False, None),
)
#: Properties that are set once, or that name what the others are looked up by.
_NOT_SET: Final = ("uuid", "qid", "name", "dispid")


def description() -> dict[str, str]:
    """Return what can be seen: by a kind and a name what it is.

    The kinds are ``module``, ``name``, ``error``, ``member``, ``default`` and ``set``.
    An error is its class and those above it, after an exclamation mark.
    """
    found = dict(_modules())
    for name in ALIASES:
        with contextlib.suppress(ImportError):
            found |= _names(importlib.import_module(name))
    with tempfile.TemporaryDirectory() as place:
        found |= asyncio.run(_properties(Path(place)))
    return found


def _modules() -> Iterator[tuple[str, str]]:
    package = importlib.import_module("qubes")
    names = [each.name for each in pkgutil.walk_packages(package.__path__, "qubes.")]
    for name in names or ALIASES:
        if not name.startswith(_NOT_FOR_OTHERS):
            yield f"module {name}", "module"


def _names(module: ModuleType) -> dict[str, str]:
    """Return the public names of a module, and the members of its classes."""
    found: dict[str, str] = {}
    for name in getattr(module, "__all__", vars(module)):
        value = getattr(module, name)
        home = getattr(value, "__module__", None)
        theirs = isinstance(home, str) and home.partition(".")[0] not in (
            *("qubes", "qubes_itests", "qubes_storage"),
        )
        if name.startswith("_") or isinstance(value, ModuleType) or theirs:
            continue
        full = f"{module.__name__}.{name}"
        if not isinstance(value, type):
            found[f"name {full}"] = _kind(value)
        elif issubclass(value, Exception):
            found[f"error {full}"] = _error(value)
        else:
            found[f"name {full}"] = "class"
            found |= _members(name, value)
    return found


def _members(name: str, owner: object) -> dict[str, str]:
    """Return what a class, or one of its instances, has.

    :param name: of the class.
    """
    cls = owner if isinstance(owner, type) else type(owner)
    # what instances have is declared, if anything tells of it
    declared = [m for each in cls.__mro__ for m in inspect.get_annotations(each)]
    return {
        f"member {name}.{member}": _kind(inspect.getattr_static(owner, member, None))
        for member in {*dir(owner), *declared}
        if not member.startswith(("_", _HANDLER))
    }


def _kind(value: Any) -> str:
    if isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    if inspect.iscoroutinefunction(value):
        return "coroutine"
    if isinstance(value, type):
        return "class"
    return "function" if callable(value) else "value"


def _error(cls: type[BaseException]) -> str:
    return " ".join(["!", *(each.__name__ for each in cls.__mro__[:-2])])


async def _properties(place: Path) -> dict[str, str]:
    """Return the defaults of properties, and what becomes of values for them."""
    core: Any = importlib.import_module("qubes")
    app = core.Qubes.create_empty_store(str(place / "qubes.xml"))
    app.default_kernel = ""
    (place / "pool").mkdir()
    await app.add_pool(name="files", driver="file", dir_path=str(place / "pool"))
    app.default_pool = "files"
    template = app.add_new_vm("TemplateVM", name="tmpl", label="black")
    app.default_template = template
    options = {"label": "red", "template": template}
    work = app.add_new_vm("AppVM", name="work", **options)
    made = app.add_new_vm("AppVM", name="dvm", template_for_dispvms=True, **options)
    alone = app.add_new_vm("StandaloneVM", name="alone", label="red")
    disposable = {"label": "red", "template": made, "dispid": 1}
    holders = {
        "Qubes": app,
        "AdminVM": app.domains["dom0"],
        "AppVM": work,
        "DispVM": app.add_new_vm("DispVM", name="disp1", **disposable),
        "RemoteVM": app.add_new_vm("RemoteVM", name="far", label="red"),
        "StandaloneVM": alone,
        "TemplateVM": template,
    }
    found: dict[str, str] = {}
    for holder, owner in holders.items():
        # some of their attributes are no class's
        found |= _members(holder, owner)
        for definition in owner.property_list():
            name = definition.__name__
            found[f"default {holder}.{name}"] = _outcome(
                lambda o=owner, n=name: o.property_get_default(n)
            )
            if name not in _NOT_SET:
                for value in _VALUES:
                    became = _outcome(lambda o=owner, n=name, v=value: _set(o, n, v))
                    found[f"set {holder}.{name} = {value!r}"] = became
    app.close()
    return found


def _set(owner: Any, name: str, value: object) -> object:
    """Return what a property is after it was set; it is then what it was before."""
    initial = owner.property_is_default(name)
    before = None if initial else getattr(owner, name)
    setattr(owner, name, value)
    became: object = getattr(owner, name)
    if initial:
        delattr(owner, name)
    else:
        setattr(owner, name, before)
    return became


def _outcome(call: Any) -> str:
    try:
        value = call()
    except Exception as error:  # noqa: BLE001 - to find out which is why it is called
        return _error(type(error))
    plain = value is None or isinstance(value, (str, int, float))
    return repr(value if plain else str(value))


if __name__ == "__main__":
    from qubes_itests import import_alias

    import_alias.install()
    sys.stdout.write(json.dumps(description()))
