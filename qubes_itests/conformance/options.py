"""Additions of the conformance suites to pytest: options, lacks, a table."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Final

import pytest

from qubes_itests.conformance.features import FEATURES, MARKER, UNPROMISED

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

__all__ = ["DIRECTORY", "LACKS", "driver_name", "lacks", "pool_config"]

#: Placeholder in a pool's configuration for the directory of a test.
DIRECTORY: Final = "{directory}"

#: Where a test has the features that its driver lacks.
LACKS = pytest.StashKey[frozenset[str]]()

_DRIVER: Final = "qubes_storage_driver"
_POOL_CONFIG: Final = "pool_config"
_LACKS: Final = "qubes_storage_lacks"
_DEFAULT_CONFIG: Final = {"dir_path": f"{DIRECTORY}/pool"}
_NUMBER: Final = re.compile(r"-?\d+")

#: Names of the properties of reports.
_SUBJECT: Final = "qubes_storage_subject"
_FILESYSTEM: Final = "qubes_storage_filesystem"
_LACK: Final = "qubes_storage_lack"

Cells = dict[tuple[str, str], Counter[str]]


def driver_name(config: pytest.Config) -> str | None:
    """Return the driver that the command line names."""
    name: str | None = config.getoption(_DRIVER)
    return name


def pool_config(config: pytest.Config) -> Mapping[str, str | int]:
    """Return the configuration of the pool; whole numbers are numbers.

    :raise pytest.UsageError: for what is not ``key=value``.
    """
    words = config.getoption(_POOL_CONFIG)
    return dict(map(_pair, words)) if words else _DEFAULT_CONFIG


def lacks(config: pytest.Config) -> frozenset[str]:
    """Return the features that the command line says the driver lacks."""
    return frozenset(config.getoption(_LACKS))


def _pair(word: str) -> tuple[str, str | int]:
    key, equals, value = word.partition("=")
    if not (key and equals):
        reason = (
            f"--pool-config: expected KEY=VALUE, got {word!r}; put it behind the files"
        )
        raise pytest.UsageError(reason)
    return key, int(value) if _NUMBER.fullmatch(value) else value


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer the driver and the pool of the storage suite."""
    group = parser.getgroup("qubes_storage", "conformance of storage drivers")
    group.addoption(
        "--qubes-storage-driver",
        dest=_DRIVER,
        metavar="NAME",
        help="entry point of the driver, of the group qubes.storage",
    )
    group.addoption(
        "--pool-config",
        dest=_POOL_CONFIG,
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        help=f"how its pool is made; {DIRECTORY} stands for a directory on the"
        " filesystem under test, and if it does not occur, the pool has its storage"
        " elsewhere and is emptied after every test (default: "
        + " ".join(f"{key}={value}" for key, value in _DEFAULT_CONFIG.items())
        + ")",
    )
    group.addoption(
        "--qubes-storage-lacks",
        dest=_LACKS,
        metavar="FEATURE",
        nargs="+",
        action="extend",
        default=[],
        help="features that the driver does not have; it has to refuse them",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers", f"{MARKER}(name): the feature of a storage driver that this tests"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note in the test's reports where it belongs in the table."""
    if isinstance(item, pytest.Function) and (name := _feature(item)):
        own = item.cls.__name__ == "TestStorageDriver"
        subject = driver_name(item.config) if own else item.cls.__name__
        filesystem = item.callspec.params["filesystem"]
        item.user_properties += [
            (_SUBJECT, str(subject)),
            (_FILESYSTEM, filesystem),
            (MARKER, name),
        ]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Have a test of a feature that the driver lacks prove the lack."""
    name = _feature(pyfuncitem)
    if name is None or name not in pyfuncitem.stash.get(LACKS, frozenset()):
        return (yield)
    from qubes_storage import StoragePoolException  # noqa: PLC0415 - only if used

    try:
        result = yield
    except (Exception, pytest.fail.Exception) as error:
        if name not in UNPROMISED and not isinstance(error, StoragePoolException):
            raise
        pyfuncitem.user_properties.append((_LACK, str(error)))
        return True
    if name in UNPROMISED:
        return result
    reason = f"the driver is said to lack {name!r}, and no error says so here"
    pytest.fail(reason, pytrace=False)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show what the drivers can do, on which filesystem."""
    for subject, cells in _cells(terminalreporter).items():
        terminalreporter.section(f"storage: {subject}")
        for line in _table(cells):
            terminalreporter.write_line(line)


def _feature(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker(MARKER)
    return marker.args[0] if marker else None


def _cells(terminalreporter: Any) -> Mapping[str, Cells]:
    found: dict[str, Cells] = defaultdict(lambda: defaultdict(Counter))
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                _count(found, report)
    return found


def _count(found: dict[str, Cells], report: pytest.TestReport) -> None:
    properties = dict(report.user_properties)
    if _SUBJECT not in properties or (report.passed and report.when != "call"):
        return
    outcome = "lacked" if report.passed and _LACK in properties else report.outcome
    place = str(properties[MARKER]), str(properties[_FILESYSTEM])
    found[str(properties[_SUBJECT])][place][outcome] += 1


def _table(cells: Cells) -> Generator[str]:
    filesystems = list(dict.fromkeys(filesystem for _, filesystem in cells))
    rows = [("", *filesystems)]
    for name in (name for name in FEATURES if any(name in place for place in cells)):
        found = (_verdict(cells.get((name, filesystem))) for filesystem in filesystems)
        rows.append((name, *found))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        columns = zip(row, widths, strict=True)
        yield "  ".join(cell.ljust(width) for cell, width in columns).rstrip()


def _verdict(counts: Counter[str] | None) -> str:
    if not counts:
        return "not run"
    if bad := counts["failed"]:
        return f"FAILED {bad} of {counts.total()}"
    if counts["lacked"]:
        return "in part, declared" if counts["passed"] else "no, declared"
    if counts["skipped"]:
        return f"skipped {counts['skipped']}"
    return "yes"
