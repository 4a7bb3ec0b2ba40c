"""The words of the command line."""

from __future__ import annotations

import re

import pytest

from qubes_itests.cli.arguments import COMMANDS, Command, parse
from qubes_itests.run.options import PYTEST, options
from qubes_itests.run.settings import OPTIONS, ConfigurationError, Keep

#: What a plugin of pytest may add: one option that takes a value, one that may.
PLUGIN = """
def pytest_addoption(parser):
    parser.addoption("--html")
    parser.addoption("--cov", action="append", nargs="?", const=True)
def pytest_load_initial_conftests():
    raise AssertionError("it has begun")
"""


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


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *((name, ["--core", "c"]) for name in ("compare", "list", "memory")),
        ("history", ["--json"]),
        ("merge", ["--artifacts=x"]),
    ],
)
def test_words_may_stand_on_both_sides_of_an_option(name, option):
    assert parse([name, "one", *option, "two"]).words == ("one", "two")
    assert parse([name, *option, "one"]).words == ("one",)


def test_options_of_pytest_reach_pytest_in_order():
    words = ["-k", "list and not doctor", "-m", "shell", "--junitxml=x.xml", "--lf"]
    assert parse(words).rest == tuple(words)


def test_the_value_of_an_option_is_no_sub_command():
    assert parse(["-k", "list"]).name == "run"
    assert parse(["--template", "clean", "list"]).name == "list"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "reporting_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTEST_PLUGINS", "reporting_plugin")


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("words", "name", "rest"),
    [
        ("--html report", "run", "--html report"),
        ("--html report report", "report", "--html"),
        ("--cov run", "run", "--cov run"),
        ("--cov run run -x", "run", "--cov run -x"),
        ("--keep=failed --cov list smoke", "run", "--cov list smoke"),
        ("-m doctor doctor", "doctor", "-m doctor"),
        ("-x smoke list", "run", "-x smoke list"),
        ("--maxfail 2 doctor", "doctor", "--maxfail 2"),
        ("-n doctor", "run", "-n doctor"),
        ("--lf -- list", "run", "--lf -- list"),
        ("--html --keep=failed report", "run", "--html report"),
    ],
)
def test_pytest_says_what_is_the_value_of_one_of_its_options(words, name, rest, capsys):
    """And its plugins do; the first word that is left is the sub-command."""
    if name == "run":
        command = parse(words.split())
        assert (command.name, " ".join(command.rest)) == (name, rest)
        # the same in the sandbox, where pytest is not asked again
        assert command.arguments[0] == "run"
        assert parse(command.arguments) == command
        return
    with pytest.raises(SystemExit):
        parse(words.split())
    assert f": `{name}` does not take {rest}\n" in capsys.readouterr().err


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
    with pytest.raises(
        ConfigurationError, match="--seed: seed: expected a whole number, got 'x'"
    ):
        parse(["--seed", "x"])


def test_orphans_are_listed_unless_words_say_more():
    assert parse(["orphans"]).words == ()
    command = parse(["orphans", "--socket=x", "remove", "a:b/c/d", "a:b/c/e"])
    assert command.words == ("remove", "a:b/c/d", "a:b/c/e")
    assert (command.socket, command.in_sandbox) == ("x", False)


ALL = [*OPTIONS.values(), *options(Command)]
NAMES = tuple(COMMANDS)


@pytest.mark.parametrize("name", NAMES)
def test_each_sub_command_shows_its_own_options_and_no_others(name, capsys):
    with pytest.raises(SystemExit):
        parse([name, "--help"])
    shown = re.findall(r"(?m)^  (-.*?)(?:  |$)", capsys.readouterr().out)
    words = {word for line in shown for word in re.findall(r"--[\w-]+", line)}
    own = {"--help", "--version"} if name == "run" else {"--help"}
    for option in ALL:
        if name in option.commands:
            own |= {word for word in option.spellings() if word.startswith("--")}
    assert words == own
    assert len(words) == {"qvm": 2, "doctor": 2, "clean": 2, "report": 1}.get(
        name, len(words)
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "run"])
def test_each_sub_command_refuses_the_options_of_others(name, capsys):
    for option in ALL:
        if name not in option.commands:
            words = [option.spellings()[0], *(["3"] if option.metavar else [])]
            needed = {"shell": ["tiny"], "qvm": ["qvm-ls"], "template": ["list"]} | {
                "merge": ["x"],
                "attach": ["vm"],
                "thaw": ["directory"],
                "completion": ["bash"],
            }
            with pytest.raises(SystemExit) as ended:
                parse([name, *words, *needed.get(name, ())])
            assert ended.value.code == 4
            said = f"`{name}` does not take {words[0]}, which is for `"
            assert said in capsys.readouterr().err


def test_the_options_of_a_tool_are_the_tools():
    words = ("--seed", "3", "--json", "--help")
    command = parse(["qvm", "qvm-ls", *words])
    assert (command.tool, command.words) == ("qvm-ls", words)


def test_each_option_is_explained_by_a_phrase_of_its_own():
    for option in ALL:
        assert re.fullmatch(r"[a-z]+ .*[^.]", option.meaning)
        assert option.meaning.split()[0] not in {"a", "as", "for", "of", "the", "to"}
        assert set(option.commands) <= {*NAMES, PYTEST}


@pytest.mark.parametrize("word", ["docter", "lst", "templates", "sell"])
def test_a_word_that_resembles_a_sub_command_is_told_from_a_selector(word):
    assert (parse([word]).misspelt, parse([word]).rest) == (word, (word,))
    assert parse(["-x", word]).misspelt == word
    for words in (["-k", word], ["run", word], ["smoke", word], [f"{word}::TC_A"]):
        assert parse(words).misspelt == ""


def test_a_flag_of_settings_can_be_cleared():
    given = parse(["--no-shell-on-failure", "--shell-on-failure"]).given
    assert given == {"shell_on_failure": True}
    assert parse(["--no-shell-on-failure"]).given == {"shell_on_failure": False}
