"""``template``: what it lists, and what it refuses."""

import pytest

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
