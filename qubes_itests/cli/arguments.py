"""From the words of the command line to a `Command`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from qubes_itests import __version__
from qubes_itests.exit_codes import ExitCode
from qubes_itests.run.settings import convert

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Command", "parse"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Options of pytest whose value is the next word: that word names no sub-command.
_PYTEST_VALUES = _words("""
    -c -k -m -n -o -p -r -W --basetemp --capture --color --confcutdir --config-file
    --deselect --dist --durations --durations-min --ignore --ignore-glob --import-mode
    --junit-prefix --junit-xml --junitprefix --junitxml --last-failed-no-failures
    --lfnf --log-cli-level --log-file --log-level --maxfail --numprocesses
    --override-ini --pastebin --pdbcls --pythonwarnings --report-chars --rootdir
    --show-capture --tb --verbosity --tx --px --maxprocesses --max-worker-restart
    --maxschedchunk --testrunuid
""")
_OWN_VALUES = _words("""
    --keep --artifacts --timeout --seed --template --hypervisor --filesystem
    --memory-budget --host-memory --directory --socket --app --template-spec
    --start-timeout --plugin --requires --policy --repository
""")
#: With these pytest runs no test.
_NO_TESTS = _words("""
    --collect-only --co --fixtures --funcargs --fixtures-per-test --markers
    --setup-plan
""")
_MODULES = {
    "run": "run",
    "list": "listing",
    "doctor": "doctor",
    "shell": "shell",
    "clean": "clean",
    "report": "last_run",
    "memory": "memory",
    "serve": "serve",
    "qvm": "qvm",
    "orphans": "orphans",
    "template": "template",
}
_HELP = {
    "run": "run the tests of all installed plugins (the default)",
    "list": "list the tests without running them",
    "doctor": "check what this machine needs to run tests",
    "shell": "open a shell in a fresh VM made from a template",
    "clean": "remove what killed runs left behind",
    "report": "show the failures of the last run again",
    "memory": "show who holds the memory, live, or plot it as an SVG",
    "serve": "run the core as a daemon with the Admin API on a socket",
    "qvm": "run a client tool of Qubes OS against the newest `serve`",
    "orphans": "list, take over or remove volumes of `serve` that no VM has",
    "template": "build a template before the first run that needs it, or list them",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """What is to be done.

    :param name: the sub-command.
    :param given: the settings that were given, converted.
    :param rest: for `run` what pytest gets.
    :param json: print JSON.
    :param target: of `shell`: a template, or the directory of a kept VM.
    :param cache: of `clean`: remove the cache too.
    :param words: of `memory`: ``plot`` or not, and a timeline; of `qvm` what follows
        the tool; of `template` ``list``, or ``build`` and names; of `orphans` what to
        do to which, or nothing.
    :param output: of `memory plot`: the file to write.
    :param directory: of `serve`: where its state is kept; empty to forget it.
    :param print_env: of `serve`: print how to call the one that runs.
    :param socket: of `qvm` and `orphans`: that of the server; empty for the newest.
    :param tool: of `qvm`: its name.
    """

    name: str
    given: Mapping[str, object] = field(default_factory=dict)
    rest: tuple[str, ...] = ()
    json: bool = False
    target: str = ""
    cache: bool = False
    words: tuple[str, ...] = ()
    output: str = ""
    directory: str = ""
    print_env: bool = False
    socket: str = ""
    tool: str = ""

    @property
    def module(self) -> str:
        """The module of this package that carries it out."""
        return _MODULES[self.name]

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
        return self.name == "shell"


def parse(arguments: Sequence[str]) -> Command:
    """Return what the arguments ask for; exits for ``--help`` and wrong usage.

    :raise ConfigurationError: for an option with a bad value.
    """
    name, others = _split_name(arguments)
    parser = _parser(name)
    known, rest = parser.parse_known_args(others)
    if rest and name != "run":
        parser.error(f"`{name}` does not take {' '.join(rest)}")
    values = vars(known)
    given = {
        key: convert(key, values.pop(key), f"--{key.replace('_', '-')}")
        for key in list(values)
        if key not in Command.__dataclass_fields__
    }
    values["words"] = tuple(values.get("words", ()))
    return Command(name=name, given=given, rest=tuple(rest), **values)


def _split_name(arguments: Sequence[str]) -> tuple[str, list[str]]:
    takes_value = False
    for position, word in enumerate(arguments):
        if word == "--":
            break
        if not takes_value and not word.startswith("-"):
            if word not in _MODULES:
                break
            return word, [*arguments[:position], *arguments[position + 1 :]]
        takes_value = word in _PYTEST_VALUES or word in _OWN_VALUES
    return "run", list(arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # 2, argparse's own, is pytest's status for an interrupted run.
        self.print_usage(sys.stderr)
        self.exit(ExitCode.USAGE_ERROR, f"{self.prog}: {message}\n")


def _parser(name: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qubes-itests" if name == "run" else f"qubes-itests {name}",
        description="Run Qubes OS integration tests against real VMs."
        if name == "run"
        else _HELP[name][0].upper() + _HELP[name][1:] + ".",
        epilog=_epilog() if name == "run" else None,
        usage=_usage(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_settings(parser)
    if name in ("list", "doctor"):
        parser.add_argument("--json", action="store_true", help="print JSON")
    elif name == "shell":
        parser.add_argument(
            "target", metavar="VM-or-template", help="a template, or a kept VM's folder"
        )
    elif name == "memory":
        parser.add_argument(
            "words", metavar="[plot] FILE", nargs="*", help="a timeline: memory.jsonl"
        )
        parser.add_argument("--output", "-o", metavar="SVG", help="what plot writes")
    elif name == "template":
        parser.add_argument(
            "words", metavar="list | build NAME", nargs="+", help="what to do"
        )
    elif name == "serve":
        _add_serving(parser)
    elif name == "qvm":
        _add_tool(parser)
    elif name == "orphans":
        _add_socket(parser)
        parser.add_argument(
            "words",
            metavar="remove POOL:VOLUME | adopt NAME CLASS TEMPLATE",
            nargs="*",
            help="what to do; without words they are listed",
        )
    elif name == "clean":
        parser.add_argument(
            "--cache", action="store_true", help="also remove images and saved states"
        )
    elif name == "run":
        parser.add_argument(
            "--version", "-V", action="version", version=f"qubes-itests {__version__}"
        )
    return parser


def _add_serving(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--directory", metavar="DIR", help="keep the VMs there until the next time")
    add(
        "--print-env",
        action="store_true",
        help="print the environment in which client tools call the newest one",
    )


def _add_tool(parser: argparse.ArgumentParser) -> None:
    _add_socket(parser)
    add = parser.add_argument
    add("tool", metavar="TOOL", help="qvm-ls, qvm-create …")
    add("words", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="the tool's own")


def _add_socket(parser: argparse.ArgumentParser) -> None:
    help_ = "of the server to call (the newest)"
    parser.add_argument("--socket", metavar="PATH", help=help_)


def _usage(name: str) -> str:
    if name == "run":
        return "qubes-itests [run] [options] [pytest options] [selectors]"
    words = {
        "shell": " VM-or-template",
        "memory": " [plot] [FILE]",
        "qvm": " TOOL [ARGUMENTS]",
        "orphans": " [remove POOL:VOLUME... | adopt NAME CLASS [TEMPLATE]]",
        "template": " list | build NAME...",
    }.get(name, "")
    return f"qubes-itests {name} [options]{words}"


def _epilog() -> str:
    rows = "\n".join(f"  {name:8} {text}" for name, text in _HELP.items())
    return f"""\
