"""Settings of a run: from files, the environment and the command line, in that order.

`Settings` is the table of options, and docs/options.md shows it.
"""

from __future__ import annotations

import configparser
import enum
import math
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.run.options import PYTEST, option, options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "DEFAULT_TIMEOUT",
    "LEAST_MEMORY_BUDGET",
    "OPTIONS",
    "ConfigurationError",
    "Keep",
    "Settings",
    "Trace",
    "convert",
    "load",
    "own_settings",
    "plain",
]

_Enum = TypeVar("_Enum", bound=enum.Enum)

#: MiB of the smallest machine on which a VM starts beside dom0.
LEAST_MEMORY_BUDGET = 2200
_MOST_MEMORY_BUDGET = 1 << 24


class ConfigurationError(HarnessError):
    """The value of an option, or a key in a file, is not valid.

    :param source: where it stands: a file's name, a variable, an option.
    :param problem: what is wrong with it, and what would be right.
    """

    exit_code = ExitCode.USAGE_ERROR

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.problem = problem


class Trace(enum.Enum):
    """Of which tests the timelines are kept among the artefacts."""

    ON = "on"
    RETAIN_ON_FAILURE = "retain-on-failure"
    OFF = "off"


class Complaint(enum.StrEnum):
    """What guests log that fails a test."""

    COREDUMP = "coredump"
    JOURNAL = "journal"


class Keep(enum.Enum):
    """Of which tests the disks are kept among the artefacts."""

    NEVER = "never"
    FAILED = "failed"
    ALWAYS = "always"
    #: After failed tests, with the memory.
    STATE = "state"


#: The commands that run tests, and those that start VMs.
_TESTS, _VMS = f"run {PYTEST}", "run serve shell repl compare"
#: The templates that tests run on by default.
_TEMPLATES = ("tiny",)
#: Seconds.
DEFAULT_TIMEOUT = 300.0
#: An hour, in seconds.
_LONGEST_START = 3600
#: Of one test.
_MOST_RUNS = 1_000_000
_MOST_SHARDS = 1000
_MOST_CLONES = 64
#: A template's name becomes part of class names, VM names and paths.
_TEMPLATE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,30}")
_TRUTH = {
    "1": True, "yes": True, "true": True, "on": True,
    "0": False, "no": False, "false": False, "off": False,
}  # fmt: skip


def _one_of(kinds: type[_Enum]) -> Callable[[object], _Enum]:
    def read(value: object) -> _Enum:
        try:
            return kinds(value)
        except ValueError:
            known = ", ".join(kind.value for kind in kinds)
            raise ValueError(f"expected one of {known}, got {value!r}") from None

    return read


def _patterns(value: object) -> tuple[str, ...]:
    lines = value.strip().splitlines() if isinstance(value, str) else value
    if not isinstance(lines, list | tuple) or not all(map(str, lines)):
        raise ValueError(f"expected a list of regular expressions, got {value!r}")
    found = tuple(map(str, lines))
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"expected a regular expression, got {pattern!r}: {error}"
            ) from None
    return found


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUTH:
        return _TRUTH[value.lower()]
    raise ValueError(f"expected true or false, got {value!r}")


def _path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError(f"expected a path, got {value!r}")
    return Path(value)


def _directory(value: object) -> Path:
    return _path(value).absolute()


def _files(value: object) -> tuple[Path, ...]:
    if isinstance(value, str):
        value = value.replace(os.pathsep, "\n").splitlines()
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"expected a list of paths, got {value!r}")
    return tuple(dict.fromkeys(map(_path, value)))


def _paths(value: object) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(path.absolute() for path in _files(value)))


def _words(value: object) -> tuple[str, ...]:
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not words:
        raise ValueError(f"expected a list of words, got {value!r}")
    for word in words:
        if not isinstance(word, str) or not word or "\0" in word:
            raise ValueError(f"expected a word, got {word!r}")
    return tuple(dict.fromkeys(part for word in words for part in word.split()))


def _seconds(value: object) -> float:
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = math.nan
    if isinstance(value, bool) or not (0 <= seconds < math.inf):
        raise ValueError(f"expected a number of seconds, got {value!r}")
    return seconds


