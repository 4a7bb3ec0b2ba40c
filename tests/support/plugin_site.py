"""Test plugins installed as pip leaves them, and the program that runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import its_time

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ONCE = "qubes.tests.extra"
FOR_TEMPLATE = "qubes.tests.extra.for_template"
NOBODY = 65534
#: It reads what root can, as the checkout may be where that user cannot go, and may do
#: nothing else.
_AS_NOBODY = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    "--bounding-set=-all,+dac_read_search",
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
)


class PluginSite:
    """A directory of installed plugins, and one in which the program is started.

    :param root: an empty directory.
    :param environment: variables for the program, besides those of this process.
    """

    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        #: Seconds that the program may take.
        self.timeout = 1000.0
        self.site = root / "site"
        self.work = root / "work"
        self.site.mkdir()
        self.work.mkdir()
        shutil.copy(its_time.__file__, self.site)
        ours = ("QUBES_ITESTS_", "QUBES_TEST_", "PYTEST_")
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(ours) or name == "QUBES_ITESTS_KVM"
        }
        unusual = ("GITHUB_ACTIONS", "GITLAB_CI", "CI", "PYTHONUNBUFFERED")
        self.environment = {n: v for n, v in kept.items() if n not in unusual}
        # As after `. .venv/bin/activate`.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"PYTHONPATH": str(self.site), "PATH": path}
        # It imports all of hypothesis at the end of each run, with tests of it or none.
        own["PYTEST_ADDOPTS"] = "-p no:hypothesispytest"
        self.environment |= {**own, **environment}

    def install(self, name: str, text: str, *groups: str) -> None:
        """Install a module with a `list_tests` as an entry point of the same name."""
        module = name.replace("-", "_")
        (self.site / f"{module}.py").write_text(textwrap.dedent(text))
        self.register(name, f"{module}:list_tests", *groups)

    def register(self, name: str, target: str, *groups: str) -> None:
        """Make an entry point, whatever it names."""
        info = self.site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        lines = [f"[{group}]\n{name} = {target}\n" for group in groups or (ONCE,)]
        (info / "entry_points.txt").write_text("\n".join(lines))

    def run(
        self,
        *arguments: str,
        program: str = "qubes_itests",
        launcher: Sequence[str] = (),
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``[LAUNCHER] python -m PROGRAM ARGUMENTS``; return what came of it."""
        command = [*launcher, sys.executable, "-m", program, *arguments]
        return self._run(command, variables)

    def run_as_nobody(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the program as a user without rights, with a cache of its own."""
        with tempfile.TemporaryDirectory() as cache:
            for path in (cache, self.work):
                os.chown(path, NOBODY, NOBODY)
            variables = {"QUBES_ITESTS_CACHE": cache, "HOME": cache}
            return self.run(*arguments, launcher=_AS_NOBODY, **variables)

    def _run(
        self, command: list[str], variables: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.work,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=self.timeout,
            check=False,
        )
