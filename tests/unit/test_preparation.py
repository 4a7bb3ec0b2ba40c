"""What is made ready before a run, and how the run is told of what could not be."""

import os

import pytest

from qubes_itests.guest.exc import ImageError
from qubes_itests.host.exc import NoNetworkError
from qubes_itests.run import preparation
from qubes_itests.run.plugins import named_plugins
from qubes_itests.run.result import Prepared
from qubes_itests.run.settings import ConfigurationError, Settings

SECTION = "[qubes_itests:template:mine]\nbase = tiny\n"


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """Give each test an environment, a cache and a path of imports of its own."""
    monkeypatch.setattr(preparation.sys, "path", list(preparation.sys.path))
    monkeypatch.setenv("QUBES_ITESTS_CACHE", str(tmp_path / "cache"))
    for name in ("QUBES_ITESTS_TEMPLATE", "QUBES_ITESTS_PREPARED", "PYTHONPATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def offered(monkeypatch):
    """Have templates that only take note of being fetched and built."""
    acts = []

    def offer(_plugins, kind):
        def act(name, error=None):
            def run(*arguments):
                acts.append((kind, name))
                if kind == "downloads":
                    arguments[1]("fetching")
                if error:
                    raise error

            return run

        problem = ImageError("template mine", "it does not build")
        found = {"new": act("new"), "mine": act("mine", problem)}
        if kind == "templates":
            return found | {"other": act("other"), "tiny": act("tiny")}
        return found | {"far": act("far", NoNetworkError("far", "no route"))}

    monkeypatch.setattr("qubes_itests.run.hooks.offers", offer)
    monkeypatch.setattr("qubes_itests.host.kernel.find_kernel", lambda _cache: None)
    return acts


def app(tmp_path, name, setup):
    directory = tmp_path / name
    directory.mkdir()
    (directory / "setup.cfg").write_text(setup)
    return directory


def test_what_needs_a_network_is_fetched_before_it_is_built(offered, capsys):
    preparation.prepare(Settings(template=("other", "new", "unknown")))
    assert offered == [("downloads", "new"), ("templates", "new")]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "template new: fetching (0 s)"
    assert said[-1] == "template new: ready in 0 s"


def test_the_usual_run_prepares_nothing(offered):
    preparation.prepare(Settings())
    assert offered == []
    assert "QUBES_ITESTS_PREPARED" not in os.environ


@pytest.mark.usefixtures("offered")
def test_a_run_is_repeated_on_the_same_templates_and_with_the_same_limits():
    preparation.prepare(Settings(template=("new", "other"), timeout=9, keep="failed"))
    words = Prepared.told().words
    assert words == ("--template", "new", "--template", "other", "--timeout", "9")


@pytest.mark.usefixtures("offered")
def test_a_template_that_nobody_derives_ends_the_run(tmp_path):
    settings = Settings(template=("far",), app=(app(tmp_path, "one", ""),))
    with pytest.raises(NoNetworkError):
        preparation.prepare(settings)


@pytest.mark.usefixtures("offered")
def test_a_derived_one_that_does_not_build_is_told_and_the_run_goes_on(
    tmp_path, capsys
):
    one = app(tmp_path, "one", SECTION)
    preparation.prepare(Settings(app=(one,)))
    said = capsys.readouterr().err
    assert "\ntemplate mine: failed after 0 s\n" in said
    # for who selects tests, and so not the one that fails because of it
    assert said.splitlines()[-1].startswith(f"app one: {one} cannot be installed: ")
    assert os.environ["QUBES_ITESTS_TEMPLATE"] == "mine"
    told = Prepared.told()
    assert "it does not build" in told.templates["mine"]
    assert told.words == ("--app", str(one))


def test_a_template_that_was_asked_for_wins_over_those_of_apps(tmp_path, offered):
    one = app(tmp_path, "one", SECTION)
    preparation.prepare(Settings(app=(one,), template=("new",)))
    assert offered == [("downloads", "new"), ("templates", "new")]
    assert "QUBES_ITESTS_TEMPLATE" not in os.environ


def test_a_broken_app_becomes_one_failing_test_and_others_are_left_out(tmp_path):
    odd = app(tmp_path, "odd", "[qubes_itests:template:x]\nnonsense = 1\n")
    none = app(tmp_path, "none", "")
    preparation.prepare_listing(Settings(app=(odd, none)))
    plugins = dict(named_plugins(["tiny"]))
    assert set(plugins) == {"odd", "none"}
    assert "unknown key 'nonsense'" in str(plugins["odd"].problems[0])
    assert "names the entry point group" in str(plugins["none"].problems[0])


def test_an_app_that_is_no_directory_is_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(ConfigurationError, match="there is no directory"):
        preparation.prepare_listing(Settings(app=(tmp_path / "nothing",)))


def test_suites_for_our_core_need_a_checkout(tmp_path):
    settings = Settings(core_suites=tmp_path)
    with pytest.raises(ConfigurationError, match="expected a checkout of core-admin"):
        preparation.prepare_listing(settings)
    (tmp_path / "qubes/tests/integ").mkdir(parents=True)
    preparation.prepare_listing(settings)
    assert Prepared.told().core_suites == str(tmp_path)


def test_what_is_told_is_what_was_found():
    complaints = {"a": {"fail_on": ["journal"], "allow_line": ["x y"]}}
    prepared = Prepared(
        *({"a": ("t",)}, {"x": "y"}, {"t": "z" * 9000}, {"a": 5.0}, ("--app", "d")),
        complaints=complaints,
    )
    environment = {}
    prepared.tell(environment)
    told = Prepared.told(environment)
    assert (told.entries, told.apps) == ({"a": ("t",)}, {"x": "y"})
    assert (told.words, told.timeouts) == (("--app", "d"), {"a": 5.0})
    assert told.templates == {"t": "z" * 8000}
    assert told.complaints == complaints
    assert Prepared.told({}) == Prepared()


def test_suites_are_looked_for_before_templates_are_built(tmp_path, offered):
    settings = Settings(core_suites=tmp_path, template=("new",))
    with pytest.raises(ConfigurationError, match="expected a checkout of core-admin"):
        preparation.prepare(settings)
    assert offered == []
