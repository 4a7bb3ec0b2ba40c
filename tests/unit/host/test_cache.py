"""The cache: complete or absent, whoever builds and whoever dies."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from qubes_itests.host.cache import Cache, digest
from qubes_itests.host.exc import CacheError

_PROLOGUE = """
import os, sys
from pathlib import Path
from qubes_itests.host.cache import Cache
cache, log = Cache(Path(sys.argv[1])), Path(sys.argv[2])
def say(word):
    with log.open("a") as file:
        file.write(word + "\\n")
"""


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def process(cache, tmp_path):
    """Start Python in a process of its own, with the cache and a log."""
    started = []

    def start(body: str) -> subprocess.Popen:
        code = _PROLOGUE + textwrap.dedent(body)
        command = [sys.executable, "-c", code, cache.root, tmp_path / "log"]
        started.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


def _names(cache: Cache, kind: str) -> list[str]:
    return sorted(path.name for path in (cache.root / kind).iterdir())


def test_an_entry_is_built_once(cache):
    builds = []

    def build(place):
        builds.append(place)
        (place / "file").write_text("content")

    first = cache.entry("image", "key", build)
    assert cache.entry("image", "key", build) == first == cache.lookup("image", "key")
    assert (first / "file").read_text() == "content"
    assert len(builds) == 1
    assert cache.entries("image") == [first]


def test_a_failed_build_leaves_nothing(cache):
    def build(place):
        (place / "half").write_text("")
        raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        cache.entry("image", "key", build)
    assert cache.lookup("image", "key") is None
    assert _names(cache, "image") == []


def test_discard_drops_an_entry_and_forgives_a_second_call(cache):
    cache.entry("image", "key", lambda place: (place / "file").write_text("x"))
    cache.discard("image", "key")
    cache.discard("image", "key")
    assert cache.lookup("image", "key") is None
    assert _names(cache, "image") == []


def test_processes_at_once_build_one_complete_entry(cache, process, tmp_path):
    """Eight processes want one entry: one builds, and all see all of its files."""
    body = """
        def build(place):
            say("built")
            for number in range(200):
                (place / str(number)).write_text("x" * number)
        sys.stdin.readline()
        entry = cache.entry("image", "key", build)
        sizes = sorted(path.stat().st_size for path in entry.iterdir())
        print(sizes == list(range(200)))
    """
    processes = [process(body) for _ in range(8)]
    for one in processes:
        one.stdin.write("go\n")
        one.stdin.flush()
    assert [one.communicate(timeout=60)[0] for one in processes] == ["True\n"] * 8
    assert (tmp_path / "log").read_text() == "built\n"
    assert _names(cache, "image") == ["key"]


def test_a_killed_builder_leaves_no_entry_and_its_rest_is_swept(cache, process):
    """Who waits for the builder's lock builds it anew when the builder is killed."""
    builder = process("""
        def build(place):
            (place / "half").write_text("half")
            print("building", flush=True)
            sys.stdin.readline()
        cache.entry("image", "key", build)
    """)
    assert builder.stdout.readline() == "building\n"
    second = process("""
        print("wanting", flush=True)
        entry = cache.entry("image", "key", lambda place: (place / "whole").touch())
        print(sorted(path.name for path in entry.iterdir()))
    """)
    assert second.stdout.readline() == "wanting\n"
    assert cache.lookup("image", "key") is None
    builder.send_signal(signal.SIGKILL)
    assert second.communicate(timeout=30)[0] == "['whole']\n"
    assert _names(cache, "image") == ["key"]


def test_builders_of_different_keys_do_not_wait_for_each_other(cache, process):
    builder = process("""
        def build(place):
            print("building", flush=True)
            sys.stdin.readline()
        cache.entry("image", "one", build)
    """)
    assert builder.stdout.readline() == "building\n"
    cache.entry("image", "two", lambda _: None)
    assert builder.poll() is None


def test_an_entry_may_hold_links_that_lead_nowhere(cache):
    entry = cache.entry("image", "k", lambda place: (place / "a").symlink_to("/none"))
    assert (entry / "a").is_symlink()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a\n", "a\0", "x" * 201])
def test_a_name_cannot_lead_out_of_the_cache(cache, name):
    for kind, key in ((name, "key"), ("kind", name)):
        with pytest.raises(ValueError, match="cannot name a cache entry"):
            cache.lookup(kind, key)


def test_the_runs_are_no_entries(cache):
    with pytest.raises(ValueError, match="cannot name"):
        cache.lookup("runs", "key")


def test_the_environment_names_the_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("QUBES_ITESTS_CACHE", str(tmp_path / "named"))
    assert Cache().root == tmp_path / "named"
    monkeypatch.delenv("QUBES_ITESTS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Cache().root == tmp_path / "home/.cache/qubes_itests"


def test_a_directory_that_cannot_be_made_is_said_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="QUBES_ITESTS_CACHE"):
        Cache(tmp_path / "file" / "cache")


def test_digest_counts_contents_kinds_order_and_cuts(tmp_path):
    file = tmp_path / "file"
    file.write_text("ab")
    keys = {
        digest("ab"),
        digest(b"ab"),
        digest(file),
        digest("a", "b"),
        digest("b", "a"),
        digest(),
    }
    assert len(keys) == 6
    assert all(len(key) == 40 and key.isalnum() for key in keys)
    before = digest(file)
    os.rename(file, tmp_path / "moved")  # noqa: PTH104
    assert digest(tmp_path / "moved") == before
