"""``pytest -p qubes_itests``: a sandbox and fixtures for a plain suite of tests.

The main job loads it as well, and adds the tests of installed plugins to it.
"""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.fixtures.session import CONTEXT
from qubes_itests.host import sandbox
from qubes_itests.pytest_plugin import resandbox, worker
from qubes_itests.run.options import PYTEST
from qubes_itests.run.settings import (
    OPTIONS,
    ConfigurationError,
    Settings,
    convert,
    load,
)

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["CONTEXT", "SETTINGS"]

#: Settings that the main job has read already.
SETTINGS = pytest.StashKey[Settings]()

_PREFIX = "--itests-"
#: Objects; Python 3.12 begins with some.
_FROZEN_BY_PYTHON = gc.get_freeze_count()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer the settings under names that other plugins do not take."""
    group = parser.getgroup("qubes_itests", "Qubes OS integration tests")
    for option in OPTIONS.values():
        if PYTEST in option.commands:
            option.offer(group.addoption, _PREFIX)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, Any, Any]:
    """Start over in a sandbox before anything is collected."""
    worker.refuse_options(config)
    if resandbox.wanted(config):
        resandbox.enter(config, _settings(config))
    worker.prepare(config)
    return (yield)


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Start no more workers than this machine has memory for."""
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None
    from qubes_itests.pytest_plugin.controller import most_workers  # noqa: PLC0415

    return most_workers()


def pytest_configure(config: pytest.Config) -> None:
    """Set the parts of the plugin up."""
    if sandbox.active():
        sandbox.reexec()
    plain = SETTINGS not in config.stash
    if plain:
        read = worker.settings if worker.is_worker(config) else _settings
        config.stash[SETTINGS] = read(config)
    # Here, for they are most of what there is to be loaded, and a process that starts
    # over in a sandbox has no need of them.
    from qubes_itests.pytest_plugin.parts import register_parts  # noqa: PLC0415

    register_parts(config, config.stash[SETTINGS], _PREFIX if plain else None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Have the garbage collector leave modules and tests alone.

    They stay to the end of the run. Looked through again and again while they become
    more, they made collecting a fifth slower; and each full collection later, of which
    the leak check makes one a test and `pytest.main` in a test five, took up to 0.2 s.
    Those of a `pytest.main` in a test do not stay, nor does what the test has by then.
    """
    was_enabled = gc.isenabled()
    is_outermost = gc.get_freeze_count() <= _FROZEN_BY_PYTHON
    gc.disable()
    try:
        return (yield)
    finally:
        if was_enabled:
            gc.enable()
        if is_outermost:
            # what is garbage already would stay too, with the files that it holds open
            gc.collect()
            gc.freeze()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what the tests run in; end the run where that cannot be used."""
    from qubes_itests.pytest_plugin import header  # noqa: PLC0415 - as the parts

    try:
        return header.all_lines(config)
    except EnvironmentNotReadyError as error:
        raise pytest.exit.Exception(str(error), error.exit_code) from None


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_unconfigure(config: pytest.Config) -> Generator[None, Any, Any]:
    """Take everything down, whatever happened."""
    try:
        return (yield)
    finally:
        if (context := config.stash.get(CONTEXT, None)) is not None:
            context.close()


def _settings(config: pytest.Config) -> Settings:
    given = {}
    try:
        for name, option in OPTIONS.items():
            value = config.getoption(f"itests_{name}", None)
            if value is not None:
                given[name] = convert(name, value, option.spellings(_PREFIX)[0])
        return load(config.invocation_params.dir, os.environ, given)
    except ConfigurationError as error:
        raise pytest.UsageError(str(error)) from None
