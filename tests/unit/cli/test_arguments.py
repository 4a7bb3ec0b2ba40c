"""The words of the command line."""

from __future__ import annotations

import pytest

from qubes_itests.cli.arguments import parse
from qubes_itests.run.settings import ConfigurationError, Keep


def test_no_words_mean_the_main_job_in_a_sandbox():
    command = parse([])
    assert (command.name, command.rest, command.in_sandbox) == ("run", (), True)


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--keep=failed", "-x", "smoke"],
        ["--keep=failed", "run", "-x", "smoke"],
        ["--keep", "failed", "run", "-x", "smoke"],
        ["-x", "run", "--keep", "failed", "smoke"],
        ["--keep=failed", "-x", "smoke"],
    ],
)
def test_options_work_on_both_sides_of_the_sub_command(words):
    command = parse(words)
    assert (command.name, command.rest) == ("run", ("-x", "smoke"))
    assert command.given == {"keep": Keep.FAILED}


def test_options_of_pytest_reach_pytest_in_order():
    words = ["-k", "list and not doctor", "-m", "shell", "--junitxml=x.xml", "--lf"]
    assert parse(words).rest == tuple(words)


def test_the_value_of_an_option_is_no_sub_command():
    assert parse(["-k", "list"]).name == "run"
    assert parse(["--template", "clean", "list"]).name == "list"


def test_a_sub_command_may_follow_its_options():
    assert parse(["--json", "list"]).json
    assert parse(["tiny", "--timeout", "5"]).rest == ("tiny",)


def test_templates_add_up():
    given = parse(["--template", "a", "--template=b"]).given
    assert given == {"template": ("a", "b")}


def test_cold_starts_can_be_asked_for():
    assert parse(["--no-warm"]).given == {"warm": False}
    assert parse(["--warm"]).given == {"warm": True}


@pytest.mark.parametrize("option", ["--collect-only", "--co", "--fixtures"])
def test_what_runs_no_test_takes_no_sandbox(option):
    assert not parse([option]).in_sandbox


def test_an_unknown_option_of_another_sub_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["list", "--frobnicate"])
    assert ended.value.code == 4
    assert "--frobnicate" in capsys.readouterr().err


def test_a_bad_value_names_its_option():
    with pytest.raises(ConfigurationError, match="--seed: seed: 'x' is not"):
        parse(["--seed", "x"])


def test_orphans_are_listed_unless_words_say_more():
    assert parse(["orphans"]).words == ()
    command = parse(["orphans", "--socket=x", "remove", "a:b/c/d", "a:b/c/e"])
    assert command.words == ("remove", "a:b/c/d", "a:b/c/e")
    assert (command.socket, command.in_sandbox) == ("x", False)
