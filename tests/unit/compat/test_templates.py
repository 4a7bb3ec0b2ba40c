"""Classes per template that suites make themselves."""

import types

import pytest

from qubes_itests.testcase import (
    create_testcases_for_templates,
    maybe_create_testcases_on_import,
    suites,
)


class Base:
    """What the classes have in common."""


@pytest.fixture
def module():
    return types.ModuleType("suite")


def create(module):
    return create_testcases_for_templates("TC", Base, module=module, more="this")


def test_a_suite_may_make_them_on_import_and_again_when_asked(module, monkeypatch):
    """It has the same classes then, and not none."""
    monkeypatch.setenv("QUBES_TEST_TEMPLATES", "tiny debian-12")
    maybe_create_testcases_on_import(lambda: create(module))
    first = getattr(module, "TC_debian-12")
    assert (first.template, first.more) == ("debian-12", "this")
    assert first.__module__ == "suite"
    assert issubclass(first, Base)
    assert list(create(module)) == ["suite.TC_tiny", "suite.TC_debian-12"]
    assert getattr(module, "TC_debian-12") is first


def test_without_known_templates_nothing_is_made_on_import(module, monkeypatch):
    monkeypatch.delenv("QUBES_TEST_TEMPLATES", raising=False)
    monkeypatch.delenv("QUBES_TEST_LOAD_ALL", raising=False)
    maybe_create_testcases_on_import(lambda: create(module))
    assert not hasattr(module, "TC_tiny")


@pytest.mark.parametrize(
    ("variable", "skips"), [("", True), ("set", False), (None, True)]
)
def test_skip_unless_a_variable_is_set(monkeypatch, variable, skips):
    monkeypatch.delenv("SUITE_WANTS", raising=False)
    if variable is not None:
        monkeypatch.setenv("SUITE_WANTS", variable)
    decorated = suites.skipUnlessEnv("SUITE_WANTS")(lambda: None)
    assert getattr(decorated, "__unittest_skip__", False) is skips


def test_skip_unless_git(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert suites.skipUnlessGit(lambda: None).__unittest_skip__
