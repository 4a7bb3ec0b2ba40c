"""What is told when the tests of an app cannot be installed."""

import pytest

from qubes_itests.host.cache import Cache
from qubes_itests.host.exc import CommandError
from qubes_itests.repository import InstallError, environment
from qubes_itests.repository.environment import Project
from qubes_itests.repository.requirements import Requirements


def test_packages_that_pip_does_not_find_are_named(tmp_path, monkeypatch):
    def run(command, **_):
        if "install" in command:
            options = command[: command.index("--")]
            assert not {"one", "two>=2"} & set(options)
            raise CommandError(["pip"], 1, "ERROR: No matching distribution found")
        packages = environment.packages_of(tmp_path / "made")
        packages.mkdir(parents=True)

    monkeypatch.setattr(environment, "run", run)
    monkeypatch.setattr(Cache, "entry", lambda *given: given[3](tmp_path / "made"))
    with pytest.raises(InstallError) as caught:
        environment.install(
            Cache(tmp_path / "cache"),
            tmp_path,
            [Project(tmp_path)],
            lambda _phrase: None,
            Requirements(packages=("one", "two>=2")),
        )
    said = str(caught.value).splitlines()
    assert said[0].endswith("pip cannot install one two>=2, which its tests require")
    assert said[-1].endswith("No matching distribution found")
