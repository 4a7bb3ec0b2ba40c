"""The file of a store: the old state or the new one, and no writer's change is lost."""

import concurrent.futures
import errno
import os
import random
import select
import signal
import subprocess
import sys
import threading

import pytest

from qubes_itests.core.store import file as file_module
from qubes_itests.core.store.file import StoreError, StoreFile

KILLS = 100
LONGEST_LIFE = 0.02

_CRASHED = 86
_STEPS = {"open", "os.remove", "os.rename", "os.truncate", "fcntl.flock"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "qubes.xml"


@pytest.fixture
def store(path):
    store = StoreFile(path)
    write(store, b"old")
    return store


def write(store, data, *, lock=False):
    store.write(data, store.next_version(), lock=lock)


def test_missing_file_says_so(path):
    store = StoreFile(path)
    with pytest.raises(StoreError, match=r"there is no .*qubes\.xml"):
        store.read(lock=True)
    assert not store.is_locked


@pytest.mark.usefixtures("store")
def test_written_is_read_by_another(path):
    assert StoreFile(path).read() == b"old"
    assert path.stat().st_mode & 0o777 == 0o600


def test_second_of_two_writers_is_refused(store, path):
    other = StoreFile(path)
    other.read()
    write(store, b"first")
    with pytest.raises(StoreError, match="load it again"):
        write(other, b"second", lock=True)
    assert path.read_bytes() == b"first"
    assert not other.is_locked
    other.read()
    write(other, b"second")
    assert path.read_bytes() == b"second"


@pytest.mark.usefixtures("store")
def test_existing_file_is_not_replaced_by_one_who_did_not_read_it(path):
    with pytest.raises(StoreError, match="changed by another process"):
        write(StoreFile(path), b"new")
    assert path.read_bytes() == b"old"


def test_removed_file_is_noticed(store, path):
    path.unlink()
    with pytest.raises(StoreError, match="changed by another process"):
        write(store, b"new")
    assert not path.exists()


def test_lock_keeps_writers_out_and_lets_readers_in(store, path, monkeypatch):
    monkeypatch.setattr(file_module, "LOCK_TIMEOUT", 0.05)
    other = StoreFile(path)
    other.read()
    write(store, b"new", lock=True)
    assert other.read() == b"new"
    message = f"in use by process {os.getpid()}"
    with pytest.raises(StoreError, match=message):
        write(other, b"newer")
    with pytest.raises(StoreError, match=message):
        other.read(lock=True)
    store.release()
    store.release()
    write(other, b"newer")
    assert path.read_bytes() == b"newer"


def test_dropped_app_holds_no_lock(store, path, monkeypatch):
    monkeypatch.setattr(file_module, "LOCK_TIMEOUT", 0.05)
    dropped = StoreFile(path)
    dropped.read(lock=True)
    del dropped
    write(store, b"new", lock=True)
    store.release()


def test_lock_goes_with_its_process(store, path, monkeypatch):
    script = (
        "import sys\n"
        "from qubes_itests.core.store.file import StoreFile\n"
        "store = StoreFile(sys.argv[1])\n"
        "store.read(lock=True)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    monkeypatch.setattr(file_module, "LOCK_TIMEOUT", 0.05)
    with subprocess.Popen(
        [sys.executable, "-c", script, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(StoreError, match=f"in use by process {other.pid}"):
            write(store, b"new")
        other.kill()
        other.wait(300)
    write(store, b"new")
    assert path.read_bytes() == b"new"


def test_older_state_does_not_replace_a_newer_one(store, path):
    """A thread that is late does not undo what was saved meanwhile."""
    early, late = store.next_version(), store.next_version()
    store.write(b"late", late, lock=False)
    store.write(b"early", early, lock=False)
    assert path.read_bytes() == b"late"


def test_threads_write_one_after_the_other(store, path):
    barrier = threading.Barrier(8)

    def save(number):
        barrier.wait(300)
        write(store, b"%d" % number)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(8)))
    assert StoreFile(path).read() in {b"%d" % number for number in range(8)}
    assert sorted(item.name for item in path.parent.iterdir()) == [
        "qubes.xml",
        "qubes.xml.lock",
    ]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failure_leaves_the_old_state(store, path, monkeypatch, failing):
    def fail(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="No space left"):
            write(store, b"new", lock=True)
    assert path.read_bytes() == b"old"
    assert not path.with_name("qubes.xml.new").exists()
    assert not store.is_locked
    write(store, b"new")
    assert path.read_bytes() == b"new"


def test_link_beside_the_file_is_not_followed(store, path, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    path.with_name("qubes.xml.new").symlink_to(victim)
    write(store, b"new")
    assert victim.read_bytes() == b"mine"
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()


def _in_child(action):
    """Call `action` in a process that shares nothing of what happens there."""
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
    except BaseException:  # noqa: BLE001 - a child of fork must not return
        sys.excepthook(*sys.exc_info())
    os._exit(1)


def _die_at(step, path):
    store = StoreFile(path)
    store.read()
    left = step

    def count(event, arguments):
        nonlocal left
        if event in _STEPS and (event == "fcntl.flock" or str(path) in str(arguments)):
            if not left:
                os._exit(_CRASHED)
            left -= 1

    sys.addaudithook(count)
    write(store, b"new")
    os._exit(0)


def test_death_at_each_step_leaves_one_of_the_two_states(path):
    states = []
    status = _CRASHED
    for step in range(50):
        path.unlink(missing_ok=True)
        write(StoreFile(path), b"old")
        pid = _in_child(lambda step=step: _die_at(step, path))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        after = StoreFile(path)
        states.append(after.read())
        write(after, b"next")
        assert StoreFile(path).read() == b"next"
        if status != _CRASHED:
            break
    assert status == 0
    # it died before and after the only step that matters
    assert states[0] == b"old"
    assert states[-1] == b"new"
    assert set(states) == {b"old", b"new"}


def _save_for_ever(path, report):
    store = StoreFile(path)
    number = int(store.read().split()[0])
    while True:
        number += 1
        write(store, b"%d\n" % number + b"x" * (number % 50_000))
        os.write(report, b"%d\n" % number)


def test_kill_at_any_moment_loses_nothing_that_was_saved(path):
    chance = random.Random(8)  # noqa: S311 - repeatable, not secret
    write(StoreFile(path), b"0\n")
    known, progress = 0, 0
    for _ in range(KILLS):
        reader, writer = os.pipe()
        pid = _in_child(lambda writer=writer: _save_for_ever(path, writer))
        os.close(writer)
        select.select([reader], [], [], 300)  # it saves
        threading.Event().wait(chance.uniform(0, LONGEST_LIFE))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reader, "rb") as reports:
            promised = int(reports.read().split()[-1])
        found = StoreFile(path).read()
        number = int(found.split()[0])
        assert number in (promised, promised + 1)
        assert found == b"%d\n" % number + b"x" * (number % 50_000)
        progress += number - known
        known = number
    assert progress >= KILLS
