"""Templates that the files of an app describe, read and checked."""

from __future__ import annotations

import configparser
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.policy.files import PolicyFile
from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.guest.image.layer import Copy
from qubes_itests.host.kernel import KERNELS
from qubes_itests.repository.requirements import Repositories, check_requirement

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["SpecError", "TemplateSpec", "read_spec_file", "read_specs"]

_SECTION: Final = "qubes_itests:template:"
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,30}")
#: Debian policy 5.6.1, with an architecture or a version behind the name.
_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9+.-]+(?::[a-z0-9-]+)?(?:=[\w.+:~-]+)?")
_INITS: Final = ("agent", "systemd")
#: Of an app.
_FILES: Final = ("setup.cfg", "pyproject.toml")
#: What Qubes OS reads in policy.d, and of what files are in its older format.
_POLICY: Final = re.compile(r"[0-9a-z_-][0-9a-z_.-]*\.policy")
_SERVICE: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(?:\+[A-Za-z0-9_.+-]*)?")


class SpecError(HarnessError):
    """The description of a template is not valid.

    :param source: the file, and the section in it.
    :param problem: what is wrong, and what would be right.
    """

    exit_code = ExitCode.USAGE_ERROR

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"{source}: {problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateSpec:
    """What one app wants of one template.

    :param app: name of the app: that of its directory, or of a file outside of it.
    :param source: the file and the section, for errors.
    :param name: of the template.
    :param base: name of the one below it; the same name for the one that it replaces.
    :param packages: of the base's distribution.
    :param copies: files that go into it.
    :param script: what runs in it then, as root.
    :param init: ``agent`` or ``systemd``; None leaves it to the base.
    :param kernel: one of `KERNELS`; None leaves it to the base.
    :param timeout: seconds that the script may take.
    :param plugin: where in the app its tests are: folders, or files in place of
        setup.py; empty for where they are found.
    :param requires: what its tests need on the machine that runs them.
    :param policy: files of qrexec policy.
    :param artifacts: absolute paths in guests, with wildcards of a shell: what failed
        tests leave of them.
    """

    app: str
    source: str
    name: str
    base: str
    packages: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = ()
    script: str = ""
    init: str | None = None
    kernel: str | None = None
    timeout: float = 600.0
    plugin: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    policy: tuple[PolicyFile, ...] = ()
    artifacts: tuple[str, ...] = ()


def read_specs(
    directory: Path, repositories: Mapping[str, Path] | None = None
) -> list[TemplateSpec]:
    """Return what an app says in its setup.cfg and its pyproject.toml.

    :param directory: the app's; files to copy are named from there.
    :param repositories: others that files may be named in, by their names.
    :raise SpecError: a section is not valid, or one template has two.
    """
    files = [directory / name for name in _FILES]
    found = [read_spec_file(f, repositories) for f in files if f.is_file()]
    specs = [spec for of_file in found for spec in of_file]
    names = [spec.name for spec in specs]
    for spec in specs:
        if names.count(spec.name) > 1:
            raise SpecError(spec.source, "setup.cfg and pyproject.toml both have it")
    return specs


