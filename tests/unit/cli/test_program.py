"""The name of the program: one, wherever a person reads or types it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_site import PluginSite

ROOT = Path(__file__).parents[3]
BESIDE = Path(sys.executable).with_name("itests")
#: The program by another name; the distribution is called so, and modules have paths.
OTHER = re.compile(
    r"python[0-9.]* -m qubes_itests(?![.\w])|\bqubes-itests[ :](?! *[0-9])"
)


def _texts(path):
    """Yield what people read of a file: of Python what is text in it."""
    if path.suffix != ".py":
        yield path.read_text()
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_no_text_has_another():
    told = [
        path
        for name in ("qubes_itests", "plugins")
        for path in ROOT.glob(f"{name}/**/*.py")
    ]
    told += [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("changes/*.md")]
    told += [ROOT / "itests", ROOT / "setup.sh", ROOT / "run-tests"]
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in told
        for text in _texts(path)
        for match in OTHER.finditer(text)
    ]
    allowed = {
        # what a process of ours starts, and what the program says that it is as well
        "qubes_itests/__main__.py: python -m qubes_itests",
        "CHANGELOG.md: qubes-itests ",
    }
    assert set(found) <= allowed


@pytest.mark.parametrize(
    ("variables", "program"),
    [
        ({"PATH": f"{BESIDE.parent}:/usr/bin"}, "itests"),
        ({"PATH": "/usr/bin:/bin"}, str(BESIDE)),
        ({"QUBES_ITESTS_PROGRAM": "../itests"}, "../itests"),
    ],
)
@pytest.mark.parametrize(
    "started", [[sys.executable, "-m", "qubes_itests"], [str(BESIDE)]]
)
def test_what_is_offered_to_type_starts_it_once_more(
    tmp_path, started, variables, program
):
    site = PluginSite(tmp_path, {"QUBES_ITESTS_CACHE": str(tmp_path / "cache")})

    def said(*words):
        done = subprocess.run(
            [*started, *words],
            cwd=site.work,
            env={**site.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout + done.stderr

    assert f": begin with `{program} serve`" in said("serve", "--print-env")
    assert said("--help").startswith("usage: itests [run] [options]")
    assert said("--version").startswith("itests ")
    assert said("ps", "--nothing").startswith("usage: itests ps [options]\nitests ps: ")
    assert said("--timeout=x").startswith("itests: --timeout: ")