sub-commands, before or after the options (--help after one tells its own):
{rows}

A selector is the beginning of a test's id as `list` shows it:
  qubes-itests smoke
  qubes-itests smoke::TC_Run_tiny::test_010_run
Options of pytest keep their meaning: -k -m -x --lf -v --junitxml=FILE ...
and so does -n NUMBER (of workers, each with a sandbox of its own) of pytest-xdist."""


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "settings", "also in [tool.qubes_itests] of pyproject.toml, and QUBES_ITESTS_*"
    )
    add = group.add_argument
    add("--keep", metavar="WHICH", help="keep VM disks of tests: never, failed, always")
    add("--shell-on-failure", action="store_true", help="open a shell in a failed VM")
    add("--artifacts", metavar="DIR", help="what failures leave (./itests-artifacts)")
    add("--timeout", metavar="SECONDS", help="for each test; 0 for none (300)")
    add("--seed", metavar="NUMBER", help="of random numbers in tests")
    add("--template", metavar="NAME", action="append", help="to test on; repeatable")
    add("--app", metavar="DIR", action="append", help="run the tests of that app only")
    add("--template-spec", metavar="FILE", action="append", help="of derived templates")
    add("--plugin", metavar="PATH", action="append", help="of an app's tests, in it")
    add("--requires", metavar="NAME", action="append", help="what they need here")
    add("--repository", metavar="DIR", action="append", help="to copy from by its name")
    add("--policy", metavar="PATH", action="append", help="file or directory of policy")
    add("--warm", action=argparse.BooleanOptionalAction, help="start from saved states")
    add("--hypervisor", metavar="NAME", help="the back end that runs VMs (qemu)")
    add("--filesystem", metavar="NAME", help="with the VMs' disks: btrfs or xfs")
    add("--memory-budget", metavar="MIB", help="of the VMs' machine; 0: no limit (0)")
    add("--host-memory", metavar="MIB", help="of this machine, for all VMs of the run")
    add(
        "--start-timeout", metavar="SECONDS", help="for the start of a VM; 0: as needed"
    )
