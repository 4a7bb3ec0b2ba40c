"""What an app's repository says of templates: the sections, read and checked."""

from __future__ import annotations

import configparser
import math
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.apps.exc import SpecError
from qubes_itests.guest.layer import Copy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["TemplateSpec", "read_spec_file", "read_specs"]

_SECTION: Final = "qubes_itests:template:"
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,30}")
#: Debian policy 5.6.1, with an architecture or a version behind the name.
_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9-]+)?(?:=[\w.+:~-]+)?")
_INITS: Final = ("agent", "systemd")


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateSpec:
    """What one app wants of one template.

    :param app: name of the app: that of its directory.
    :param source: the file and the section, for errors.
    :param name: of the template.
    :param base: name of the one below it; the same name for the one that it replaces.
    :param packages: of the base's distribution.
    :param copies: files that go into it.
    :param script: what runs in it then, as root.
    :param init: ``agent`` or ``systemd``; None leaves it to the base.
    :param timeout: seconds that the script may take.
    """

    app: str
    source: str
    name: str
    base: str
    packages: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = ()
    script: str = ""
    init: str | None = None
    timeout: float = 600.0


def read_specs(directory: Path) -> list[TemplateSpec]:
    """Return what an app says in its setup.cfg and its pyproject.toml.

    :param directory: the app's; files to copy are named from there.
    :raise SpecError: a section makes no sense, or one template has two.
    """
    files = [directory / name for name in ("setup.cfg", "pyproject.toml")]
    specs = [spec for f in files if f.is_file() for spec in read_spec_file(f)]
    names = [spec.name for spec in specs]
    for spec in specs:
        if names.count(spec.name) > 1:
            raise SpecError(spec.source, "setup.cfg and pyproject.toml both have it")
    return specs


def read_spec_file(path: Path) -> list[TemplateSpec]:
    """Return what a file says: TOML if it is called so, else as in setup.cfg.

    :param path: files to copy are named from its directory.
    :raise SpecError: it cannot be read, or a section makes no sense.
    """
    read = _toml_tables if path.suffix == ".toml" else _cfg_tables
    try:
        tables = read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(str(path), error.strerror or str(error)) from None
    except RecursionError:
        raise SpecError(str(path), "its values are nested too deeply") from None
    except (configparser.Error, ValueError) as error:  # of tomllib, of UTF-8
        raise SpecError(str(path), str(error).splitlines()[0]) from None
    directory = path.absolute().parent
    return [_spec(path, name, table, directory) for name, table in tables.items()]


def _cfg_tables(text: str) -> dict[str, Mapping[str, object]]:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.read_string(text)
    defaults = parser.defaults()
    return {
        section.removeprefix(_SECTION): {
            key: value for key, value in parser[section].items() if key not in defaults
        }
        for section in parser.sections()
        if section.startswith(_SECTION)
    }


def _toml_tables(text: str) -> dict[str, Mapping[str, object]]:
    tables: Any = tomllib.loads(text)
    for name in ("tool", "qubes_itests", "template"):
        tables = tables.get(name, {}) if isinstance(tables, dict) else {}
    # in a file for the harness, `template` may also be its setting: a list of names
    return tables if isinstance(tables, dict) else {}


def _spec(
    path: Path, name: str, table: Mapping[str, object], directory: Path
) -> TemplateSpec:
    source = f"{path}: [{_SECTION}{name}]"
    if path.suffix == ".toml":
        source = f"{path}: [tool.qubes_itests.template.{name}]"
    if not isinstance(table, dict):
        raise SpecError(source, "it is not a table")
    if unknown := [key for key in table if key not in _KEYS]:
        known = ", ".join(_KEYS)
        raise SpecError(source, f"unknown key {unknown[0]!r}; known are: {known}")
    if "base" not in table:
        raise SpecError(source, "it needs `base`, as in: base = debian-12")
    values: dict[str, Any] = {}
    try:
        _word(name)
        for key, value in table.items():
            field, convert = _KEYS[key]
            values[field] = convert(value, directory)
    except ValueError as error:
        raise SpecError(source, str(error)) from None
    return TemplateSpec(app=directory.name, source=source, name=name, **values)


def _lines(value: object) -> list[str]:
    lines = value.splitlines() if isinstance(value, str) else value
    if not isinstance(lines, list) or not all(isinstance(x, str) for x in lines):
        raise ValueError(f"{value!r} is neither a text nor a list of texts")
    return [line.strip() for line in lines if line.strip()]


def _word(value: object, _directory: Path = Path()) -> str:
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise ValueError(f"{value!r} cannot be the name of a template")


def _packages(value: object, _directory: Path) -> tuple[str, ...]:
    names = [name for line in _lines(value) for name in line.replace(",", " ").split()]
    for name in names:
        if not _PACKAGE.fullmatch(name):
            raise ValueError(f"packages: {name!r} cannot be the name of a package")
    return tuple(dict.fromkeys(names))


def _copies(value: object, directory: Path) -> tuple[Copy, ...]:
    return tuple(_copy(line, directory) for line in _lines(value))


def _copy(line: str, directory: Path) -> Copy:
    named, arrow, target = (part.strip() for part in line.partition("->"))
    if not arrow or not named:
        raise ValueError(f"copy: {line!r} is not written as: FILES -> /PLACE")
    if not target.startswith("/") or ".." in target.split("/") or "\0" in target:
        raise ValueError(f"copy: {target!r} is not an absolute path in the guest")
    source = Path(os.path.normpath(directory / named))
    real = source.resolve()
    if Path(named).is_absolute() or not real.is_relative_to(directory.resolve()):
        raise ValueError(f"copy: {named!r} is not in {directory}")
    if not (source.is_file() or source.is_dir()):
        raise ValueError(f"copy: there is no file or directory {named!r}")
    if source.is_file() and target.endswith("/"):
        target += source.name
    return Copy(real, target)


def _script(value: object, _directory: Path) -> str:
    if isinstance(value, str) and "\0" not in value:
        return value.strip()
    return "\n".join(_lines(value))


def _init(value: object, _directory: Path) -> str:
    if value in _INITS:
        return str(value)
    raise ValueError(f"init: {value!r} is neither {' nor '.join(_INITS)}")


def _timeout(value: object, _directory: Path) -> float:
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = math.nan
    if isinstance(value, bool) or not 0 < seconds < math.inf:
        raise ValueError(f"timeout: {value!r} is not a number of seconds")
    return seconds


#: For each key the field of `TemplateSpec`, and what makes its value.
_KEYS: Final[dict[str, tuple[str, Callable[[object, Path], object]]]] = {
    "base": ("base", _word),
    "packages": ("packages", _packages),
    "copy": ("copies", _copies),
    "run": ("script", _script),
    "init": ("init", _init),
    "timeout": ("timeout", _timeout),
}
