"""What counts as a difference between two cores, and what ours is described as."""

import json
import os
import subprocess
import sys

import pytest

from qubes_itests.cli import compare as command_module
from qubes_itests.cli.arguments import parse
from qubes_itests.cli.compare import _counts, _listed, _parts, check, execute
from qubes_itests.comparison import compare
from qubes_itests.comparison.description import _members
from qubes_itests.run.settings import ConfigurationError, Settings

REFUSED = "! QubesPropertyValueError QubesValueError QubesException ValueError"
CRASHED = "! AttributeError"


@pytest.mark.parametrize(
    ("here", "there", "verdict"),
    [
        ("400", "400", "same"),
        ("400", "'400'", "differs"),
        (None, "400", "only there"),
        ("400", None, "only here"),
        (REFUSED, "True", "differs"),
        ("True", REFUSED, "differs"),
        # an error that those catch who expect theirs, or theirs is none to expect
        (REFUSED, "! QubesValueError QubesException ValueError", "same"),
        (REFUSED, "! QubesVMError QubesException", "differs"),
        (REFUSED, CRASHED, "same"),
        (CRASHED, REFUSED, "differs"),
    ],
)
def test_values_of_a_property_are_compared(here, there, verdict):
    name = "set AppVM.debug = 'text'"
    one = {"default AppVM.debug": "False"}
    (default, found) = compare(
        one | ({} if here is None else {name: here}),
        one | ({} if there is None else {name: there}),
    )
    assert default.verdict == "same"
    assert found.verdict == verdict


def test_an_error_has_to_be_all_that_theirs_is():
    (found,) = compare({"error qubes.exc.E": "! E A B"}, {"error qubes.exc.E": "! E A"})
    assert found.verdict == "same"
    (found,) = compare({"error qubes.exc.E": "! E A"}, {"error qubes.exc.E": "! E A B"})
    assert found.verdict == "differs"


@pytest.mark.parametrize(
    ("here", "there", "verdict"),
    [
        ("failed: one thing", "failed: another", "same"),
        ("failed: one thing", "passed", "differs"),
        ("skipped: why", "skipped", "same"),
    ],
)
def test_of_tests_the_outcome_is_compared_and_not_why_they_failed(here, there, verdict):
    (found,) = compare({"test core::a": here}, {"test core::a": there})
    assert found.verdict == verdict


def test_what_is_in_a_class_or_a_property_that_only_one_has_is_left_out():
    theirs = {
        "name qubes.app.Other": "class",
        "member Other.method": "function",
        "default AppVM.other": "1",
        "set AppVM.other = 2": "2",
    }
    found = compare({}, theirs)
    assert [each.name for each in found] == ["AppVM.other", "qubes.app.Other"]


def test_what_is_alike_is_on_one_line():
    here, there = {}, {}
    for cls in ("AppVM", "DispVM"):
        here[f"default {cls}.debug"] = there[f"default {cls}.debug"] = "False"
        for value in (-1, 10):
            here[f"set {cls}.debug = {value}"] = REFUSED
            there[f"set {cls}.debug = {value}"] = "True"
    found = compare(here, there)
    assert list(_listed(found)) == [
        "",
        "differs",
        (
            "  set      debug of AppVM, DispVM = -1, 10:"
            " ! QubesPropertyValueError; there True"
        ),
    ]
    lines = list(_counts(found))
    assert lines[1].split() == ["default", "2", "0", "0", "0"]
    assert lines[2].split() == ["set", "0", "4", "0", "0"]


def test_what_fails_on_both_is_listed_and_no_difference():
    here = {"test core::a": "failed: one thing", "test core::b": "skipped: why"}
    there = {"test core::a": "error: another", "test core::b": "skipped: why"}
    assert list(_listed(compare(here, there))) == [
        *("", "differs", "  test     core::a: failed: one thing; there error: another"),
    ]
    there["test core::a"] = "failed: another"
    assert list(_listed(compare(here, there))) == [
        "",
        "failed on both",
        "  test     core::a: failed: one thing; there failed: another",
    ]


def test_each_suite_is_compared_by_itself(tmp_path):
    """A word may mean several, and several words tests of one."""
    suites = tmp_path / "qubes" / "tests" / "integ"
    suites.mkdir(parents=True)
    for name in ("__init__", "basic", "network", "network_ipv6"):
        (suites / f"{name}.py").touch()

    def parts(*words):
        command = parse(["compare", "--core", str(tmp_path), *words])
        return _parts(command, Settings(**command.given))

    basic, network, ipv6 = (
        f"core::integ.{name}" for name in ("basic", "network", "network_ipv6")
    )
    tests = [f"{basic}::TC_00", f"{basic}::TC_01"]
    assert parts(tests[0], network, tests[1]) == {basic: tests, network: [network]}
    assert parts("core::integ.net") == {network: [network], ipv6: [ipv6]}
    assert list(parts("core::integ.")) == [basic, network, ipv6]
    assert parts("--app", "app") == {"apps": []}
    mixed = parts("--app", "app", "my-app::one", basic, "my-app::two")
    assert mixed == {"apps": ["my-app::one", "my-app::two"], basic: [basic]}
    problem = "core::integ.nothing: expected a suite of .* integ.basic, integ.network"
    with pytest.raises(ConfigurationError, match=problem):
        parts("core::integ.nothing")


