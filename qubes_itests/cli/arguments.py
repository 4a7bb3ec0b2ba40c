"""The arguments of the command line, parsed into a `Command`."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from qubes_itests import __version__
from qubes_itests.exit_codes import ExitCode
from qubes_itests.program import NAME
from qubes_itests.run.options import PYTEST, option, options
from qubes_itests.run.settings import OPTIONS, convert

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    import pytest


__all__ = ["ALL_OPTIONS", "COMMANDS", "Command", "parse", "resembled"]


class _SubCommand(NamedTuple):
    """A sub-command.

    :param module: of this package, which carries it out.
    :param meaning: what it does: a phrase that begins with a verb.
    :param words: what it takes besides options: a field of `Command`, how many as
        argparse says it, their name in the help, and the help.
    """

    module: str
    meaning: str
    words: tuple[tuple[str, str | None, str, str], ...] = ()


# fmt: off
COMMANDS = {
    "run": _SubCommand("run", "run the tests of all installed plugins (the default)"),
    "list": _SubCommand(
        "listing", "list the tests without running them",
        (("words", "*", "[SELECTOR...]", "ids of tests, or how they begin"),)),
    "doctor": _SubCommand("doctor", "check what this machine needs to run tests"),
    "shell": _SubCommand(
        "shell", "open a shell in a fresh VM made from a template",
        (("target", None, "VM-or-template", "a template, or a kept VM's directory"),)),
    "thaw": _SubCommand(
        "thaw", "open shells in the VMs of a failed test, where they were as it failed",
        (("words", "+", "DIR [VM...]",
          "the folder `frozen` that --keep=state made, and in which VMs"),)),
    "repl": _SubCommand("repl", "open a Python prompt with an app and VMs"),
    "ps": _SubCommand(
        "ps", "show the runs under way, what their tests wait for, and their VMs"),
    "attach": _SubCommand(
        "attach", "open a shell in a VM of a run under way, also of one that hangs",
        (("target", None, "[RUN/]VM", "as `ps` shows them"),)),
    "clean": _SubCommand("clean", "remove what killed runs left behind"),
    "report": _SubCommand(
        "last_run", "show the failures of the last run again, or make its report.html",
        (("words", "*", "[html|trace [DIR]]",
          "what to make of the artefacts in DIR: report.html, files for Perfetto"),)),
    "history": _SubCommand(
        "history", "show how tests went in earlier runs",
        (("words", "*", "[TEST...]", "ids of tests, or how they begin"),)),
    "merge": _SubCommand(
        "merge", "merge the results of machines that shared a run into those of one",
        (("words", "+", "DIR...", "the artefacts of each, with run.json"),)),
    "compare": _SubCommand(
        "compare", "compare our core with that of --core: names, errors and properties,"
        " or the outcomes of tests on both: those of --app, or its own suites",
        (("words", "*", "[SELECTOR...]", "ids of tests, or how they begin"),)),
    "memory": _SubCommand(
        "memory",
        "show who holds the memory, live, plot it as an SVG, or compare two qmemmans",
        (("words", "*", "[plot] [FILE] | compare [SCENARIO...]",
          "a timeline: memory.jsonl; or scenarios for ours and that of --core"),)),
    "serve": _SubCommand(
        "serve", "run the core as a daemon with the Admin API on a socket"),
    "qvm": _SubCommand(
        "qvm", "run a client tool of Qubes OS against the newest `serve`",
        (("tool", None, "TOOL", "its name: qvm-ls, qvm-create and so on"),
         ("words", argparse.REMAINDER, "...", "the arguments of the tool"))),
    "orphans": _SubCommand(
        "orphans", "list, take over or remove volumes of `serve` that no VM has",
        (("words", "*", "[remove POOL:VOLUME... | adopt NAME CLASS [TEMPLATE]]",
          "what to do; by default they are listed"),)),
    "init": _SubCommand(
        "init", "write a first test of an app, what its VMs need, and a job for its CI",
        (("words", "*", "[DIR]", "the app's (default: the current one)"),)),
    "completion": _SubCommand(
        "completion", "print a script that has a shell complete command lines",
        (("target", None, "SHELL", "bash, zsh, fish or tcsh"),)),
    "man": _SubCommand("man", "print the manual page"),
    "template": _SubCommand(
        "template", "build templates before the first run that needs them, or list all",
        (("words", "+", "list | build NAME...", "list all, or build those named"),)),
}
# fmt: on
#: With these pytest runs no test.
_NO_TESTS = frozenset(
    {
        *("--collect-only", "--co", "--fixtures", "--funcargs", "--fixtures-per-test"),
        *("--markers", "--setup-plan"),
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """What is to be done.

    :param name: the sub-command.
    :param arguments: the same command line, beginning with the sub-command.
    :param misspelt: of `run`: its first word, if it resembles a sub-command.
    :param given: the settings that were given, converted.
    :param rest: for `run` what pytest gets.
    :param target: of `shell`: a template, or the directory of a kept VM; of `attach`:
        a VM, after the name of its run and a slash if need be; of `completion` a shell.
    :param tool: of `qvm`: its name.
    :param words: of `history` tests; of `merge` directories; of `memory` ``plot`` or
        not, and a timeline, or ``compare`` and scenarios; of `report` ``html`` and a
        directory, or nothing; of `init` a directory, or nothing; of `qvm`
        what follows the tool; of `thaw` a directory, then VMs; of `template` ``list``,
        or ``build`` and names; of `orphans` what to do to which, or nothing.
    """

    name: str
    arguments: tuple[str, ...] = ()
    misspelt: str = ""
    given: Mapping[str, object] = field(default_factory=dict)
    rest: tuple[str, ...] = ()
    target: str = ""
    tool: str = ""
    words: tuple[str, ...] = ()
    # fmt: off
    expression: str = option(
        "", None, "EXPRESSION", "list compare",
        "take only tests whose ids match, as -k of pytest selects them", short="-k")
    numprocesses: str = option(
        "1", None, "NUMBER", "compare",
        "run the tests of a core in NUMBER workers, as -n of pytest-xdist", short="-n")
    resume: bool = option(
        False, None, "", "compare",
        "run only those tests of whose suites an earlier comparison, with the same"
        " options, has left no results in the directory of artefacts")
    json: bool = option(
        False, None, "", "list doctor history ps compare", "print JSON, not text")
    cache: bool = option(
        False, None, "", "clean", "also remove images and saved states")
    output: str = option(
        "", None, "SVG", "memory",
        "write the picture to the file SVG (default: named as the timeline)",
        short="-o")
    export: str = option(
        "", None, "FILE", "history",
        "write the results of all runs into FILE, for another machine to import")
    add: tuple[str, ...] = option(
        (), None, "FILE", "history",
        "add the results in FILE, written by --export on another machine, or in the"
        " artefacts of a run, if FILE is their directory")
    ci: str = option(
        "github", None, "KIND", "init",
        "write the job for the CI of KIND, which is github or gitlab")
    directory: str = option(
        "", None, "DIR", "serve", "keep the VMs in DIR until the next time")
    print_env: bool = option(
        False, None, "", "serve",
        "print the environment that has client tools call the newest server, and exit")
    socket: str = option(
        "", None, "PATH", "qvm orphans",
        "call the server with the socket PATH (default: the newest)")
    # fmt: on

    @property
    def module(self) -> str:
        """The module of this package that carries it out."""
        return COMMANDS[self.name].module

    @property
    def shows_tests(self) -> bool:
        """Whether it loads plugins without running their tests."""
        return self.name == "list" or (self.name == "run" and not self.in_sandbox)

    @property
    def in_sandbox(self) -> bool:
        """Whether it makes VMs, and so needs a sandbox."""
        if self.name == "run":
            return _NO_TESTS.isdisjoint(self.rest)
        if self.name == "serve":
            return not self.print_env
        if self.name == "compare":
            # tests are run by runs that it starts, which have their own
            return not (self.words or self.expression or "app" in self.given)
        return self.name in ("shell", "repl", "thaw")


ALL_OPTIONS = (*OPTIONS.values(), *options(Command))


def parse(arguments: Sequence[str]) -> Command:
    """Return what the arguments ask for; exits for ``--help`` and wrong usage.

    :raise ConfigurationError: for an option with a bad value.
    """
    name, misspelt, others = "run", "", list(arguments)
    if (position := _first_word(arguments)) is not None:
        if others[position] in COMMANDS:
            name = others.pop(position)
        else:
            misspelt = others[position]
    parser = _parser(name)
    read = parser.parse_known_intermixed_args
    if name in ("run", "qvm"):  # which pass on what is not ours, in its order
        read = parser.parse_known_args
    known, rest = read(others)
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in vars(known).items()
        if value is not None
    }
    for made in ALL_OPTIONS:
        if made.name in values and name not in made.commands:
            takers = " and ".join(f"`{n}`" for n in made.commands if n != PYTEST)
            given = made.spellings()[0]
            parser.error(f"`{name}` does not take {given}, which is for {takers}")
    if rest and name != "run":
        parser.error(f"`{name}` does not take {' '.join(rest)}")
    settings = {
        key: convert(key, values.pop(key), made.spellings()[0])
        for key, made in OPTIONS.items()
        if key in values
    }
    return Command(
        name=name,
        arguments=(name, *others),
        misspelt=misspelt,
        given=settings,
        rest=tuple(rest),
        **values,
    )


def _first_word(arguments: Sequence[str]) -> int | None:
    """Return where the first word is that is no option and no value of one.

    None if there is none, or it neither is nor resembles the name of a sub-command.
    """
    takes_value = {s: bool(o.metavar) for o in ALL_OPTIONS for s in o.spellings()}
    takes_value |= dict.fromkeys(("-h", "--help", "-V", "--version"), False)
    #: What only pytest can tell the meaning of.
    foreign: list[str] = []
    remaining = iter(enumerate(arguments))
    for position, word in remaining:
        name, equals, _ = word.partition("=")
        if word == "--":
            return None
        if name in takes_value:
            if takes_value[name] and not equals:
                next(remaining, None)
        elif word.startswith("-"):
            foreign.append(word)
        elif not foreign:
            return position if resembled(word) else None
        else:
            foreign.append(word)
            if resembled(word) and (found := _words_to_pytest(foreign)):
                return position if found == [word] else None
    return None


def resembled(word: str) -> str:
    """Return the sub-command that has such a name or a similar one, or ""."""
    if word in COMMANDS or not word.isalpha():
        return word if word in COMMANDS else ""
    import difflib

    return "".join(difflib.get_close_matches(word, COMMANDS, n=1))


def _words_to_pytest(arguments: Sequence[str]) -> list[str]:
    """Return those arguments that are neither options of pytest nor their values.

    Only pytest and its plugins know which of their options take a value, and loading
    them takes a third of a second. So this is for command lines where a word that may
    be a sub-command comes after an option that is not ours.
    """
    import contextlib
    import io

    import pytest

    found: list[str] = []

    class Question:
        # A wrapper, to be before plugins that begin their work here (pytest-cov does).
        @pytest.hookimpl(wrapper=True, tryfirst=True)
        def pytest_load_initial_conftests(
            self, parser: pytest.Parser
        ) -> Generator[None]:
            found.extend(parser.parse_known_args(arguments).file_or_dir)
            pytest.exit("that was all there was to be found out")
            yield

    # As for the tests themselves, no file of another suite has a say in this.
    apart = ("-c", os.devnull, "--rootdir", os.curdir, "--noconftest")
    # What pytest does not understand it says when it runs the tests.
    with (
        contextlib.suppress(pytest.exit.Exception),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        pytest.main([*apart, *arguments], [Question()])
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # 2, argparse's own, is pytest's status for an interrupted run.
        self.print_usage(sys.stderr)
        self.exit(ExitCode.USAGE_ERROR, f"{self.prog}: {message}\n")


def _parser(name: str) -> argparse.ArgumentParser:
    command, usage = COMMANDS[name], "[run] [options] [pytest options] [selectors]"
    if name != "run":
        usage = " ".join([name, "[options]", *(words[2] for words in command.words)])
    parser = _Parser(
        prog=NAME if name == "run" else f"{NAME} {name}",
        description="Run Qubes OS integration tests against real VMs."
        if name == "run"
        else f"{command.meaning[0].upper()}{command.meaning[1:]}.",
        epilog=_epilog() if name == "run" else None,
        usage=f"{NAME} {usage}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for dest, number, metavar, meaning in command.words:
        parser.add_argument(dest, nargs=number, metavar=metavar, help=meaning)
    if name == "run":
        version = f"{NAME} {__version__}"
        parser.add_argument("--version", "-V", action="version", version=version)
    places = "also in [tool.qubes_itests] of pyproject.toml, and QUBES_ITESTS_*"
    settings = None
    for made in ALL_OPTIONS:
        if name not in made.commands:
            # what is not for a run may be an option of pytest
            if name != "run":
                made.offer(parser.add_argument, hidden=argparse.SUPPRESS)
        elif made.name not in OPTIONS:
            made.offer(parser.add_argument)
        else:
            settings = settings or parser.add_argument_group("settings", places)
            made.offer(settings.add_argument)
    return parser


def _epilog() -> str:
    rows = "\n".join(f"  {name:10} {c.meaning}" for name, c in COMMANDS.items())
    return f"""\
sub-commands, before or after the options (--help after one shows its own):
{rows}

A selector is the beginning of a test's id as `list` shows it:
  {NAME} smoke
  {NAME} smoke::TC_Run_tiny::test_010_run
Options of pytest keep their meaning: -k -m -x --lf -v --junitxml=FILE ...
and so does -n NUMBER of pytest-xdist: of workers, each in its own sandbox."""
