"""What is installed beside a checkout of core-admin, whose metadata name nothing."""

import shutil
from pathlib import Path

from qubes_itests.host.cache import Cache
from qubes_itests.repository import core

FAKE = Path(__file__).parents[2] / "support/fake-core"


def test_what_python_has_no_more_is_installed_for_those_who_import_it(
    tmp_path, monkeypatch
):
    """GitHub's runners have Python 3.12, in which pyinotify finds no asyncore."""
    checkout, asked = tmp_path / "core-admin", []
    shutil.copytree(FAKE, checkout)
    (checkout / "qubes/config.py").write_text("import pyinotify, yaml\n")

    def make(_place, _app, _projects, requires, _variables=()):
        asked.extend(requires.packages)

    monkeypatch.setattr(core, "make_environment", make)
    core.install_core(Cache(tmp_path / "cache"), checkout, None, asked.append)
    assert asked == [
        *("installing it", "installing what it needs"),
        *("pyinotify", "pyasyncore; python_version >= '3.12'", "pyyaml"),
    ]
    # which stays as it is when the core has changed
    (checkout / "qubes/config.py").write_text("import yaml, pyinotify\n")
    core.install_core(Cache(tmp_path / "cache"), checkout, None, asked.append)
    assert asked[5:] == ["installing it"]