def _integer(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    raise ValueError(f"expected a whole number, got {value!r}")


def _up_to(most: int, what: str) -> Callable[[object], int]:
    def read(value: object) -> int:
        number = _integer(value)
        if not 0 <= number <= most:
            raise ValueError(f"expected {what}, at most {most}, got {value!r}")
        return number

    return read


def _shard(value: object) -> tuple[int, int]:
    # a list is what `plain` makes of it
    words = value.split("/") if isinstance(value, str) else value
    if isinstance(words, list) and len(words) == 2:  # noqa: PLR2004
        number, of = map(_integer, words)
        if 1 <= number <= of <= _MOST_SHARDS:
            return number, of
    raise ValueError(f"expected a part of the tests, as in 1/3, got {value!r}")


_mebibytes = _up_to(_MOST_MEMORY_BUDGET, "MiB")


def _memory_budget(value: object) -> int:
    size = _integer(value)
    if size != 0 and size < LEAST_MEMORY_BUDGET:
        raise ValueError(
            f"a machine of {size} MiB has no memory for a VM beside dom0:"
            f" give it {LEAST_MEMORY_BUDGET} MiB or more, or 0 for no limit"
        )
    return _mebibytes(size)


def _templates(value: object) -> tuple[str, ...]:
    names = value.split() if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"expected a list of names of templates, got {value!r}")
    for name in names:
        if not isinstance(name, str) or not _TEMPLATE.fullmatch(name):
            raise ValueError(f"expected the name of a template, got {name!r}")
    return tuple(dict.fromkeys(names))