def read_spec_file(
    path: Path, repositories: Mapping[str, Path] | None = None
) -> list[TemplateSpec]:
    """Return what a file says: TOML if it is called so, else as in setup.cfg.

    :param path: files to copy are named from its directory.
    :param repositories: others that files may be named in, by their names.
    :raise SpecError: it cannot be read, or a section is not valid.
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
    place = Repositories(path.absolute().parent, repositories or {})
    return [_spec(path, name, table, place) for name, table in tables.items()]


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
    path: Path, name: str, table: Mapping[str, object], place: Repositories
) -> TemplateSpec:
    source = f"{path}: [{_SECTION}{name}]"
    if path.suffix == ".toml":
        source = f"{path}: [tool.qubes_itests.template.{name}]"
    if not isinstance(table, dict):
        raise SpecError(source, f"expected a table, got {type(table).__name__}")
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
            values[field] = convert(value, place)
    except ValueError as error:
        raise SpecError(source, str(error)) from None
    app = place.own.name if path.name in _FILES else path.name
    return TemplateSpec(app=app, source=source, name=name, **values)


def _lines(value: object) -> list[str]:
    lines = value.splitlines() if isinstance(value, str) else value
    if not isinstance(lines, list) or not all(isinstance(x, str) for x in lines):
        raise ValueError(f"expected text or a list of texts, got {value!r}")
    return [line.strip() for line in lines if line.strip()]


def _word(value: object, _place: Repositories | None = None) -> str:
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise ValueError(f"expected the name of a template, got {value!r}")


def _packages(value: object, _place: Repositories) -> tuple[str, ...]:
    names = [name for line in _lines(value) for name in line.replace(",", " ").split()]
    for name in names:
        if not _PACKAGE.fullmatch(name):
            raise ValueError(f"packages: expected the name of a package, got {name!r}")
    return tuple(dict.fromkeys(names))


def _copy(line: str, place: Repositories) -> Copy:
    named, arrow, target = (part.strip() for part in line.partition("->"))
    if not arrow or not named:
        raise ValueError(f"copy: expected FILES -> /PLACE, got {line!r}")
    if not target.startswith("/") or ".." in target.split("/") or "\0" in target:
        raise ValueError(
            f"copy: expected an absolute path in the guest, got {target!r}"
        )
    source = _found("copy", named, place)
    if source.is_file() and target.endswith("/"):
        target += PurePosixPath(named.rpartition(":")[2]).name
    return Copy(source, target)


def _found(key: str, named: str, place: Repositories) -> Path:
    try:
        return place.find(named)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _words(value: object) -> list[str]:
    return [word for line in _lines(value) for word in line.split()]


def _requires(value: object, _place: Repositories) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(map(check_requirement, _words(value))))
    except ValueError as error:
        raise ValueError(f"requires: {error}") from None


def _policy_file(line: str, place: Repositories) -> PolicyFile:
    named, arrow, service = (part.strip() for part in line.partition("->"))
    found = _found("policy", named, place)
    if arrow:
        if not _SERVICE.fullmatch(service):
            raise ValueError(f"policy: expected the name of a service, got {service!r}")
        return PolicyFile(found, service)
    if found.is_file() and not _POLICY.fullmatch(found.name):
        raise ValueError(
            f"policy: the name of {named!r} has to end in .policy, and to have no other"
            " characters than digits, lower-case letters, _ . and -; a file in the"
            " format of Qubes OS 4.0 is written as: FILE -> SERVICE"
        )
    return PolicyFile(found)


def _artifact(path: str) -> str:
    if path.startswith("/") and path.isprintable() and ".." not in path.split("/"):
        return path
    raise ValueError(
        "artifacts: expected an absolute path in the guest, which may have wildcards,"
        f" got {path!r}"
    )


def _script(value: object, _place: Repositories) -> str:
    if isinstance(value, str) and "\0" not in value:
        return value.strip()
    return "\n".join(_lines(value))


def _one_of(key: str, value: object, known: tuple[str, ...]) -> str:
    if value in known:
        return str(value)
    raise ValueError(f"{key}: expected {' or '.join(known)}, got {value!r}")


def _timeout(value: object, _place: Repositories) -> float:
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = math.nan
    if isinstance(value, bool) or not 0 < seconds < math.inf:
        raise ValueError(f"timeout: expected a number of seconds, got {value!r}")
    return seconds


#: For each key the field of `TemplateSpec`, and what makes its value.
_KEYS: Final[dict[str, tuple[str, Callable[[object, Repositories], object]]]] = {
    "base": ("base", _word),
    "packages": ("packages", _packages),
    "copy": ("copies", lambda v, place: tuple(_copy(x, place) for x in _lines(v))),
    "run": ("script", _script),
    "init": ("init", lambda v, _place: _one_of("init", v, _INITS)),
    "kernel": ("kernel", lambda v, _place: _one_of("kernel", v, tuple(KERNELS))),
    "timeout": ("timeout", _timeout),
    "plugin": ("plugin", lambda v, _place: tuple(_lines(v))),
    "requires": ("requires", _requires),
    "policy": (
        "policy",
        lambda v, place: tuple(_policy_file(x, place) for x in _lines(v)),
    ),
    "artifacts": ("artifacts", lambda v, _place: tuple(map(_artifact, _words(v)))),
}
