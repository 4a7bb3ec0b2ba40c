"""The console log is bounded, complete, and needs no guest to be tested."""

from __future__ import annotations

import os

import pytest
from conditions import wait_until

from qubes_itests.hypervisor.console import Console


@pytest.fixture
def console(tmp_path):
    collector = Console("work", tmp_path / "console.pipe", tmp_path / "console.log")
    collector.open()
    yield collector
    collector.close()


def feed(directory, *pieces):
    """Print as a hypervisor does: through the pipe, and gone at the end."""
    with (directory / "console.pipe.out").open("wb") as pipe:
        for piece in pieces:
            pipe.write(piece)


def test_everything_is_in_the_log(console, tmp_path):
    feed(tmp_path, b"one\n", b"two\n")
    console.close()
    assert (tmp_path / "console.log").read_bytes() == b"one\ntwo\n"
    assert os.listdir(tmp_path) == ["console.log"]  # noqa: PTH208 - names, in short
    assert not console.panicked


def test_a_flood_keeps_both_ends(console, tmp_path):
    """5 MiB come in, at most 1 MiB stays; the gap is told."""
    line = b"0123456789abcde\n" * 4096
    feed(tmp_path, b"the beginning\n", *[line] * 80, b"the end\n")
    console.close()
    log = (tmp_path / "console.log").read_bytes()
    assert len(log) <= 1 << 20
    assert log.startswith(b"the beginning\n")
    assert log.endswith(b"the end\n")
    assert log.count(b" bytes dropped]\n") == 1


def test_a_second_run_adds_to_the_log(console, tmp_path):
    feed(tmp_path, b"first\n")
    console.close()
    console.open()
    feed(tmp_path, b"second\n")
    console.close()
    assert (tmp_path / "console.log").read_bytes() == b"first\nsecond\n"


def test_a_panic_is_seen_in_pieces(console, tmp_path):
    with (tmp_path / "console.pipe.out").open("wb", buffering=0) as pipe:
        for byte in b"[ 1.0] Kernel panic - not syncing: dead\n":
            pipe.write(bytes([byte]))
    console.close()
    assert console.panicked
    console.open()
    console.close()
    assert not console.panicked


def test_a_pipe_that_nobody_opens(console, tmp_path):
    """Closing does not wait for a writer that never came."""
    console.close(timeout=5)
    assert (tmp_path / "console.log").read_bytes() == b""


def test_what_programs_print_is_no_panic(console, tmp_path):
    console.trusted = False
    feed(tmp_path, b"Kernel panic - not syncing: a lie\n")
    console.close()
    assert not console.panicked
    console.open()
    feed(tmp_path, b"Kernel panic - not syncing: dead\n")
    console.close()
    assert console.panicked


def test_it_goes_on_in_another_log(console, tmp_path):
    """What is printed from then on is the other's, and so are pipes and log."""
    place = tmp_path / "other"
    place.mkdir()
    (place / "console.log").write_bytes(b"earlier\n")
    with (tmp_path / "console.pipe.out").open("wb", buffering=0) as pipe:
        pipe.write(b"one\n")
        log = tmp_path / "console.log"
        wait_until(lambda: log.read_bytes() == b"one\n", "first line in the log")
        console.move("other", place / "console.pipe", place / "console.log")
        pipe.write(b"two\n")
    console.close()
    assert (tmp_path / "console.log").read_bytes() == b"one\n"
    assert (place / "console.log").read_bytes() == b"earlier\ntwo\n"
    assert os.listdir(place) == ["console.log"]  # noqa: PTH208 - names, in short
