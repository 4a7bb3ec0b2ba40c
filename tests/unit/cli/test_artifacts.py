"""Artefacts that go from the machine of a worker to that of the run."""

from __future__ import annotations

from qubes_itests.report.artifacts import LOG_LIMIT, Artifacts
from qubes_itests.timeline.document import Header, dump, load


def test_they_are_moved_but_for_disks(tmp_path):
    there, here = Artifacts(tmp_path / "there"), Artifacts(tmp_path / "here")
    there.text("a::b", "failure.txt", "no")
    there.text("a::b", "vm.console.log", "boot")
    there.text("c::d", "failure.txt", "no")
    disk = there.directory("a::b") / "disks" / "vm"
    disk.mkdir(parents=True)
    (disk / "root.img").write_text("bytes")
    for test in ("a::b", "c::d"):
        here.add(test, there.pack(test))
    assert here.files("a::b") == ("failure.txt", "vm.console.log")
    assert (here.directory("a::b") / "vm.console.log").read_text() == "boot"
    assert there.files("a::b") == ("disks/",)
    assert not there.directory("c::d").exists()


def test_none_leaves_its_directory(tmp_path):
    artifacts = Artifacts(tmp_path / "here")
    artifacts.add("a::b", {"../../outside": b"x"})
    assert artifacts.files("a::b") == ("outside",)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_long_timeline_goes_to_another_machine_as_a_whole(tmp_path):
    header = Header(test="a::b", started=0.0, outcome="failed", duration=1.0)
    line = "\x1b" * 2000
    records = [{"t": 0.0, "kind": "log", "vm": None, "line": line}] * 200
    there = Artifacts(tmp_path)
    there.add("a::b", {"timeline.jsonl": dump(header, records), "long": b"x" * 2**21})
    files = there.pack("a::b")
    assert load(files["timeline.jsonl"])[0] == header
    assert len(files["long"]) == LOG_LIMIT
