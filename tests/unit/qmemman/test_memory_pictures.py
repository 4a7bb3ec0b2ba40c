"""The live view and the picture, made from a recorded simulation."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest
from memory_recording import record_refusal
from rich.console import Console

from qubes_itests.qmemman import live, plot, timeline
from qubes_itests.qmemman.exc import TimelineError


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return record_refusal(tmp_path_factory.mktemp("memory"))


def _parsed(svg):
    return ET.fromstring(svg)  # noqa: S314 - our own


def test_the_picture_names_every_vm_and_event(recording):
    svg = plot.draw(timeline.read(recording))
    text = " ".join(_parsed(svg).itertext())
    for words in ("dom0", "work", "web", "uses 900 MiB", "free", "2500 MiB refused"):
        assert words in text
    assert "work needs 900 MiB" in text


def test_names_cannot_break_the_picture(tmp_path, recording):
    evil = tmp_path / "evil"
    evil.write_text(recording.read_text().replace('"web"', '"</text><script>&"'))
    svg = plot.draw(timeline.read(evil))
    root = _parsed(svg)
    assert not root.findall(".//{*}script")
    assert "Nothing was recorded" in plot.draw([])


def test_the_live_view_shows_the_last_moment(recording):
    out = io.StringIO()
    live.follow(recording, Console(file=out, width=120))
    words = out.getvalue().split()
    assert {"dom0", "work", "web", "900"} <= set(words)
    empty = recording.with_name("empty")
    empty.touch()
    with pytest.raises(TimelineError, match="empty"):
        live.follow(empty, Console(file=out))


def test_who_takes_no_part_is_not_waited_for(tmp_path, recording):
    """Its report will never come, so it is not missed."""
    path, out = tmp_path / "fixed", io.StringIO()
    values = json.loads(recording.read_text().splitlines()[0])
    for name, balanced in (("late", True), ("fixed", False)):
        values["domains"][name] = values["domains"]["0"] | {
            "name": name, "used": None, "preferred": None, "balanced": balanced,
        }  # fmt: skip
    path.write_text(json.dumps(values) + "\n")
    live.follow(path, Console(file=out, width=120))
    said = {words[0]: text for text in out.getvalue().splitlines()
            if (words := text.split())}  # fmt: skip
    assert said["late"].rstrip().endswith("has not reported")
    assert said["fixed"].rstrip().endswith("takes no part")
    text = " ".join(_parsed(plot.draw(timeline.read(path))).itertext())
    assert text.count("takes no part") == 1


def test_the_live_view_goes_on_with_the_next_test_and_ends_with_the_run(
    tmp_path, recording
):
    """The second file appears when nothing comes in the first any more."""
    second = tmp_path / "second"
    second.write_text(recording.read_text().replace('"work"', '"other"'))
    answers = iter([second, second, second, None, None])

    def newest():
        answer = next(answers)
        if answer is None:
            second.unlink(missing_ok=True)
        return answer

    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    live.follow(recording, console, newest)
    assert out.getvalue().index("work") < out.getvalue().index("other")


def test_the_command_line_plots(recording, tmp_path):
    def run(*words):
        command = [sys.executable, "-m", "qubes_itests", "memory", *words]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    former = tmp_path / "former.svg"
    former.write_text("former")
    (tmp_path / "memory.svg").hardlink_to(former)
    done = run("plot", str(recording))
    assert (done.returncode, done.stdout) == (0, "Wrote memory.svg.\n")
    _parsed((tmp_path / "memory.svg").read_text())
    assert former.read_text() == "former", "it was written into, and not replaced"
    assert "work" in run(str(recording)).stdout
    failed = run("plot", "no-such-file")
    assert failed.returncode == 3
    assert "is not a timeline" in failed.stderr


def test_two_timelines_are_drawn_side_by_side_to_the_same_scales(recording):
    """The shorter one goes on with what was last, and a VM's row has one scale."""
    long = timeline.read(recording)
    short = [record for record in long if record.time < long[-1].time / 2]
    root = _parsed(plot.draw_rows([[("long", long), ("short", short)], [("more", [])]]))
    panels = root.findall("{*}g")
    assert [p.get("transform").split()[0] for p in panels] == [
        "translate(0", "translate(1000", "translate(0",
    ]  # fmt: skip
    scales = [
        [text for text in panel.itertext() if re.fullmatch(r"\d+( s)?", text)]
        for panel in panels
    ]
    assert scales[0] == scales[1]
    assert "Nothing was recorded." in panels[2].itertext()
