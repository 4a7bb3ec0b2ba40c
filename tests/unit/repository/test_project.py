"""Where the test plugin of an app is."""

import os

import pytest

from qubes_itests.host.cache import Cache
from qubes_itests.repository import InstallError, Project, find_projects, install
from qubes_itests.repository.requirements import Requirements

PLUGIN = 'entry_points={"qubes.tests.extra": ["x = y:z"]}\n'


def project(directory, text=PLUGIN, name="setup.py"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)


def test_it_may_be_the_app_itself(tmp_path):
    project(tmp_path)
    project(tmp_path / "examples/one")
    assert find_projects(tmp_path) == [Project(tmp_path)]


def test_it_may_be_below_an_app_that_is_another_project(tmp_path):
    project(tmp_path, "setup(name='app')\n")
    project(tmp_path, "[tool.qubes_itests]\n", "pyproject.toml")
    project(tmp_path / "tests")
    project(tmp_path / "more/tests", "[qubes.tests.extra]\n", "setup.cfg")
    assert find_projects(tmp_path) == [
        Project(tmp_path / "tests"),
        Project(tmp_path / "more/tests"),
    ]


@pytest.mark.parametrize("place", [".git/x", "x.egg-info", "a/b/c", ".venv/y"])
def test_it_is_not_what_was_built_or_too_deep(tmp_path, place):
    project(tmp_path / place)
    assert find_projects(tmp_path) == []


def test_it_is_no_folder_no_fifo_and_no_link_that_leads_nowhere(tmp_path):
    (tmp_path / "setup.cfg").mkdir()
    (tmp_path / "setup.py").symlink_to("nowhere")
    (tmp_path / "pyproject.toml").symlink_to("pyproject.toml")
    (tmp_path / "tests").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "tests/setup.py").symlink_to("../fifo")
    (tmp_path / os.fsdecode(b"tests/\xff")).touch()
    assert find_projects(tmp_path) == []
    project(tmp_path / "tests", name="setup.cfg")
    assert find_projects(tmp_path) == [Project(tmp_path / "tests")]


def test_a_cache_that_pythons_path_cannot_name_is_told(tmp_path):
    with pytest.raises(InstallError, match="name another in QUBES_ITESTS_CACHE"):
        install(
            Cache(tmp_path / "a:b"),
            tmp_path,
            [Project(tmp_path)],
            lambda _: None,
            Requirements(),
        )


def test_an_app_without_one_is_told(tmp_path):
    with pytest.raises(InstallError, match="names the entry point group"):
        install(Cache(tmp_path / "cache"), tmp_path, [], lambda _: None, Requirements())


def test_an_app_may_name_it(tmp_path):
    """A script beside setup.py, or a folder; others are not looked for then."""
    project(tmp_path)
    project(tmp_path, PLUGIN, "setup-tests.py")
    project(tmp_path / "more")
    assert find_projects(tmp_path, ["setup-tests.py", "more", "setup.py"]) == [
        Project(tmp_path, "setup-tests.py"),
        Project(tmp_path / "more"),
        Project(tmp_path),
    ]


@pytest.mark.parametrize("name", ["nothing.py", "..", "/etc", "out"])
def test_what_it_names_has_to_be_in_it(tmp_path, name):
    app = tmp_path / "app"
    project(app)
    (app / "out").symlink_to("/etc")
    with pytest.raises(InstallError, match=f"no file or folder '{name}' in it"):
        find_projects(app, [name])


def test_packages_of_debian_that_are_missing_are_named(tmp_path):
    requires = Requirements(debian=("bash", "a-package-that-nobody-made"))
    cache = Cache(tmp_path / "cache")
    with pytest.raises(InstallError) as caught:
        install(cache, tmp_path, [Project(tmp_path)], lambda _: None, requires)
    assert "apt-get install a-package-that-nobody-made" in str(caught.value)
    assert "bash" not in str(caught.value)