def _word(value: object) -> str:
    if isinstance(value, str) and _TEMPLATE.fullmatch(value):
        return value
    raise ValueError(f"expected a name, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The options of a run: the table from which all that knows of them is made.

    A row has the default, how a value is read, its placeholder in the help, the
    commands that take the option, and what it does.
    """

    # fmt: off
    keep: Keep = option(
        Keep.NEVER, _one_of(Keep), "WHICH", _TESTS,
        "keep the disk images of VMs: never, after failed tests (failed), or always;"
        " or after failed tests with their memory, for `thaw` (state)")
    trace: Trace = option(
        Trace.RETAIN_ON_FAILURE, _one_of(Trace), "WHEN", _TESTS,
        "keep the timelines of all tests (on) or of those that failed"
        " (retain-on-failure), or record none (off)")
    trace_events: bool = option(
        False, _flag, "", _TESTS,
        "record the events of the core in timelines, too")
    shell_on_failure: bool = option(
        False, _flag, "", _TESTS,
        "open a shell in each VM of a test that has failed, before they are removed")
    artifacts: Path = option(
        Path("itests-artifacts"), _path, "DIR", f"{_VMS} template merge {PYTEST}",
        "put logs and other artefacts of failed tests and templates into DIR")
    timeout: float | None = option(
        None, _seconds, "SECONDS", f"{_TESTS} compare",
        "fail a test that takes longer than SECONDS; 0 for no limit"
        f" (default: what its app says, or {DEFAULT_TIMEOUT:.0f})")
    seed: int | None = option(
        None, _integer, "NUMBER", _TESTS,
        "seed the random numbers of tests with NUMBER; a run shows the one that it uses"
        " (default: a new one each time)")
    repeat: int = option(
        0, _up_to(_MOST_RUNS, "a number of runs"), "NUMBER", _TESTS,
        "run each test NUMBER times; one that fails and passes is flaky (default: 1)")
    until_fail: bool = option(
        False, _flag, "", _TESTS,
        "repeat each test until it fails, at most as many times as --repeat says")
    rerun_failed: int = option(
        0, _up_to(_MOST_RUNS, "a number of runs"), "NUMBER", _TESTS,
        "run a failed test again, up to NUMBER times; one that then passes is flaky,"
        " which is no success either")
    known_issues: tuple[Path, ...] = option(
        (), _files, "FILE", _TESTS,
        "expect the tests that FILE lists to fail; each needs a reference")
    fail_on: tuple[Complaint, ...] = option(
        (), lambda value: tuple(map(_one_of(Complaint), _words(value))), "WHAT", _TESTS,
        "fail a test if a program in its VMs dumps core (coredump), or something there"
        " logs an error (journal)")
    allow_line: tuple[str, ...] = option(
        (), _patterns, "REGEX", _TESTS,
        "with --fail-on pass over lines in which REGEX is found")
    shard: tuple[int, int] | None = option(
        None, _shard, "I/N", _TESTS,
        "run only part I of N of the tests, so that N machines share them; with --times"
        " all parts take about as long")
    times: Path | None = option(
        None, _path, "FILE", _TESTS,
        "read how long tests take from FILE, written by `history --export` (default:"
        " with workers the history of this machine; with --shard all count alike)")
    summary: Path | None = option(
        None, _path, "FILE", _TESTS + " merge",
        "write a summary of the run, in Markdown, to FILE"
        " (default: the file that GitHub names in its CI, if any)")
    template: tuple[str, ...] = option(
        (), _templates, "NAME", f"{_VMS} list {PYTEST}",
        "run tests on the template NAME"
        f" (default: as the app says, or {_TEMPLATES[0]})")
    app: tuple[Path, ...] = option(
        (), _paths, "DIR", f"{_VMS} list template",
        "run only the tests of the app in DIR")
    core: Path | None = option(
        None, _directory, "DIR", "run list memory compare",
        "run the suites of the checkout of core-admin in DIR, or the tests of --app, on"
        " the core there; with `memory compare`, run its qmemman")
    qrexec: Path | None = option(
        None, _directory, "DIR", "run list memory compare",
        "with --core take the policy from the checkout of core-qrexec in DIR"
        " (default: core-qrexec or qubes-core-qrexec beside it)")
    core_suites: Path | None = option(
        None, _directory, "DIR", "run list",
        "run the integration suites of the checkout of core-admin in DIR on our own"
        " core")
    template_spec: tuple[Path, ...] = option(
        (), _paths, "FILE", f"{_VMS} list template {PYTEST}",
        "derive the templates that FILE describes")
    plugin: tuple[str, ...] = option(
        (), _words, "PATH", f"{_VMS} list",
        "look for the tests of an app in PATH, a folder of the app or a file in place"
        " of its setup.py (default: as the app says, or wherever they are)")
    requires: tuple[str, ...] = option(
        (), _words, "NAME", f"{_VMS} list",
        "install NAME for the tests of apps, besides what the apps ask for")
    repository: tuple[Path, ...] = option(
        (), _paths, "DIR", f"{_VMS} list template {PYTEST}",
        "let apps copy files from DIR, which they call by the last part of its name")
    policy: tuple[Path, ...] = option(
        (), _paths, "PATH", f"{_VMS} list {PYTEST}",
        "add the qrexec policy in PATH, a file or a directory, to that of all tests")
    warm: bool = option(
        True, _flag, "", f"{_VMS} {PYTEST}",
        "start VMs from saved states where that is possible")
    clones_ahead: int = option(
        8, _up_to(_MOST_CLONES, "a number of guests"), "N", f"{_VMS} {PYTEST}",
        "have up to N guests ready for the next starts of VMs, started while a CPU is"
        " idle; 0 for none")
    hypervisor: str = option(
        "qemu", _word, "NAME", f"{_VMS} thaw",
        "run VMs with the back end NAME")
    filesystem: str = option(
        "btrfs", _word, "NAME", f"{_VMS} thaw",
        "put the disks of VMs on the filesystem NAME, which has reflinks: btrfs or xfs")
    memory_budget: int = option(
        0, _memory_budget, "MIB", f"{_VMS} {PYTEST}",
        "let the VMs of each test share a machine of MIB mebibytes, balanced by"
        " qmemman; 0 for no such limit")
    host_memory: int = option(
        0, _mebibytes, "MIB", f"{_VMS} thaw {PYTEST}",
        "let all VMs together take at most MIB mebibytes of the memory of this machine;"
        " 0 for as much as it has room for, for workers shares of 80 % of that")
    start_timeout: int = option(
        0, _up_to(_LONGEST_START, "seconds"), "SECONDS", f"{_VMS} thaw {PYTEST}",
        "give up the start of a VM after SECONDS; 0 for 60, and more where guests are"
        " emulated or the machine is busy")
    # fmt: on

    @property
    def templates(self) -> tuple[str, ...]:
        """Names of the templates that tests run on, the default ones resolved."""
        return self.template or _TEMPLATES


#: The table by name.
OPTIONS = {option.name: option for option in options(Settings)}
_READERS = {name: option.read for name, option in OPTIONS.items() if option.read}


def load(
    directory: Path,
    environment: Mapping[str, str] = os.environ,
    given: Mapping[str, object] | None = None,
) -> Settings:
    """Return the settings that hold in a directory.

    :param directory: where pyproject.toml and setup.cfg are looked for.
    :param environment: the environment variables.
    :param given: converted values from the command line, which win.
    :raise ConfigurationError: for an unknown key, a bad value, or two cores.
    """
    values = _from_files(directory)
    if names := environment.get("QUBES_TEST_TEMPLATES", "").strip():
        values["template"] = convert("template", names, "QUBES_TEST_TEMPLATES")
    for name, declared in OPTIONS.items():
        if value := environment.get(declared.variable, "").strip():
            values[name] = convert(name, value, declared.variable)
    values.update(given or {})
    settings = Settings(**values)
    if settings.core is not None and settings.core_suites is not None:
        raise ConfigurationError("--core-suites", "expected no --core beside it")
    return settings


def own_settings(directory: Path, others: Iterable[Path] = ()) -> Settings:
    """Return the settings that the files in an app's directory give, as of an app.

    :param others: files whose settings hold where those do not give any, the first's
        first; known issues are an app's own.
    :raise ConfigurationError: for an unknown key or a bad value.
    """
    values: dict[str, Any] = {}
    for path in reversed(tuple(others)):
        values |= _from_file(path) or {}
    own = _from_files(directory)
    issues = tuple(directory / path for path in own.get("known_issues", ()))
    return Settings(**{**values, **own, "known_issues": issues})


def plain(settings: Settings) -> dict[str, object]:
    """Return settings in types that go to another process; `convert` reads them."""
    values = {name: _plain(getattr(settings, name)) for name in OPTIONS}
    return {name: value for name, value in values.items() if value not in (None, [])}


def _plain(value: object) -> object:
    match value:
        case enum.Enum():
            return value.value
        case Path():
            return str(value)
        case tuple():
            return [_plain(item) for item in value]
    return value


def convert(name: str, value: object, source: str) -> object:
    """Return an option's value in its own type.

    :param name: the option's name in `Settings`.
    :param value: as written in a file, a variable or on the command line.
    :param source: where it stands, for the error.
    :raise ConfigurationError: when it does not make sense.
    """
    try:
        return _READERS[name](value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(source, f"{name}: {error}") from None


def _from_files(directory: Path) -> dict[str, Any]:
    # `convert` has made them what their options are
    tables = (_from_file(directory / name) for name in ("pyproject.toml", "setup.cfg"))
    return next((table for table in tables if table is not None), {})


def _from_file(path: Path) -> dict[str, Any] | None:
    read = _read_toml if path.suffix == ".toml" else _read_cfg
    try:
        table = read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(path.name, error.strerror or str(error)) from None
    if table is None:
        return None
    result = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in OPTIONS:
            known = ", ".join(OPTIONS)
            raise ConfigurationError(
                path.name, f"unknown key {key!r} for qubes_itests; known are: {known}"
            )
        result[name] = convert(name, value, path.name)
    return result


def _read_toml(path: Path) -> Mapping[str, object] | None:
    try:
        with path.open("rb") as file:
            table = tomllib.load(file).get("tool", {}).get("qubes_itests")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(path.name, str(error)) from None
    if table is not None and not isinstance(table, dict):
        raise ConfigurationError(
            path.name, f"tool.qubes_itests: expected a table, got {table!r}"
        )
    # templates of an app are tables of that name; the setting is a list
    if table is not None and isinstance(table.get("template"), dict):
        del table["template"]
    return cast("Mapping[str, object] | None", table)


def _read_cfg(path: Path) -> Mapping[str, object] | None:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"), path.name)
    except (configparser.Error, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(path.name, reason) from None
    if "qubes_itests" not in parser:
        return None
    # The section, and not what a DEFAULT section would add for everybody.
    own = set(parser["qubes_itests"]) - set(parser.defaults())
    return {key: parser["qubes_itests"][key] for key in sorted(own)}
