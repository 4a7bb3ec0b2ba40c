"""The program as a process, where it needs neither root nor VMs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from plugin_site import FOR_TEMPLATE, ONCE, PluginSite

from qubes_itests import cli
from qubes_itests.exc import HarnessError
from qubes_itests.host.cache import Cache
from qubes_itests.pytest_plugin.collection import Selection
from qubes_itests.run.options import PYTEST
from qubes_itests.run.settings import OPTIONS

PLUGIN = """
    import unittest
    print("a plugin that talks while it loads")

    class TC_One(unittest.TestCase):
        def test_1(self):
            pass
        def test_10(self):
            pass

    def list_tests():
        return [TC_One]
"""


#: A plugin of pytest with an option that takes a value, and one that may.
REPORTING = """
def pytest_addoption(parser):
    parser.addoption("--html")
    parser.addoption("--cov", nargs="?")
def pytest_unconfigure(config):
    print("html", config.option.html, "cov", config.option.cov)
"""


@pytest.fixture
def site(tmp_path):
    return PluginSite(tmp_path, {"QUBES_ITESTS_CACHE": str(tmp_path / "cache")})


def test_an_error_steers_no_terminal(monkeypatch, capsys):
    """It may say what a guest has said, or a file that is anybody's."""

    def parse(_arguments):
        raise HarnessError("a VM said \x1b[2J\x9b\nand more")

    monkeypatch.setattr(cli, "parse", parse)
    assert cli.command_line(["list"]) == HarnessError.exit_code
    said = capsys.readouterr().err
    assert said.splitlines() == [r"itests: a VM said \x1b[2J\x9b", "and more"]


def test_list_shows_ids_to_copy_once_or_per_template(site):
    site.install("alpha", PLUGIN, ONCE)
    site.install("beta", PLUGIN, FOR_TEMPLATE)
    done = site.run("list", "--template", "tiny", "--template", "debian-12")
    assert done.returncode == 0
    ids = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert [name for name in ids if name.startswith(("alpha", "beta"))] == [
        "alpha::TC_One::test_1",
        "alpha::TC_One::test_10",
        "beta::TC_One_tiny::test_1",
        "beta::TC_One_tiny::test_10",
        "beta::TC_One_debian-12::test_1",
        "beta::TC_One_debian-12::test_10",
    ]


def test_a_name_in_both_groups_gives_two_kinds_of_ids(site):
    site.install("alpha", PLUGIN, ONCE, FOR_TEMPLATE)
    out = site.run("list").stdout
    assert "\nalpha@once::TC_One::test_1\n" in out
    assert "\nalpha::TC_One_tiny::test_1\n" in out


def test_json_is_json_whatever_plugins_print(site):
    site.install("alpha", PLUGIN)
    site.register("broken", "no_such_module:list_tests")
    done = site.run("--json", "list", QUBES_TEST_EXTRA_INCLUDE="alpha broken")
    alpha, broken = json.loads(done.stdout)["plugins"]
    assert alpha["tests"][0] == {"id": "alpha::TC_One::test_1", "template": None}
    assert alpha["problems"] == []
    assert broken["tests"] == [{"id": "broken::plugin", "template": None}]
    assert "no_such_module" in broken["problems"][0]


def test_collect_only_shows_the_same_ids_as_list(site):
    """The nodes of pytest and the quick list must not drift apart."""
    site.install("alpha", PLUGIN, ONCE, FOR_TEMPLATE)
    site.register("broken", "no_such_module:list_tests")
    include = {"QUBES_TEST_EXTRA_INCLUDE": "alpha broken"}
    listed = site.run("list", **include).stdout.splitlines()
    collected = site.run("--collect-only", "-q", **include).stdout.splitlines()
    assert [x for x in listed if "::" in x and x[0] != "#"] == [
        x for x in collected if "::" in x
    ]


def selected(word):
    ids = [f"{name}::TC_One::test_{n}" for name in ("alpha", "beta") for n in (1, 10)]
    items = [SimpleNamespace(nodeid=name) for name in ids]
    return [item.nodeid for item in Selection([word]).of(items)]


def test_a_selector_means_a_whole_name_before_it_means_a_prefix():
    assert selected("alpha::TC_One::test_1") == ["alpha::TC_One::test_1"]
    assert len(selected("alpha::TC_One::test_")) == 2
    assert len(selected("alpha")) == 2
    assert len(selected("alp")) == 2


def test_a_selector_that_means_nothing_is_wrong_usage(site):
    """The list that is offered has the options that `list` takes."""
    site.install("alpha", PLUGIN)
    told = json.dumps({"words": ["--template", "tiny", "--timeout", "9"]})
    done = site.run("--collect-only", "alpha::TC_Onr", QUBES_ITESTS_PREPARED=told)
    assert done.returncode == 4
    assert "Did you mean alpha::TC_One?" in done.stderr
    assert "`itests list --template tiny` shows all." in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(pytest.UsageError, match=r"Did you mean --app \.\?"):
        selected(".")


def test_another_suite_in_the_directory_does_not_leak_in(site):
    site.install("alpha", PLUGIN)
    (site.work / "conftest.py").write_text("raise RuntimeError('not yours')\n")
    (site.work / "pytest.ini").write_text("[pytest]\naddopts = --nonsense\n")
    (site.work / "test_x.py").write_text("def test_x(): pass\n")
    done = site.run("--collect-only", "-q", QUBES_TEST_EXTRA_INCLUDE="alpha")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_x" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--keep=sometimes"],
            "--keep: keep: expected one of never, failed, always, state, got ",
        ),
        (["list", "--no-such-option"], "--no-such-option"),
        (["--shell-on-failure"], "there is no terminal"),
        (["shell", "tiny"], "there is no terminal"),
        (["shell"], "VM-or-template"),
    ],
)
def test_wrong_usage_is_one_sentence_and_status_4(site, arguments, said):
    done = site.run(*arguments)
    assert done.returncode == 4
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_key_in_the_configuration_is_told_before_anything_else(site):
    (site.work / "pyproject.toml").write_text("[tool.qubes_itests]\ncolour = 1\n")
    done = site.run("list")
    assert done.returncode == 4
    assert done.stderr.startswith("itests: pyproject.toml: unknown key 'colour'")


