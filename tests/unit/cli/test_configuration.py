"""Where settings come from, and what is said when they make no sense."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qubes_itests.exit_codes import ExitCode
from qubes_itests.run.settings import (
    ConfigurationError,
    Keep,
    Settings,
    convert,
    load,
    own_settings,
    plain,
)


def test_defaults_hold_where_nothing_is_said(tmp_path):
    assert load(tmp_path, {}) == Settings()


def test_environment_wins_over_file_and_command_line_over_both(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        "[tool.qubes_itests]\n"
        'keep = "always"\nshell-on-failure = true\ntimeout = 5\ntemplate = ["a", "b"]\n'
    )
    environment = {"QUBES_ITESTS_KEEP": "failed", "QUBES_ITESTS_TIMEOUT": "2.5"}
    settings = load(tmp_path, environment, {"timeout": 1.0})
    assert settings == Settings(
        keep=Keep.FAILED, shell_on_failure=True, timeout=1.0, template=("a", "b")
    )


def test_setup_cfg_is_read_and_only_its_own_section(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.other]\nkeep = 1\n")
    (tmp_path / "setup.cfg").write_text(
        "[DEFAULT]\nnoise = 1\n[qubes_itests]\nwarm = no\nartifacts = out\nseed = 12\n"
    )
    settings = load(tmp_path, {})
    assert settings == Settings(warm=False, artifacts=Path("out"), seed=12)


def test_pyproject_is_preferred_to_setup_cfg(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.qubes_itests]\nseed = 1\n")
    (tmp_path / "setup.cfg").write_text("[qubes_itests]\nseed = 2\nwarm = no\n")
    assert load(tmp_path, {}) == Settings(seed=1)


def test_the_variable_of_qubes_os_names_templates_and_ours_wins(tmp_path):
    environment = {"QUBES_TEST_TEMPLATES": "tiny debian-12 tiny"}
    assert load(tmp_path, environment).template == ("tiny", "debian-12")
    environment["QUBES_ITESTS_TEMPLATE"] = "other"
    assert load(tmp_path, environment).template == ("other",)


def test_what_apps_need_is_told_in_words_and_paths(tmp_path):
    (tmp_path / "setup.cfg").write_text(
        "[qubes_itests]\nplugin = setup-tests.py\nrequires = pillow numpy\n"
        "policy = policy.d\n"
    )
    environment = {"QUBES_ITESTS_REPOSITORY": f"/a{os.pathsep}/b"}
    settings = load(tmp_path, environment, {"requires": ("pillow",)})
    assert (settings.plugin, settings.requires) == (("setup-tests.py",), ("pillow",))
    assert settings.policy == (Path("policy.d").absolute(),)
    assert settings.repository == (Path("/a"), Path("/b"))
    assert load(tmp_path, {}).requires == ("pillow", "numpy")
    told = json.loads(json.dumps(plain(settings)))
    assert {name: convert(name, value, "") for name, value in told.items()} == {
        name: getattr(settings, name) for name in told
    }


def test_the_time_that_an_app_gives_its_tests(tmp_path):
    assert own_settings(tmp_path).timeout is None
    assert load(tmp_path, {}).timeout is None
    (tmp_path / "setup.cfg").write_text("[qubes_itests]\ntimeout = 900\n")
    assert own_settings(tmp_path).timeout == 900
    (tmp_path / "setup.cfg").write_text("[qubes_itests]\ntimeout = soon\n")
    with pytest.raises(ConfigurationError, match="expected a number of seconds"):
        own_settings(tmp_path)


def test_a_memory_budget_is_mib_or_none(tmp_path):
    environment = {"QUBES_ITESTS_MEMORY_BUDGET": "4096"}
    assert load(tmp_path, environment).memory_budget == 4096
    (tmp_path / "setup.cfg").write_text("[qubes_itests]\nmemory-budget = 0\n")
    assert load(tmp_path, {}).memory_budget == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("colour = 1", "unknown key 'colour'"),
        (
            'keep = "sometimes"',
            "expected one of never, failed, always, state, got 'sometimes'",
        ),
        ("timeout = -1", "expected a number of seconds"),
        ("timeout = true", "expected a number of seconds"),
        ("timeout = nan", "expected a number of seconds"),
        ("seed = 1.5", "expected a whole number"),
        ("warm = 3", "expected true or false"),
        ("template = []", "expected a list of names of templates"),
        ('template = ["../x"]', "expected the name of a template"),
        ('template = ["a\\nb"]', "expected the name of a template"),
        ('artifacts = ""', "expected a path"),
        ('hypervisor = "a b"', "expected a name"),
        ("keep =", "pyproject.toml"),
        ("memory_budget = 1000", "has no memory for a VM beside dom0: give it 2200"),
        ("start_timeout = 3601", "expected seconds, at most 3600, got 3601"),
        ("start_timeout = -1", "expected seconds, at most 3600, got -1"),
        ("memory_budget = -1", "has no memory for a VM beside dom0"),
        ('memory_budget = "4GiB"', "expected a whole number, got '4GiB'"),
        (
            "memory_budget = 4294967296",
            "expected MiB, at most 16777216, got 4294967296",
        ),
    ],
)
def test_nonsense_is_refused_with_the_file_and_the_reason(tmp_path, line, said):
    (tmp_path / "pyproject.toml").write_text(f"[tool.qubes_itests]\n{line}\n")
    with pytest.raises(ConfigurationError, match=r"pyproject\.toml: ") as caught:
        load(tmp_path, {})
    assert said in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE_ERROR


def test_a_bad_variable_is_named(tmp_path):
    with pytest.raises(
        ConfigurationError,
        match="QUBES_ITESTS_SEED: seed: expected a whole number, got 'x'",
    ):
        load(tmp_path, {"QUBES_ITESTS_SEED": "x"})


def test_settings_reach_another_process_as_they_are():
    settings = Settings(
        keep=Keep.FAILED, seed=3, template=("a", "b"), artifacts=Path("out"), timeout=0
    )
    told = json.loads(json.dumps(plain(settings)))
    assert Settings(**{n: convert(n, v, "there") for n, v in told.items()}) == settings
    assert "seed" not in plain(Settings())


@pytest.mark.parametrize("value", ["-1", "much", str(1 << 25), True])
def test_no_machine_gives_such_memory(value):
    with pytest.raises(ConfigurationError, match="--host-memory"):
        convert("host_memory", value, "--host-memory")
    assert convert("host_memory", "3000", "--host-memory") == 3000


def test_a_file_of_sections_says_the_time_of_tests_where_an_app_does_not(tmp_path):
    other, another = tmp_path / "other.cfg", tmp_path / "another.toml"
    other.write_text("[qubes_itests:template:x]\nbase = tiny\n")
    another.write_text("[tool.qubes_itests]\ntimeout = 900\n")
    assert own_settings(tmp_path, [other]).timeout is None
    assert own_settings(tmp_path, [other, another]).timeout == 900
    (tmp_path / "setup.cfg").write_text("[qubes_itests]\ntimeout = 0\n")
    assert own_settings(tmp_path, [another]).timeout == 0
    other.write_text("[qubes_itests]\ntimeuot = 9\n")
    with pytest.raises(ConfigurationError, match="unknown key 'timeuot'"):
        own_settings(tmp_path, [other])


def test_suites_for_our_core_take_no_other_core(tmp_path):
    """Whichever way each is said: before anything is installed."""
    environment = {"QUBES_ITESTS_CORE_SUITES": "suites"}
    with pytest.raises(ConfigurationError, match="expected no --core beside it"):
        load(tmp_path, environment, {"core": Path("core")})
    assert load(tmp_path, environment).core_suites == Path("suites").absolute()
