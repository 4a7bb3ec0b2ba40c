"""The cache: complete or absent, whoever builds and whoever dies."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.host.cache import Cache, digest

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


@pytest.mark.parametrize("gone", ["entry", "file"])
def test_who_looks_while_another_drops_an_entry_does_not_fail(cache, monkeypatch, gone):
    """As when two runs at once find the cache full."""
    place = cache.entry("kind", "other", lambda p: (p / "file").write_text("data"))
    walk = os.walk

    def walk_late(directory):
        for found in walk(directory):
            if directory == place:
                if gone == "file":
                    (place / "file").unlink()
                else:
                    shutil.rmtree(place)
            yield found

    monkeypatch.setattr(os, "walk", walk_late)
    made = cache.entry("kind", "mine", lambda p: (p / "file").write_text("data"))
    assert (made / "file").read_text() == "data"


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
        sizes = sorted(path.stat().st_size for path in entry.glob("[0-9]*"))
        print(sizes == list(range(200)))
    """
    processes = [process(body) for _ in range(8)]
    for one in processes:
        one.stdin.write("go\n")
        one.stdin.flush()
    assert [one.communicate(timeout=300)[0] for one in processes] == ["True\n"] * 8
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
        print(sorted(path.name for path in entry.glob("[a-z]*")))
    """)
    assert second.stdout.readline() == "wanting\n"
    assert cache.lookup("image", "key") is None
    builder.send_signal(signal.SIGKILL)
    assert second.communicate(timeout=300)[0] == "['whole']\n"
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
    with pytest.raises(EnvironmentNotReadyError, match="QUBES_ITESTS_CACHE"):
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


def _fill(place):
    """Make what templates are made of: a sparse file, a tree, an odd name."""
    with (place / "root.img").open("wb") as image:
        image.truncate(64 << 20)
        image.seek(20 << 20)
        image.write(b"data")
    (place / "lib").mkdir()
    (place / "lib" / os.fsdecode(b"\xff")).write_text("module")


def _change(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"DATA")


DAMAGES = {
    "a file is gone": lambda entry: (entry / "root.img").unlink(),
    "a file is cut": lambda entry: os.truncate(entry / "root.img", 1 << 20),
    "data is changed": lambda entry: _change(entry / "root.img", 20 << 20),
    "a hole is filled": lambda entry: _change(entry / "root.img", 5 << 20),
    "a folder is gone": lambda entry: shutil.rmtree(entry / "lib"),
    "the record is gone": lambda entry: (entry / ".contents").unlink(),
    "the record is cut": lambda entry: os.truncate(entry / ".contents", 3),
    "the record is no record": lambda entry: (entry / ".contents").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(cache, process, damage):
    """By another process: one that has used it trusts it as long as it lasts."""
    DAMAGES[damage](cache.entry("image", "key", _fill))
    second = process("""
        print(cache.lookup("image", "key"), cache.entries("image"))
        entry = cache.entry("image", "key", lambda place: (place / "new").touch())
        print(sorted(path.name for path in entry.iterdir()))
    """)
    said = second.communicate(timeout=300)[0]
    assert said == "None []\n['.contents', 'new']\n"
    assert _names(cache, "image") == ["key"]


def _copy(entry):
    """Copy as `cp -r` and archives do: times are lost, holes are filled."""
    copy = entry.with_name(".copy")
    shutil.copytree(entry, copy, copy_function=shutil.copyfile)
    shutil.rmtree(entry)
    copy.rename(entry)


@pytest.mark.parametrize(
    "change",
    [
        _copy,
        lambda entry: (entry / "lib/__pycache__").mkdir(),
    ],
)
def test_what_changes_no_data_is_no_damage(cache, process, change):
    change(cache.entry("image", "key", _fill))
    second = process('print(cache.lookup("image", "key"))')
    assert second.communicate(timeout=300)[0] == f"{cache.root / 'image/key'}\n"


def _megabyte(place):
    (place / "data").write_bytes(os.urandom(1 << 20))


def _age(entry, hours):
    when = entry.stat().st_mtime - hours * 3600
    os.utime(entry / ".contents", (when, when))


def test_beyond_its_bound_that_goes_which_was_not_used_longest(
    cache, process, monkeypatch
):
    build = """
        for key in sys.stdin.readline().split():
            cache.entry("image", key, lambda place: (place / "x").write_bytes(
                os.urandom(1 << 20)))
    """
    first = process(build)
    first.communicate("old older used recent", timeout=300)
    for name, hours in {"old": 2, "older": 3, "used": 4}.items():
        _age(cache.root / "image" / name, hours)
    user = process("""
        cache.lookup("image", "used")
        os.utime(cache.root / "image/used/.contents", (1, 1))
        print("used", flush=True)
        sys.stdin.readline()
    """)
    assert user.stdout.readline() == "used\n"
    monkeypatch.setenv("QUBES_ITESTS_CACHE_LIMIT", "4500K")
    cache.entry("image", "new", _megabyte)
    assert _names(cache, "image") == ["new", "old", "recent", "used"]
    monkeypatch.setenv("QUBES_ITESTS_CACHE_LIMIT", "1K")
    cache.entry("image", "newer", _megabyte)
    assert _names(cache, "image") == ["new", "newer", "recent", "used"]


def test_a_use_puts_an_entry_behind_the_others(cache, process):
    for name in ("one", "two"):
        _age(cache.entry("image", name, _megabyte), 5)
    made = (cache.root / "image/one").stat().st_mtime_ns
    process('cache.lookup("image", "one")').communicate(timeout=300)
    # by which jobs of CI systems tell what a run has made
    assert (cache.root / "image/one").stat().st_mtime_ns == made
    assert [entry.place.name for entry in cache.content()] == ["two", "one"]
    assert all(1 << 20 <= entry.size < 2 << 20 for entry in cache.content())


@pytest.mark.parametrize("limit", ["20 GiB", "-1", "1.5G", "x"])
def test_a_bound_that_is_no_size_is_told(cache, monkeypatch, limit):
    monkeypatch.setenv("QUBES_ITESTS_CACHE_LIMIT", limit)
    with pytest.raises(EnvironmentNotReadyError, match="such as 20G"):
        assert cache.limit


def test_a_sweep_removes_what_the_dead_left_and_not_what_the_living_make(
    cache, process
):
    body = """
        def build(place):
            (place / "half").write_bytes(bytes(1 << 20))
            print("building", flush=True)
            sys.stdin.readline()
        cache.entry("image", {!r}, build)
    """
    dead, alive = process(body.format("dead")), process(body.format("alive"))
    for one in (dead, alive):
        assert one.stdout.readline() == "building\n"
    dead.kill()
    dead.wait()
    (cache.root / "precious").mkdir()
    (cache.root / "precious/.mine@home").mkdir()
    (swept,) = cache.sweep()
    assert (swept.kind, swept.size) == ("image", 1 << 20)
    (left,) = _names(cache, "image")
    assert left.startswith(".alive@")
    assert (cache.root / "precious/.mine@home").is_dir()
    cache.entry("other", "key", lambda _: None)
    alive.communicate("\n", timeout=300)
    assert _names(cache, "image") == ["alive"]


def test_a_build_removes_what_was_left_of_any_other(cache, process):
    dead = process("""
        def build(place):
            print("building", flush=True)
            sys.stdin.readline()
        cache.entry("image", "dead", build)
    """)
    assert dead.stdout.readline() == "building\n"
    dead.kill()
    dead.wait()
    cache.entry("other", "key", lambda _: None)
    assert _names(cache, "image") == []


def test_a_full_disk_is_told_with_what_to_do(cache):
    def build(_):
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(EnvironmentNotReadyError, match="clean --cache"):
        cache.entry("image", "key", build)


def test_an_entry_that_is_used_all_day_does_not_go_for_want_of_a_record(
    cache, process, monkeypatch
):
    """Without one its use left no trace, and it was the first to go: the kernel."""
    first = process("""
        cache.entry("image", "kernel", lambda place: (place / "x").write_bytes(b"x"))
        os.unlink(cache.root / "image/kernel/.contents")
    """)
    first.communicate(timeout=300)
    os.utime(cache.root / "image/kernel", (1, 1))
    use = """
        print(cache.entry("image", "kernel", lambda p: (p / "x").write_bytes(b"new")))
    """
    assert "image/kernel" in process(use).communicate(timeout=300)[0]
    monkeypatch.setenv("QUBES_ITESTS_CACHE_LIMIT", "1K")
    cache.entry("image", "new", _megabyte)
    assert _names(cache, "image") == ["kernel", "new"]
    assert (cache.root / "image/kernel/x").read_bytes() == b"new"


def test_what_was_used_since_room_was_looked_for_stays(cache, process, monkeypatch):
    """As by a run that is on its way into its sandbox: nobody has it for a moment."""
    build = 'cache.entry("image", "old", lambda place: (place / "x").write_bytes(b"x"))'
    process(build).communicate(timeout=300)
    _age(cache.root / "image/old", 5)
    content = cache.content()
    process('cache.lookup("image", "old")').communicate(timeout=300)
    monkeypatch.setattr(Cache, "content", lambda _cache: content)
    monkeypatch.setenv("QUBES_ITESTS_CACHE_LIMIT", "0")
    cache.entry("image", "new", _megabyte)
    assert _names(cache, "image") == ["new", "old"]


def test_what_cannot_be_looked_at_is_not_taken_for_damaged(cache, process):
    """A process without descriptors drops nothing, and holds none afterwards."""
    build = 'cache.entry("image", "key", lambda place: (place / "x").write_bytes(b"x"))'
    process(build).communicate(timeout=300)
    os.utime(cache.root / "image/key/x")  # so that its data is read
    poor = process("""
        import resource
        used = len(os.listdir("/proc/self/fd")) - 1
        for spare in range(1, 4):
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, used + 99))
            try:
                found = cache.lookup("image", "key") is not None
            except OSError as error:
                found = error.strerror
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 99, used + 99))
            print(found, len(os.listdir("/proc/self/fd")) - 1 - used)
    """)
    assert poor.communicate(timeout=300)[0].splitlines() == [
        "Too many open files 0",
        "True 1",
        "True 1",
    ]
    assert _names(cache, "image") == ["key"]


def test_what_another_process_uses_is_not_dropped_by_who_takes_it_for_damaged(
    cache, process
):
    entry = cache.entry("image", "key", lambda place: (place / "x").write_bytes(b"x"))
    (entry / "x").write_bytes(b"y")
    looked = process('print(cache.lookup("image", "key"), cache.entries("image"))')
    assert looked.communicate(timeout=300)[0] == "None []\n"
    assert (entry / "x").exists()


def test_two_threads_that_find_the_same_damage_do_not_wait_for_each_other(
    cache, process
):
    build = 'cache.entry("image", "key", lambda place: (place / "x").write_bytes(b"x"))'
    process(build).communicate(timeout=300)
    (cache.root / "image/key/x").write_bytes(b"y")
    looked = process("""
        import contextlib, threading
        from qubes_itests.host import cache as module

        def look():
            say(str(cache.lookup("image", "key")))

        other, lock = threading.Thread(target=look), module._locked_at_once

        @contextlib.contextmanager
        def locked(path):
            with lock(path) as free:
                if other.ident is None:
                    # it waits for what is locked here, and has all others wait
                    other.start()
                    while not module._using.locked():
                        pass
                yield free

        module._locked_at_once = locked
        look()
        other.join()
        print("both")
    """)
    assert looked.communicate(timeout=300)[0] == "both\n"
    assert _names(cache, "image") == []


_USER = """
    import random, time
    from qubes_itests.host import cache as module
    module._RECENT = 0.0
    os.environ["QUBES_ITESTS_CACHE_LIMIT"] = "90K"

    def build(place):
        for number in range(8):
            (place / str(number)).write_bytes(key.encode() * 4096)

    key = "a"
    cache.entry("image", key, build)
    print("begun", flush=True)
    while True:
        key = random.choice("abcdef")
        if random.random() < 0.5:
            place = cache.entry("image", key, build)
        else:
            place = cache.lookup("image", key)
        for _ in range(3 if place else 0):
            whole = [place.joinpath(str(n)).read_bytes() for n in range(8)]
            if whole != [key.encode() * 4096] * 8:
                say(f"{key} is not whole")
            time.sleep(0.002)
        if random.random() < 0.1:
            cache.sweep()
        if random.random() < 0.2:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
"""


def test_no_entry_in_use_goes_and_none_is_half_made_whoever_is_killed(
    cache, process, tmp_path
):
    """Six use more than there is room for, and each is killed and begun again."""
    kills = random.Random(5)  # noqa: S311
    users = [process(_USER) for _ in range(6)]
    for turn in range(40):
        time.sleep(kills.uniform(0, 0.1))
        number = kills.randrange(len(users))
        # the others wherever they are
        is_at_work = turn % 2 == 1
        assert not is_at_work or users[number].stdout.readline() == "begun\n"
        assert users[number].poll() is None
        users[number].kill()
        users[number] = process(_USER)
    for user in users:
        assert user.stdout.readline() == "begun\n"
        user.kill()
        user.wait(300)
    assert not (tmp_path / "log").exists()
    cache.sweep()
    assert not [name for name in _names(cache, "image") if name.startswith(".")]
    check = process('print([p.name for p in cache.entries("image")])')
    assert check.communicate(timeout=300)[0] == f"{_names(cache, 'image')}\n"
