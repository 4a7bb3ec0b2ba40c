"""Test plugins installed as pip leaves them, and the program that runs them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ONCE = "qubes.tests.extra"
FOR_TEMPLATE = "qubes.tests.extra.for_template"


class PluginSite:
    """A directory of installed plugins, and one in which the program is started.

    :param root: an empty directory.
    :param environment: variables for the program, besides those of this process.
    """

    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        self.site = root / "site"
        self.work = root / "work"
        self.site.mkdir()
        self.work.mkdir()
        ours = ("QUBES_ITESTS_", "QUBES_TEST_", "PYTEST_")
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(ours)
            or name in ("QUBES_ITESTS_SANDBOX", "QUBES_ITESTS_KVM")
        }
        ci = ("GITHUB_ACTIONS", "GITLAB_CI", "CI")
        self.environment = {n: v for n, v in kept.items() if n not in ci}
        self.environment |= {"PYTHONPATH": str(self.site), **environment}

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
        self, *arguments: str, program: str = "qubes_itests", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python -m PROGRAM ARGUMENTS`` and return what came of it."""
        return subprocess.run(
            [sys.executable, "-m", program, *arguments],
            cwd=self.work,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
