"""``template``: what it lists, and what it refuses."""

import pytest

from qubes_itests import preparation
from qubes_itests.cli import command_line
from qubes_itests.exit_codes import ExitCode


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUBES_ITESTS_CACHE", str(tmp_path))


def test_list_names_all(capsys):
    assert command_line(["template", "list"]) == 0
    assert capsys.readouterr().out.split() == ["tiny", "debian-12", "debian-13"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "x"], "say `list`, or `build` and names"),
        (["build"], "say `list`, or `build` and names"),
        (["biuld", "tiny"], "say `list`, or `build` and names"),
        (["build", "debain-12"], "there is no template 'debain-12'; there are: tiny,"),
    ],
)
def test_what_it_does_not_understand_it_says(capsys, words, said):
    assert command_line(["template", *words]) == ExitCode.USAGE_ERROR
    assert said in capsys.readouterr().err


def offer(monkeypatch, acts):
    def act(kind, *_):
        acts.append(kind)

    offered = {
        "downloads": {"new": lambda _, say: (say("fetching"), act("fetched"))},
        "templates": {name: lambda *_: act("built") for name in ("new", "other")},
    }
    monkeypatch.setattr(
        "qubes_itests.assembly.offers", lambda _registry, kind: offered[kind]
    )
    monkeypatch.setattr("qubes_itests.host.kernel.find_kernel", lambda _cache: None)


def test_what_needs_a_network_is_fetched_before_it_is_built(monkeypatch, capsys):
    acts = []
    offer(monkeypatch, acts)
    preparation.prepare(["other", "new", "unknown"])
    assert acts == ["fetched", "built"]
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("building template new: fetching (")
    assert said[-1].startswith("template new: ")
