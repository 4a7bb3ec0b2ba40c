"""Run directories: there while the run lives, and not for long after."""

import subprocess
import sys
from pathlib import Path

import pytest

from qubes_itests.host.cache import Cache
from qubes_itests.host.rundir import RunDirectory, part, remove_stale

_RUN = """
import sys
from pathlib import Path
from qubes_itests.host.cache import Cache
from qubes_itests.host.rundir import RunDirectory
with RunDirectory(Cache(Path(sys.argv[1]))) as run:
    (run.path / "left").write_text("over")
    print(run.path, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path)


@pytest.fixture
def other_run(cache):
    """Another process with a run directory: the process, and the directory."""
    with subprocess.Popen(
        [sys.executable, "-c", _RUN, cache.root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process, Path(process.stdout.readline().rstrip("\n"))
        process.kill()


def test_it_goes_with_the_run(cache):
    with RunDirectory(cache) as run:
        (run.path / "sub").mkdir()
        (run.path / "sub/file").write_text("x")
        assert run.path.stat().st_mode & 0o777 == 0o700
    assert not run.path.exists()
    run.remove()


def test_it_goes_when_the_run_fails(cache):
    with pytest.raises(ValueError, match="x"), RunDirectory(cache) as run:
        raise ValueError("x")
    assert not run.path.exists()


def test_two_runs_have_two(cache):
    with RunDirectory(cache) as one, RunDirectory(cache) as two:
        assert one.path != two.path
        assert one.path.exists()


def test_a_living_run_of_another_process_is_left_alone(cache, other_run):
    _, path = other_run
    assert remove_stale(cache) == {}
    with RunDirectory(cache):
        assert (path / "left").exists()


def test_a_killed_run_is_swept_by_clean(cache, other_run):
    process, path = other_run
    process.kill()
    process.wait()
    assert path.exists()
    assert list(remove_stale(cache)) == [path]
    assert not path.exists()


def test_a_killed_run_is_swept_by_the_next(cache, other_run):
    process, path = other_run
    process.kill()
    process.wait()
    with RunDirectory(cache):
        assert not path.exists()


def test_links_out_of_it_are_not_followed(cache, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    with RunDirectory(cache) as run:
        (run.path / "link").symlink_to(outside)
    assert (outside / "file").exists()


def test_its_path_leaves_room_for_sockets(cache):
    with RunDirectory(cache) as run:
        assert len(str(run.path)) <= len(str(cache.root)) + len("/runs/") + 8


def test_a_part_of_a_run_goes_with_it_or_before(cache):
    with RunDirectory(cache) as run:
        with part(run.path, "one") as place:
            (place / "file").touch()
        assert list(run.path.iterdir()) == []
        (run.path / "killed").mkdir()
    assert not run.path.exists()
