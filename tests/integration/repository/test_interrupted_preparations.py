"""Whoever ends a preparation leaves nothing that lasts beyond the next run."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conditions import wait_until

from qubes_itests.host.loop import loop_devices_over

SPEC = "[qubes_itests:template:mine]\nbase = tiny\nrun = {run}\n"
SETUP = """\
import time
# an app has tests if it names "qubes.tests.extra"
{begin}
"""
SLOW = 'open("begun", "w")\ntime.sleep(1000)'


class Preparation:
    """The program while it makes something ready for an app, in a cache of its own."""

    def __init__(self, site, directory, *, run=":", begin=""):
        self.app = directory / "my-app"
        self.app.mkdir()
        (self.app / "setup.cfg").write_text(SPEC.format(run=run))
        (self.app / "setup.py").write_text(SETUP.format(begin=begin))
        self.cache = directory / "cache-of-interrupted-runs"
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self.site = site
        places = {"QUBES_ITESTS_CACHE": self.cache, "TMPDIR": self.temporary}
        site.environment |= {name: str(path) for name, path in places.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qubes_itests", "--app", str(self.app)],
            cwd=site.work,
            env=site.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def half_made(self):
        return list(self.cache.glob("*/.*@*"))

    def processes(self):
        """Return what runs with the cache, told by its environment."""
        mark = f"QUBES_ITESTS_CACHE={self.cache}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(path.parent.name)
            except OSError:  # it has ended
                continue
        return found

    def end(self, number):
        images = list(self.cache.glob("layer/.*@*/root.img"))
        self.process.send_signal(number)
        self.process.wait(300)
        wait_until(lambda: not self.processes(), "the end of all processes")
        for image in images:
            wait_until(lambda i=image: not loop_devices_over(i), "no loop device")


@pytest.fixture
def prepare(site, tmp_path):
    made = []

    def start(**values):
        made.append(Preparation(site, tmp_path, **values))
        return made[-1]

    yield start
    for preparation in made:
        preparation.process.kill()
        preparation.process.wait()


def layer(prepare):
    preparation = prepare(run="echo begun; sleep 1000")
    log = preparation.site.work / "itests-artifacts/template-mine.log"
    wait_until(lambda: log.is_file() and "begun" in log.read_text(), "the commands")
    return preparation


def plugin(prepare):
    preparation = prepare(begin=SLOW)
    begun = "app/.*@*/scratch/tmp/pip-*"
    wait_until(lambda: list(preparation.cache.glob(begun)), "pip")
    return preparation


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        (layer, signal.SIGTERM),
        (layer, signal.SIGKILL),
        (plugin, signal.SIGINT),
        (plugin, signal.SIGHUP),
        (plugin, signal.SIGKILL),
    ],
)
def test_nothing_is_left_of_what_was_being_made(prepare, stage, number):
    preparation = stage(prepare)
    assert preparation.half_made()
    preparation.end(number)
    if number == signal.SIGKILL:
        assert preparation.half_made()
        assert "1 half-made entry" in preparation.site.run("clean").stdout
    assert preparation.half_made() == []
    assert list(preparation.temporary.iterdir()) == []
