"""The page is one file, and what others wrote is only ever data in it."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import timeline_samples
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_itests.exc import HarnessError
from qubes_itests.html_report import page
from qubes_itests.html_report.page import write_report

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>",
    "\u2028\u202e\0\x1b[31m",
    "$script ${data} <!-- data -->",
    "javascript:alert(1)",
    "&lt;/script&gt;",
)


class Page(HTMLParser):
    """A page taken apart as a browser does it."""

    def __init__(self, path):
        super().__init__()
        self.scripts, self.kinds, self.links, self.tags = {}, [], [], []
        self._script = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        self.links += [attributes[n] for n in ("src", "href") if n in attributes]
        if tag == "script":
            self._script = attributes.get("id", "")
            self.kinds.append(attributes["type"])

    def handle_data(self, data):
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    @property
    def run(self):
        return json.loads(self.scripts["run"])

    def timeline(self, number):
        return unpacked(self.scripts[f"timeline-{number}-0"])


def unpacked(text):
    return json.loads(zlib.decompress(base64.b64decode(text, validate=True)))


def made(directory, rows):
    """Return the page of a run with such tests."""
    run = {"format": "qubes_itests.run", "version": 1, "tests": rows}
    (directory / "run.json").write_text(json.dumps(run))
    return Page(write_report(directory))


def test_it_has_the_run_and_its_timelines(tmp_path):
    run = timeline_samples.write(tmp_path, tests=8)
    found = Page(write_report(tmp_path))
    names = [test["test"] for test in run["tests"]]
    assert [test["test"] for test in found.run["tests"]] == names
    for number, test in enumerate(run["tests"]):
        if test["artifacts"] is None:
            assert f"timeline-{number}-0" not in found.scripts
            continue
        path = tmp_path / test["artifacts"] / "timeline.jsonl"
        _, *records = map(json.loads, path.read_text().splitlines())
        assert len(found.timeline(number)["records"]) == len(records)
    assert list(tmp_path.glob(".*")) == []


def test_its_policy_lets_no_other_script_run_and_nothing_be_fetched(tmp_path):
    found = made(tmp_path, [])
    rules = dict(rule.split(maxsplit=1) for rule in found.policy.split("; "))
    digest = hashlib.sha256(found.scripts[""].encode()).digest()
    assert rules["script-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert rules["default-src"] == "'none'"
    assert set(rules) == {
        *("default-src", "script-src", "style-src"),
        *("img-src", "base-uri", "form-action"),
    }
    assert rules["img-src"] == "data:"


def test_it_needs_no_other_file_but_links_to_artefacts(tmp_path):
    timeline_samples.write(tmp_path, tests=8)
    found = Page(write_report(tmp_path))
    assert found.links == ["data:,"]
    for test in found.run["tests"]:
        for name, link, size in test.get("files", ()):
            assert (tmp_path / link).stat().st_size == size, name


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_runs_nothing(tmp_path, text):
    (tmp_path / "folder").mkdir()
    records = [{"t": 0, "kind": "console", "vm": text, "line": text}]
    header = {"format": "qubes_itests.timeline", "version": 1, "vms": [text]}
    lines = [json.dumps(line) for line in (header, *records)]
    (tmp_path / "folder" / "timeline.jsonl").write_text("\n".join(lines))
    plain = made(tmp_path, [{"test": "a", "artifacts": "folder"}])
    words = dict.fromkeys(("test", "outcome", "cause", "where", "worker"), text)
    row = {**words, "phases": {text: 1}, "artifacts": "folder"}
    found = made(tmp_path, [row])
    assert found.tags == plain.tags
    assert found.kinds == ["text/plain", "application/json", "module"]
    assert found.scripts[""] == plain.scripts[""]


@settings(max_examples=40)
@given(st.text(), st.text())
def test_any_text_is_data(tmp_path_factory, name, cause):
    found = made(tmp_path_factory.mktemp("any"), [{"test": name, "cause": cause}])
    assert found.kinds == ["application/json", "module"]
    assert "<" not in found.scripts["run"]
    assert len(found.run["tests"]) == 1


def test_attempts_that_failed_have_their_timelines(tmp_path):
    timeline_samples.write(tmp_path, tests=1)
    (place,) = tmp_path.glob("*/timeline.jsonl")
    for name in ("attempt-2", "attempt-1", "other"):
        (place.parent / name).mkdir()
        shutil.copy(place, place.parent / name)
    (place.parent / "attempt-3").symlink_to(place.parent / "attempt-1")
    found = Page(write_report(tmp_path))
    assert found.run["tests"][0]["timelines"] == ["", "attempt-1", "attempt-2"]
    assert found.kinds == ["text/plain"] * 3 + ["application/json", "module"]


def test_links_lead_to_files_whatever_their_names(tmp_path):
    names = ["a b", "%41", "javascript:x", '"><b>', "#", "?", b"\xff"]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "disks").mkdir()
    for name in names:
        path = folder / (
            name if isinstance(name, str) else name.decode(errors="surrogateescape")
        )
        path.touch()
    (test,) = made(tmp_path, [{"test": "a", "artifacts": "folder"}]).run["tests"]
    assert sorted(link for _, link, _ in test["files"]) == [
        *("./folder/%22%3E%3Cb%3E", "./folder/%23", "./folder/%2541", "./folder/%3F"),
        *("./folder/%FF", "./folder/a%20b", "./folder/disks/"),
        "./folder/javascript%3Ax",
    ]


@pytest.mark.parametrize("place", ["../other", "/etc", "link", "none", "a\0", "."])
def test_no_folder_elsewhere_is_looked_into(tmp_path, place):
    other, here = tmp_path / "other", tmp_path / "here"
    other.mkdir()
    here.mkdir()
    (other / "secret").touch()
    (here / "link").symlink_to(other)
    (test,) = made(here, [{"test": "a", "artifacts": place}]).run["tests"]
    assert "secret" not in json.dumps(test)
    assert "passwd" not in json.dumps(test)


def test_a_link_among_the_artefacts_is_not_followed(tmp_path):
    timeline_samples.write(tmp_path, tests=1)
    (place,) = tmp_path.glob("*/timeline.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "timeline.jsonl").symlink_to(place)
    found = made(tmp_path, [{"test": "a", "artifacts": "folder"}])
    assert found.kinds == ["application/json", "module"]


def test_the_timelines_have_a_bounded_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_ROOM", 40_000)
    monkeypatch.setattr(page, "_LEAST_ROOM", 4_000)
    timeline_samples.write(tmp_path, tests=9, calls=200)
    found = Page(write_report(tmp_path))
    for name, text in found.scripts.items():
        if name.startswith("timeline-"):
            timeline = unpacked(text)
            assert 3_000 < len(json.dumps(timeline["records"])) <= 40_000 // 9 + 2
            assert sum(timeline["left_out"].values()) > 100


def test_slow_is_what_takes_several_times_the_usual(tmp_path):
    rows = [
        {"test": str(n), "duration": 1.0 + n, "phases": {"setUp": 1.0, "test": n}}
        for n in (1, 1, 2, 8)
    ]
    rows += [{"test": "short", "duration": 0.9, "phases": {"setUp": 0.1}}] * 2
    rows += [{"test": "none", "duration": 0}]
    found = made(tmp_path, rows).run["tests"]
    slow = [test.get("slow") for test in found]
    assert slow == [None] * 3 + [{"": 3.0}] + [None] * 3
    rows += [{"test": "more", "phases": {"test": 2}}] * 3
    found = made(tmp_path, rows).run["tests"]
    assert [test.get("slow") for test in found][3] == {"": 3.0, "test": 2}


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    timeline_samples.write(tmp_path, tests=2)
    before = write_report(tmp_path).read_bytes()

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(HarnessError, match="No space left"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert list(tmp_path.glob(".*")) == []


def test_a_folder_that_is_a_loop_of_links_is_none(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (test,) = made(tmp_path, [{"test": "t", "artifacts": "a"}]).run["tests"]
    assert "files" not in test