def test_report_says_that_there_was_no_run(site):
    done = site.run("report")
    assert done.returncode == 5
    assert "No run in this directory" in done.stdout


def test_doctor_tells_what_a_run_would_tell(site):
    done = site.run("doctor", "--json")
    checks = json.loads(done.stdout)
    failed = [check for check in checks if check["state"] == "fail"]
    assert done.returncode == (failed[0]["exit_code"] if failed else 0)
    assert any(check["name"] == "root" for check in checks)


def test_clean_removes_the_cache_and_nothing_else_in_its_directory(site, tmp_path):
    cache = tmp_path / "cache"
    (cache / "precious").mkdir(parents=True)
    (cache / "directories" / "x").mkdir(parents=True)
    (cache / "runs" / "dead").mkdir(parents=True)
    done = site.run("clean", "--cache")
    assert done.returncode == 0
    assert "Removed 1 stale run" in done.stdout
    assert sorted(path.name for path in cache.iterdir()) == ["precious", "runs"]


def test_clean_says_how_much_was_removed_and_what_is_left(site, tmp_path):
    cache = Cache(tmp_path / "cache")
    cache.entry("image", "key", lambda place: _write(place / "x", 3 << 20))
    cache.entry("agent", "key", lambda place: _write(place / "x", 1 << 20))
    _write(cache.root / "image/.key@left/x", 2 << 20)
    _write(cache.root / "runs/dead/x", 5 << 20)
    done = site.run("clean")
    assert "Removed 1 stale run and 1 half-made entry from" in done.stdout
    removed, holds = done.stdout.splitlines()
    assert removed.endswith(": 7 MiB.")
    assert holds == "The cache holds 4 MiB of 20.0 GiB: agent 1 MiB, image 3 MiB."
    done = site.run("clean", "--cache")
    assert done.stdout.endswith("Removed the cache: agent 1 MiB, image 3 MiB.\n")
    assert sorted(path.name for path in cache.root.iterdir()) == ["runs"]


def _write(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)


def test_the_value_of_an_option_of_a_plugin_of_pytest_is_no_sub_command(site):
    site.install("alpha", PLUGIN)
    (site.site / "reporting.py").write_text(REPORTING)
    site.register("reporting", "reporting", "pytest11")
    words = ("--collect-only", "--html", "report", "--cov", "run")
    done = site.run(*words, QUBES_TEST_EXTRA_INCLUDE="alpha")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "html report cov run" in done.stdout


def test_a_misspelt_sub_command_is_told_before_anything_is_made_ready(site, tmp_path):
    done = site.run("docter")
    assert done.returncode == 4
    assert done.stderr == (
        "itests: docter: expected a sub-command or the beginning of a test's id;"
        " did you mean `doctor`?\n"
    )
    assert not (tmp_path / "cache").exists()


def test_a_plugin_may_have_a_name_that_resembles_a_sub_command(site):
    site.install("doctors", PLUGIN)
    done = site.run("--collect-only", "-q", "docto")
    assert done.returncode == 0
    assert "doctors::TC_One::test_1" in done.stdout


def test_a_sub_command_after_options_of_ours_takes_no_pytest():
    code = (
        "import sys; from qubes_itests.cli.arguments import parse;"
        "assert parse(['--template', 'run', '--json', 'list']).name == 'list';"
        "assert parse(['smoke', 'list']).name == 'run';"
        "sys.exit('pytest' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pytest_has_the_options_that_are_for_it(site):
    done = site.run("-p", "qubes_itests", "--help", program="pytest")
    shown = set(re.findall(r"--itests-[\w-]+", done.stdout))
    assert {"--itests-keep", "--itests-no-warm"} <= shown
    for option in OPTIONS.values():
        words = set(option.spellings("--itests-"))
        assert shown & words == (words if PYTEST in option.commands else set())


def test_help_names_the_sub_commands(site):
    out = site.run("--help").stdout
    for name in ("run", "list", "doctor", "shell", "clean", "report"):
        assert f"\n  {name} " in out


def test_list_takes_selectors_and_an_expression(site):
    site.install("alpha", PLUGIN, ONCE)

    def listed(*words):
        done = site.run("list", *words)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line[0] != "#"]

    assert listed("alpha::TC_One::test_1") == ["alpha::TC_One::test_1"]
    assert listed("alpha", "-k", "TEST_10 or nothing") == ["alpha::TC_One::test_10"]
    for words in (["alphabet"], ["-k", "a and"]):
        done = site.run("list", *words)
        assert done.returncode == 4
        assert "Traceback" not in done.stderr


def test_doctor_says_what_decides_how_fast_a_run_is(site, tmp_path):
    image = tmp_path / "vmlinuz-1"
    image.write_bytes(b"no kernel")
    told = {"QUBES_ITESTS_KERNEL": f"{image}:{tmp_path}", "QUBES_ITESTS_KVM": "0"}
    checks = json.loads(site.run("doctor", "--json", **told).stdout)
    found = {check["name"]: check["message"] for check in checks}
    assert found["KVM"].startswith("guests are emulated: ")
    assert found["templates"] == "built: none yet"
    assert found["cache size"] == "0 MiB of 20480 MiB"
    assert found["memory"].endswith(" MiB for VMs")
