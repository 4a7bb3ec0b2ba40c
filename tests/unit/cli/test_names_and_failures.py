"""File names from test ids, and the last lines after a failure."""

from __future__ import annotations

import dataclasses
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.frozen.folder import BlockFile, write_manifest
from qubes_itests.frozen.manifest import Manifest
from qubes_itests.report.failures import Failure, LastRun, load, show, store
from qubes_itests.report.names import file_name, one_line


def test_a_plain_id_is_readable_as_a_file_name():
    assert file_name("smoke::TC_Run_tiny::test_010") == "smoke.TC_Run_tiny.test_010"


@given(st.text())
def test_any_text_becomes_one_harmless_path_component(text):
    name = file_name(text)
    assert name not in ("", ".", "..")
    assert os.sep not in name
    assert not name.startswith((".", "-"))
    assert name.isascii()
    assert len(name) < 140


IDS = st.text("ab.:/", max_size=6)


@given(IDS, IDS)
def test_texts_that_differ_get_names_that_differ(one, other):
    if one != other:
        assert file_name(one) != file_name(other)


@given(st.text())
def test_one_line_is_one_printable_bounded_line(text):
    line = one_line(text, 50)
    assert line.isprintable()
    assert len(line) <= 50


FAILED = Failure("a::b::c", "no", "out/a.b.c", ("failure.txt", "vm.console.log"))


def shown(failures, limit=5):
    lines = []
    show(failures, ["itests"], lines.append, limit)
    return lines


def test_the_last_lines_say_what_failed_why_and_what_to_type():
    assert shown([FAILED]) == [
        "",
        "a::b::c",
        "  cause       no",
        "  artefacts   out/a.b.c/  (failure.txt, vm.console.log)",
        "  run again   itests a::b::c",
        "  look inside itests --shell-on-failure a::b::c",
        "  keep disks  itests --keep=failed a::b::c",
    ]


def test_a_test_of_a_core_has_no_shell_and_no_disks_to_offer():
    words = ("--core", "core-admin")
    lines = shown([dataclasses.replace(FAILED, words=words)])
    assert lines[-1] == "  run again   itests --core core-admin a::b::c"


def test_kept_disks_come_with_the_command_that_opens_them(tmp_path):
    (tmp_path / "disks" / "vm").mkdir(parents=True)
    lines = shown([Failure("a::b", "no", str(tmp_path), ("disks/", "vm.log"))])
    assert lines[-1] == f"  look inside itests shell {tmp_path}/disks/vm"


@pytest.mark.parametrize("ci", ["", "true"])
def test_a_frozen_test_comes_with_the_command_that_thaws_it(tmp_path, monkeypatch, ci):
    monkeypatch.setenv("CI", ci)
    folder = tmp_path / "frozen"
    folder.mkdir()
    BlockFile(folder).close()
    what = Manifest(
        test="a::b",
        time=1.0,
        spread=2.5,
        machine={},
        kernels=(),
        vms=(),
        volumes=(),
        policy=(),
    )
    write_manifest(folder, what)
    failure = Failure("a::b", "no", str(tmp_path), ("frozen/", "vm.log"))
    lines = []
    show([failure], ["python", "-m", "itests"], lines.append)
    program = "itests" if ci else "python -m itests"
    assert lines[-2:] == [
        "  frozen      disks alone, 0 MiB",
        f"  thaw        {program} thaw {folder}",
    ]
    (folder / "manifest.json").unlink()
    assert not [line for line in shown([failure]) if "thaw" in line]


def test_words_to_copy_are_quoted_for_the_shell():
    (line,) = [x for x in shown([Failure("a b::$c", "no")]) if "run again" in x]
    assert line.endswith("itests 'a b::$c'")


def test_many_failures_are_not_a_flood():
    lines = shown([FAILED] * 8, limit=2)
    assert sum(line == "a::b::c" for line in lines) == 2
    assert lines[-1] == "and 6 more: itests report"


def test_failures_can_be_read_again(tmp_path):
    failed = dataclasses.replace(FAILED, timeline=(("runs", "  t.py:3"),))
    run = LastRun((failed,), interrupted=True, not_run=1)
    store(tmp_path / "deep" / "file", run)
    assert load(tmp_path / "deep" / "file") == run
    assert run.ending() == "The run was interrupted: 1 test was not run."


def test_in_a_ci_the_commands_are_for_the_machine_of_the_reader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "true")
    words = ("--app", str(tmp_path / "app"), "--template", "debian-12")
    told = shown([Failure("a::b", "no", words=words)])
    assert "  run again   itests --app app --template debian-12 a::b" in told


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"test": 1}]', "null"])
def test_a_damaged_record_is_no_record(tmp_path, text):
    (tmp_path / "file").write_text(text)
    assert load(tmp_path / "file") is None
    assert load(tmp_path / "missing") is None