#: Stands for a run: that on ours leaves two results, and one of theirs breaks off.
RUN = """
import json, signal, sys
from pathlib import Path

place = Path(sys.argv[sys.argv.index("--artifacts") + 1])
Path("runs").open("a").write(f"{place.parent.name}\\n")
whole = place.parent.name == "ours" or Path("mended").exists()
rows = [
    dict(test=name, outcome="passed", duration=1, started=1, attempts=1, failed=0)
    for name in ("core::integ.basic::a", "core::integ.basic::b")[: 1 + whole]
]
document = {
    "format": "qubes_itests.run", "version": 1, "id": "0" * 32, "started": 1,
    "command": sys.argv, "outcome": "passed" if whole else "interrupted", "tests": rows,
}
(place / "run.json").write_text(json.dumps(document))
sys.exit(0) if whole else END
"""


@pytest.mark.parametrize("status", [2, 3, -9])
def test_a_run_that_breaks_off_is_no_result(tmp_path, monkeypatch, capfd, status):
    """Nor is it one for the next comparison, which takes up those of the others."""
    suites = tmp_path / "core/qubes/tests/integ"
    suites.mkdir(parents=True)
    (suites / "basic.py").touch()
    monkeypatch.chdir(tmp_path)
    kill = f"signal.raise_signal({-status})"
    program = tmp_path / "run.py"
    program.write_text(
        RUN.replace("END", kill if status < 0 else f"sys.exit({status})")
    )
    monkeypatch.setattr(command_module, "COMMAND", (sys.executable, str(program)))

    def compared():
        words = ["--core", str(tmp_path / "core"), "--resume", "core::integ.basic"]
        command = parse(["compare", *words])
        done = execute(command, Settings(**command.given))
        return done, capfd.readouterr().out.splitlines()[1:]

    done, lines = compared()
    assert done == status
    why = f"the run on theirs ended with status {status}, and 1 of its results"
    assert [line.partition("  the ")[2] for line in lines] == [why.removeprefix("the ")]
    (tmp_path / "mended").touch()
    done, lines = compared()
    assert done == 0
    assert lines[0].split()[-4:] == ["2", "0", "0", "0"]
    assert (tmp_path / "runs").read_text().split() == ["ours", "theirs", "theirs"]


def test_the_run_of_a_comparison_that_is_killed_ends_with_it(tmp_path):
    suites = tmp_path / "qubes/tests/integ"
    suites.mkdir(parents=True)
    (suites / "basic.py").touch()
    program = tmp_path / "run"
    program.write_text(
        f"#!{sys.executable}\nimport time\nprint('begun', flush=True)\n"
        "time.sleep(60)\nprint('gone on')\n"
    )
    program.chmod(0o755)
    words = [sys.executable, "-P", "-m", "qubes_itests", "compare", "--core", tmp_path]
    with subprocess.Popen(
        [*words, "core::integ.basic"],
        env={**os.environ, "QUBES_ITESTS_PROGRAM": str(program)},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        # where the run writes to, too: it is at its end when both are
        stderr=subprocess.PIPE,
        text=True,
    ) as comparison:
        assert comparison.stderr.readline() == "begun\n"
        comparison.kill()
        assert comparison.stderr.read() == ""


def test_our_core_is_described():
    program = [sys.executable, "-P", "-m", "qubes_itests.comparison.description"]
    done = subprocess.run(program, capture_output=True, check=True, timeout=300)
    found = json.loads(done.stdout)
    assert found["module qubes.vm.appvm"] == "module"
    assert found["name qubes.events.handler"] == "function"
    error = found["error qubes.exc.QubesVMNotFoundError"].split()
    assert error[:2] == ["!", "QubesVMNotFoundError"]
    assert {"QubesException", "KeyError"} < set(error)
    assert found["member AppVM.start"] == "coroutine"
    assert found["default AppVM.debug"] == "False"
    assert found["set AppVM.debug = 'yes'"] == "True"
    assert found["set AppVM.debug = 'text'"].split()[:2] == [
        *("!", "QubesPropertyValueError")
    ]


@pytest.mark.parametrize("word", ["core::storage", "my-app"])
def test_tests_that_are_not_for_both_are_refused(word):
    command = parse(["compare", "--core", "core", word])
    with pytest.raises(ConfigurationError, match=r"of a suite core::integ\.NAME"):
        check(command, Settings(**command.given))


def test_tests_are_selected_as_for_a_run():
    """By an expression as well, which alone says of no suite that it is for both."""
    suite = "core::integ.basic"
    command = parse(["compare", "--core", "core", "-k", "a or b", suite])
    assert (command.expression, command.words) == ("a or b", (suite,))
    check(command, Settings(**command.given))
    command = parse(["compare", "--core", "core", "-k", "a"])
    with pytest.raises(ConfigurationError, match="-k: expected --app, or a suite"):
        check(command, Settings(**command.given))


def test_a_core_that_our_own_run_would_find_is_refused(tmp_path, monkeypatch):
    """What the environment says holds for both runs, and all would be the same."""
    command = parse(["compare", "--core", "core", "--app", "app"])
    settings = Settings(**command.given)
    check(command, settings)
    monkeypatch.setenv("QUBES_ITESTS_CORE", str(tmp_path))
    with pytest.raises(ConfigurationError, match="--core on the command line only"):
        check(command, settings)


def test_a_class_of_classes_is_described():
    """What `type` itself has under that name is no declaration."""

    class Meta(type):
        declared: int

    found = _members("Meta", Meta)
    assert found["member Meta.declared"] == "value"
    assert found["member Meta.mro"] == "function"
