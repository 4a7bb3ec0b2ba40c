"""``init``: a first test of an app, what its VMs need, and a job for its CI."""

from __future__ import annotations

import configparser
import contextlib
import os
import re
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import UsageError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.program import typed
from qubes_itests.repository import find_projects
from qubes_itests.run.settings import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]

#: Many apps have one.
_SETTINGS: Final = "setup.cfg"
_SETUP_CFG: Final = """\
# What the tests need in their VMs: docs/templates.md of qubes_itests. A section
# [qubes_itests:template:debian-12] may also have `packages = …`, of Debian.
[qubes_itests:template:tiny]
base = tiny
copy = . -> /usr/src/$name
run = test -e /usr/src/$name/setup.cfg
"""

_SETUP_PY: Final = '''\
"""The distribution of the tests of $name, which run on Qubes OS as well."""

from setuptools import setup

setup(
    name="$name-tests",
    version="1.0",
    packages=["$module"],
    entry_points={
        "qubes.tests.extra.for_template": ["$name = $module:list_tests"],
    },
)
'''

_TESTS: Final = '''\
"""Integration tests of $name."""

from qubes.tests.extra import ExtraTestCase


class TC_00_Calls(ExtraTestCase):
    def setUp(self):
        super().setUp()
        self.work, self.vault = self.create_vms(["work", "vault"])
        for vm in (self.work, self.vault):
            vm.start()

    def test_000_the_app_is_in_its_vms(self):
        self.assertEqual(self.work.run("test -d /usr/src/$name", wait=True), 0)

    def test_010_work_asks_vault(self):
        service = "/etc/qubes-rpc/test.Greet"
        install = f"cat >{service} && chmod +x {service}"
        process = self.vault.run(install, user="root", passio_popen=True)
        process.communicate(b"#!/bin/sh\\nread name && echo Hello $$name\\n")
        self.assertEqual(process.wait(), 0)

        self.qrexec_policy("test.Greet", self.work, self.vault)
        call = f"echo you | qrexec-client-vm {self.vault.name} test.Greet"
        stdout, _ = self.work.run(call, passio_popen=True).communicate()
        self.assertEqual(stdout, b"Hello you\\n")


def list_tests():
    return [TC_00_Calls]
'''

_GITHUB: Final = """\
name: Integration tests
on: [push, pull_request]
permissions: {}
jobs:
  itests:
    # OWNER: of your copy of qubes_itests
    uses: OWNER/qubes_itests/.github/workflows/app-tests.yml@main
    permissions:
      contents: read
"""

_GITLAB: Final = """\
# OWNER: of your copy of qubes_itests. The runner must run privileged containers.
include:
  - project: OWNER/qubes_itests
    ref: main
    file: ci/gitlab.yml
itests:
  extends: .qubes-itests
  variables:
    ITESTS_REPOSITORY: $$CI_SERVER_URL/OWNER/qubes_itests.git
"""

_JOBS: Final = {
    "github": (".github/workflows/itests.yml", _GITHUB),
    "gitlab": (".gitlab-ci.yml", _GITLAB),
}


def execute(command: Command, _settings: Settings) -> int:
    """Write the files, all of them or none; a setup.cfg of the app is added to.

    :raise UsageError: the app has one of the others, or tests.
    """
    if len(command.words) > 1:
        problem = f"expected one directory, got `{' '.join(command.words)}`"
        raise ConfigurationError("init", problem)
    if command.ci not in _JOBS:
        problem = f"expected {' or '.join(_JOBS)}, got {command.ci!r}"
        raise ConfigurationError("--ci", problem)
    directory = Path(*command.words)
    job, _ = _JOBS[command.ci]
    if directory.is_dir() and (found := find_projects(directory)):
        where = ", ".join(str(project.directory) for project in found)
        raise UsageError(f"{directory} has tests already, in {where}")
    _write(directory, _files(directory.resolve().name, command.ci))
    print(f"Run the tests: {typed('--app', str(directory))}")
    print(f"In {directory / job} put the owner of your qubes_itests for OWNER.")
    return ExitCode.OK


def _files(title: str, ci: str) -> dict[str, str]:
    """Return the texts of an app's files, by their names in its directory.

    :param title: the name of that directory.
    """
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    name = name if name[:1].isalpha() else f"app-{name}".rstrip("-")
    module = f"{name.replace('-', '_')}_tests"
    job, text = _JOBS[ci]
    texts = {
        _SETTINGS: _SETUP_CFG,
        "tests/setup.py": _SETUP_PY,
        f"tests/{module}/__init__.py": _TESTS,
        job: text,
    }
    return {
        path: Template(text).substitute(name=name, module=module)
        for path, text in texts.items()
    }


def _write(directory: Path, files: Mapping[str, str]) -> None:
    said: list[str] = []
    with contextlib.ExitStack() as undo:
        try:
            for name, text in files.items():
                path = directory / name
                for parent in reversed(path.parents):
                    if not parent.is_dir():
                        parent.mkdir()
                        undo.callback(parent.rmdir)
                if name == _SETTINGS and path.is_file():
                    size = _size_without_ours(path)
                    undo.callback(os.truncate, path, size)
                    with path.open("a", encoding="utf-8") as file:
                        file.write(f"\n\n{text}")
                    said.append(f"Added to {path}.")
                    continue
                with path.open("x", encoding="utf-8") as file:
                    undo.callback(path.unlink)
                    file.write(text)
                said.append(f"Wrote {path}.")
        except FileExistsError as error:
            raise UsageError(
                f"{error.filename} is there already; nothing was written"
            ) from None
        except OSError as error:
            raise UsageError(
                f"{error.filename}: {error.strerror}; nothing was written"
            ) from None
        undo.pop_all()
    print("\n".join(said))


def _size_without_ours(path: Path) -> int:
    """Return the bytes of a setup.cfg that says nothing yet of what VMs need."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"), path.name)
    except (configparser.Error, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: {reason}; nothing was written") from None
    if ours := [name for name in parser.sections() if name.startswith("qubes_itests")]:
        raise UsageError(f"{path} has [{ours[0]}] already; nothing was written")
    return path.stat().st_size
