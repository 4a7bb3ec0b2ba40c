"""Files of guests that an app declares as artefacts."""

import pytest
from conditions import deadlines

from qubes_itests import timeline
from qubes_itests.report.artifacts import Artifacts
from qubes_itests.report.guest_files import read_guests
from qubes_itests.run.hooks import registry

PREPARE = r"""
mkdir -p '/var/log/my app' /var/log/many
cd /var/log
printf 'one\n' >'my app/one.log'
printf 'red \033[31m\n' >'my app/page.html'
printf 'core\0\377' >'my app/core'
ln -s /var/log/loop loop; ln -s 'my app/one.log' link; mkfifo pipe
printf 'strange\n' >"$(printf 'a;touch $HOME`b`\n..\376')"
printf 'same\n' >'x y'; printf 'else\n' >'x_y'
{ printf start; dd if=/dev/zero bs=65536 count=20 | tr '\0' x; printf 'the end'; } >big
for i in $(seq 50); do echo $i >many/$i; done
"""


@pytest.fixture
def work(vm_factory):
    return vm_factory("work")


@pytest.fixture
def read(portal, qubes_app):
    def read(*patterns, vms=("work",)):
        return portal.run(read_guests([qubes_app.domains[n] for n in vms], patterns))

    return read


def test_declared_files_come_with_their_ends_and_names_that_lead_nowhere(
    work, read, testbed, tmp_path
):
    assert work.run(PREPARE, user="root", wait=True) == 0
    files, problems = read("/var/log/my app/*", "/nothing", "/var/log/[!m]*")
    assert problems == []
    assert files["work.file.var_log_my_app_one.log.txt"] == b"one\n"
    assert files["work.file.var_log_my_app_core.bin"] == b"core\0\xff"
    assert files["work.file.var_log_link.txt"] == b"one\n"
    big = files["work.file.var_log_big.txt"]
    assert (len(big), big[-8:]) == (1 << 20, b"xthe end")
    assert sorted(d for n, d in files.items() if "x_y" in n) == [b"else\n", b"same\n"]
    assert all(n.startswith("work.file.") and "/" not in n for n in files)
    assert not any("pipe" in name or "loop" in name for name in files)
    assert work.run("[ -e $HOME/b ]", wait=True) == 1

    artifacts = Artifacts(tmp_path)
    artifacts.collect("a-test", testbed, registry().hook, ["/var/log/my app/*"])
    folder = artifacts.directory("a-test")
    page = folder / "work.file.var_log_my_app_page.html.txt"
    assert page.read_text() == "red \\x1b[31m\n"
    assert (folder / "work.file.var_log_my_app_core.bin").read_bytes() == b"core\0\xff"


def test_of_many_files_the_first_are_kept_and_that_is_said(work, read):
    work.run(PREPARE, user="root", wait=True)
    files, (problem,) = read("/var/log/many/*")
    assert len(files) == 32
    assert problem.endswith("of VM work: 32 of them are kept, of 50")


def test_of_large_files_the_first_are_kept_and_that_is_said(work, read, monkeypatch):
    monkeypatch.setattr("qubes_itests.report.guest_files._ROOM", 6)
    work.run("for n in 1 2 3; do echo abc >/f$n; done", user="root", wait=True)
    files, (problem,) = read("/f*")
    assert files == {"work.file.f1.txt": b"abc\n", "work.file.f2.txt": b"c\n"}
    assert problem.endswith("of VM work: 0 MiB of them are kept")


def test_a_guest_that_does_not_answer_is_said_in_a_line(
    work, vm_factory, read, monkeypatch
):
    vm_factory("other").pause()
    assert work.run("echo x >/f", user="root", wait=True) == 0
    for seconds in deadlines(3):
        monkeypatch.setattr("qubes_itests.report.guest_files._TIMEOUT", seconds)
        # whoever reads that waits for what the kernel says next
        files, problems = read("/f", "/proc/kmsg", vms=("work", "other"))
        if files:
            break
    assert files == {"work.file.f.txt": b"x\n"}
    paused, silent = sorted(problems)
    assert paused.startswith("journal and declared files of VM other: VM other is not")
    told = f"no answer within {seconds} s"
    assert silent == f"journal and declared files of VM work: {told}"


def test_what_the_harness_reads_is_no_part_of_the_timeline(work, read):
    work.run("echo x >/f", user="root", wait=True)
    recorder = timeline.Recorder()
    with timeline.recording(recorder):
        assert read("/f")[0]
    assert recorder.records("run") == []


def test_no_link_in_the_folder_of_artefacts_is_followed(work, testbed, tmp_path):
    work.run("echo x >/f", user="root", wait=True)
    artifacts = Artifacts(tmp_path)
    folder = artifacts.directory("a-test")
    folder.mkdir()
    (tmp_path / "precious").write_text("mine")
    (folder / "work.file.f.txt").symlink_to(tmp_path / "precious")
    artifacts.collect("a-test", testbed, registry().hook, ["/f"])
    assert (tmp_path / "precious").read_text() == "mine"
    assert (folder / "work.file.f.txt").read_text() == "x\n"
    assert not (folder / "work.file.f.txt").is_symlink()
