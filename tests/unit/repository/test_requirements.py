"""What tests of apps need here, and where the files are that apps name."""

import importlib.metadata

import pytest
from packaging.requirements import Requirement

from qubes_itests.repository.requirements import (
    Repositories,
    Requirements,
    check_requirement,
)


@pytest.fixture
def places(tmp_path):
    for name in ("app/src", "beside/part", "elsewhere/named", "elsewhere/next/part"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "app/file").touch()
    (tmp_path / "app/out").symlink_to(tmp_path / "beside")
    named = {"named": tmp_path / "elsewhere/named", "beside2": tmp_path / "gone"}
    return Repositories(tmp_path / "app", named)


def test_words_are_told_apart_by_who_can_meet_them(places, tmp_path):
    words = "pillow numpy>=1,<3 debian:libmagic1 beside:part named:. pillow"
    assert Requirements.sort(words.split(), places) == Requirements(
        ("pillow", "numpy>=1,<3"),
        (tmp_path / "beside/part", tmp_path / "elsewhere/named"),
        ("libmagic1",),
    )


@pytest.mark.parametrize(
    "word",
    ["-rfile", "--index-url=x", "a@http://b", "/etc", "../x", "debian:X", "a b", "a:"],
)
def test_words_that_require_nothing(word):
    """None of them reaches pip as an option, or as an address."""
    with pytest.raises(ValueError, match="package"):
        check_requirement(word)


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("../beside", "is not in"),
        ("out", "is not in"),
        ("/etc", "is not in"),
        ("nothing", "no file or directory 'nothing'"),
        ("beside:../app", "is not in"),
        ("beside:/etc", "is not in"),
        ("beside:nothing", "no file or directory"),
        ("next:nothing", "no file or directory"),
        ("other:part", "there is no repository 'other'"),
        ("beside2:part", "there is no repository 'beside2'"),
    ],
)
def test_files_are_in_the_repository_that_is_named(places, word, error):
    assert places.find("file").name == "file"
    assert places.find("beside:part").parent.name == "beside"
    assert places.find("next:part").parent.name == "next"
    with pytest.raises(ValueError, match=error):
        places.find(word)


def test_what_the_core_of_qubes_os_brings_to_dom0_is_there_for_all_plugins():
    words = map(Requirement, importlib.metadata.requires("qubes-itests"))
    there = {word.name for word in words if word.marker is None}
    assert {"docutils", "jinja2", "lxml", "pyyaml", "setuptools"} <= there
