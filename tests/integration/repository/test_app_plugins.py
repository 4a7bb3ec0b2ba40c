"""The apps among the plugins, run as their maintainers do: `itests --app DIRECTORY`.

Their templates have been built before (`template build NAME --app DIRECTORY`), for here
is no network.
"""

import re
from pathlib import Path

import pytest

from qubes_itests.host.cache import Cache

PLUGINS = Path(__file__).parents[3] / "plugins"


@pytest.mark.parametrize(
    ("app", "count"),
    [("split-gpg", 14), ("split-ssh", 7), ("converter", 5), ("user-unit", 3)],
)
def test_all_tests_of_an_app_pass(site, app, count):
    """A minute each on quiet processors; the longest takes two if they are not."""
    site.timeout = 1500.0
    done = site.run("--app", str(PLUGINS / app), QUBES_ITESTS_CACHE=str(Cache().root))
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.findall(rf"^PASSED +{app}::(\S+)", done.stdout, re.MULTILINE)
    assert len(passed) == count, done.stdout


def test_all_tests_of_the_installed_plugins_pass(site):
    """The README's command without arguments, which runs those that come with it."""
    site.timeout = 1500.0
    done = site.run("smoke", "split-echo", QUBES_ITESTS_CACHE=str(Cache().root))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^PASSED ", done.stdout, re.MULTILINE)) > 40, done.stdout
