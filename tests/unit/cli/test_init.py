"""``init``: the files for an app are written all, or none of them."""

from __future__ import annotations

import pytest

from qubes_itests.cli.arguments import parse
from qubes_itests.cli.init import execute
from qubes_itests.exc import UsageError
from qubes_itests.repository.spec import read_specs
from qubes_itests.run.settings import ConfigurationError, Settings

GITHUB = ".github/workflows/itests.yml"


def init(*words):
    return execute(parse(["init", *words]), Settings())


def tree(directory):
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if not path.is_dir() or not any(path.iterdir())
    )


@pytest.mark.parametrize(
    ("title", "name"),
    [("my-app", "my-app"), ("Ünï cöde!", "n-c-de"), ("2fa", "app-2fa"), ("…", "app")],
)
def test_the_files_are_those_of_an_app_of_that_name(tmp_path, capsys, title, name):
    directory = tmp_path / title
    assert init(str(directory)) == 0
    module = f"{name.replace('-', '_')}_tests"
    files = [GITHUB, "setup.cfg", f"tests/{module}/__init__.py", "tests/setup.py"]
    assert tree(directory) == files
    said = capsys.readouterr().out
    assert all(f"Wrote {directory / file}.\n" in said for file in files)
    (spec,) = read_specs(directory)
    assert (spec.name, spec.copies[0].target) == ("tiny", f"/usr/src/{name}")
    for file in ("tests/setup.py", f"tests/{module}/__init__.py"):
        compile((directory / file).read_text(), file, "exec")


def test_the_job_is_for_the_ci_that_is_named(tmp_path):
    assert init("--ci=gitlab", str(tmp_path)) == 0
    assert "$CI_SERVER_URL/OWNER/" in (tmp_path / ".gitlab-ci.yml").read_text()
    assert not (tmp_path / ".github").exists()
    with pytest.raises(ConfigurationError, match="expected github or gitlab"):
        init("--ci=jenkins", str(tmp_path / "other"))


@pytest.mark.parametrize(
    "name", ["tests/setup.py", "tests/app_tests/__init__.py", GITHUB]
)
def test_what_is_there_is_kept_and_then_nothing_is_written(tmp_path, name):
    app = tmp_path / "app"
    path = app / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(UsageError, match="is there already; nothing was written"):
        init(str(app))
    assert tree(app) == [name]
    assert path.read_text() == "precious"


@pytest.mark.parametrize("text", ["[metadata]\nname = app", "", "[a]\n[b]\nx = 1\n"])
def test_a_setup_cfg_of_the_app_is_added_to(tmp_path, capsys, text):
    path = tmp_path / "setup.cfg"
    path.write_text(text)
    assert init(str(tmp_path)) == 0
    assert path.read_text().startswith(text)
    (spec,) = read_specs(tmp_path)
    assert spec.name == "tiny"
    assert f"Added to {path}.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[qubes_itests:template:tiny]\n",
            r"has \[qubes_itests:template:tiny\] already",
        ),
        ("precious", "no section headers"),
    ],
)
def test_one_that_cannot_be_added_to_is_kept(tmp_path, text, said):
    (tmp_path / "setup.cfg").write_text(text)
    with pytest.raises(UsageError, match=f"{said}.*nothing was written"):
        init(str(tmp_path))
    assert tree(tmp_path) == ["setup.cfg"]
    assert (tmp_path / "setup.cfg").read_text() == text


def test_one_is_as_it_was_if_something_else_is_in_the_way(tmp_path):
    (tmp_path / "setup.cfg").write_text("[metadata]")
    (tmp_path / ".github").touch()
    with pytest.raises(UsageError, match="nothing was written"):
        init(str(tmp_path))
    assert (tmp_path / "setup.cfg").read_text() == "[metadata]"


def test_a_link_that_leads_nowhere_is_something_too(tmp_path):
    (tmp_path / "setup.cfg").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match="is there already"):
        init(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["setup.cfg"]


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / ".github").touch()
    with pytest.raises(UsageError, match="nothing was written"):
        init(str(tmp_path))
    assert tree(tmp_path) == [".github"]


def test_an_app_with_tests_needs_no_first_one(tmp_path):
    init(str(tmp_path))
    with pytest.raises(UsageError, match=r"has tests already, in .*/tests"):
        init(str(tmp_path))
