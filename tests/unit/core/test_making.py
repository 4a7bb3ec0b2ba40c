"""VMs are made whole or not at all, and removed whole; nothing else is touched."""

import asyncio
import errno
import os
import shutil
import signal
import sys
import threading

import pytest

from qubes_itests.core import exc
from qubes_itests.core.app import Qubes
from qubes_itests.core.store.file import StoreError
from qubes_itests.faultdisk import failing_call
from qubes_storage.exc import (
    StoragePoolException,
    VolumeError,
    VolumeExistsError,
)
from qubes_storage.image_volume import ImageVolume
from qubes_storage.reflink import ReflinkPool

SMALL = {
    "root": {"size": 1 << 20},
    "private": {"size": 4 << 20},
    "volatile": {"size": 1 << 20},
}


class NoHypervisor:
    """Fails the test that reaches it."""

    slowness = 1.0

    def __getattr__(self, name):
        raise AssertionError(f"the hypervisor was asked for {name}")


def new_app(directory):
    return Qubes(directory / "qubes.xml", load=False, hypervisor=NoHypervisor())


async def make(app, cls="AppVM", name="work", **options):
    # the sizes of what is a snapshot are its source's
    sizes = {k: v for k, v in SMALL.items() if cls != "AppVM" or k != "root"}
    template = {} if cls != "AppVM" else {"template": "tiny"}
    return await app.create_vm(
        cls, name=name, label="red", volume_config=sizes, **template, **options
    )


@pytest.fixture
def app(tmp_path):
    async def begin():
        app = new_app(tmp_path)
        pool = ReflinkPool(
            name="default", dir_path=tmp_path / "pool", setup_check=False
        )
        await app.add_pool(pool)
        await make(app, "TemplateVM", "tiny")
        return app

    app = asyncio.run(begin())
    yield app
    asyncio.run(end(app))


async def end(app):
    await app.kill_all()
    app.close()
    for pool in app.pools.values():
        await pool.destroy()


def load(directory):
    return asyncio.run(
        Qubes.open(
            directory / "qubes.xml",
            lock=True,
            hypervisor=NoHypervisor(),
            directory=directory,
        )
    )


def again(app):
    """Return what a server after this one has."""
    asyncio.run(end(app))
    return load(app.directory)


def contents(app):
    """Return the files of the pool with what is in them."""
    pool = app.pools["default"].dir_path
    return {
        str(path.relative_to(pool)): path.read_bytes()
        for path in sorted(pool.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def notes(app):
    return list(app.journal.directory.glob("*"))


def names(app):
    return sorted(vm.name for vm in app.domains)


def put(app, vid, suffix=".img", data=b"precious"):
    path = app.pools["default"].dir_path / f"{vid}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# refused creations


@pytest.mark.parametrize("suffix", [".img", "-dirty.img"])
@pytest.mark.parametrize("volume", ["root", "private", "volatile"])
@pytest.mark.parametrize("cls", ["AppVM", "StandaloneVM", "TemplateVM"])
def test_what_is_there_is_refused_by_its_file_and_stays(app, cls, volume, suffix):
    prefix = "vm-templates" if cls == "TemplateVM" else "appvms"
    path = put(app, f"{prefix}/work/{volume}", suffix)
    put(app, f"{prefix}/work/{volume}", ".img.1@2020-01-01T00:00:00Z")
    before = contents(app)
    with pytest.raises(VolumeExistsError, match=f"{path} is there already"):
        asyncio.run(make(app, cls))
    assert contents(app) == before
    assert names(app) == ["dom0", "tiny"]
    assert notes(app) == []


@pytest.mark.parametrize("volume", ["root", "private", "volatile"])
def test_so_it_is_for_a_disposable_vm(app, volume):
    async def refused():
        base = await make(app, name="base", template_for_dispvms=True)
        put(app, f"appvms/one/{volume}")
        before = contents(app)
        with pytest.raises(VolumeExistsError):
            await app.create_vm("DispVM", name="one", label="red", template=base)
        return before

    before = asyncio.run(refused())
    assert contents(app) == before
    assert "one" not in names(app)


@pytest.mark.parametrize("volume", ["root", "private", "volatile"])
def test_so_it_is_for_a_clone(app, volume):
    async def refused():
        work = await make(app)
        put(app, f"appvms/copy/{volume}")
        before = contents(app)
        with pytest.raises(VolumeExistsError):
            await app.clone_vm(work, "copy")
        return before

    before = asyncio.run(refused())
    assert contents(app) == before
    assert names(app) == ["dom0", "tiny", "work"]


def test_a_clone_that_is_refused_leaves_what_lies_under_its_name(app, monkeypatch):
    work = asyncio.run(make(app))
    monkeypatch.setattr(type(work), "is_halted", lambda vm: vm is not work)
    put(app, "appvms/copy/private")
    before = contents(app)
    with pytest.raises(exc.QubesVMNotHaltedError):
        asyncio.run(app.clone_vm(work, "copy"))
    assert contents(app) == before
    assert names(app) == ["dom0", "tiny", "work"]


def test_a_vm_that_was_never_made_takes_nothing_along(app):
    put(app, "appvms/idle/private")
    before = contents(app)
    vm = app.add_new_vm("AppVM", name="idle", label="red", template="tiny")
    asyncio.run(app.domains.remove(vm))
    assert contents(app) == before
    assert asyncio.run(app.find_orphans(app.pools["default"])) == [
        "appvms/idle/private"
    ]


def test_creating_does_not_fail_because_a_directory_is_there(app):
    (app.pools["default"].dir_path / "appvms" / "work").mkdir(parents=True)
    assert asyncio.run(make(app)).name == "work"


# creations that fail


def failing(monkeypatch, method, number):
    """Have the call of that number of a volume's method fail."""
    right, calls = getattr(ImageVolume, method), []

    async def wrong(self, *args):
        calls.append(self)
        if len(calls) > number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return await right(self, *args)

    monkeypatch.setattr(ImageVolume, method, wrong)


def way(app, how):
    return make(app) if how == "create" else app.clone_vm(app.domains["old"], "work")


STEPS = [
    ("create", "create", 0),
    ("create", "create", 1),
    ("clone", "create", 0),
    ("clone", "create", 1),
    ("clone", "import_volume", 0),
]


@pytest.mark.parametrize(("how", "method", "number"), STEPS)
def test_a_volume_that_cannot_be_made_leaves_nothing(
    app, monkeypatch, how, method, number
):
    asyncio.run(make(app, name="old"))
    before = contents(app)
    failing(monkeypatch, method, number)
    with pytest.raises((exc.QubesVMError, OSError), match="No space left"):
        asyncio.run(way(app, how))
    assert contents(app) == before
    assert names(app) == ["dom0", "old", "tiny"]
    assert notes(app) == []
    monkeypatch.undo()
    asyncio.run(way(app, how))


@pytest.mark.parametrize("how", ["create", "clone"])
def test_a_handler_that_fails_leaves_nothing(app, how):
    old = asyncio.run(make(app, name="old"))
    before = contents(app)

    def refuse(*_args, **_kwargs):
        raise exc.QubesException("not today")

    def listen(_app, _event, vm, **_kwargs):
        vm.add_handler("domain-create-on-disk", refuse)
        vm.add_handler("domain-clone-files", refuse)

    app.add_handler("domain-add", listen)
    with pytest.raises(exc.QubesException, match="not today"):
        asyncio.run(way(app, how))
    assert contents(app) == before
    assert names(app) == ["dom0", old.name, "tiny"]


@pytest.mark.parametrize("how", ["create", "clone"])
def test_a_save_that_fails_leaves_nothing(app, how, monkeypatch):
    asyncio.run(make(app, name="old"))
    before, store = contents(app), app.store.path.read_bytes()

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(app.store, "_replace", full)
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(way(app, how))
    monkeypatch.undo()
    assert contents(app) == before
    assert app.store.path.read_bytes() == store
    app.save()
    assert notes(app) == []


def test_a_save_that_fails_when_the_store_is_new_leaves_no_vm_without_volumes(
    app, monkeypatch
):
    right = app.store._replace

    def late(data):
        right(data)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(app.store, "_replace", late)
    with pytest.raises(OSError, match="Input/output error"):
        asyncio.run(make(app))
    assert b"work" in app.store.path.read_bytes()
    loaded = again(app)
    assert names(loaded) == ["dom0", "tiny"]
    assert loaded.problems == []
    asyncio.run(end(loaded))


def test_a_creation_of_which_no_note_can_be_made_is_refused(app, monkeypatch):
    before = contents(app)

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(app.journal, "begin", full)
    with pytest.raises(exc.QubesVMError, match="No space left on device"):
        asyncio.run(make(app))
    assert contents(app) == before
    assert names(app) == ["dom0", "tiny"]


@pytest.mark.parametrize("how", ["create", "clone"])
def test_one_that_is_given_up_leaves_nothing_or_a_whole_vm(app, how):
    async def give_up(turns):
        making = asyncio.ensure_future(way(app, how))
        for _ in range(turns):
            await asyncio.sleep(0)
        making.cancel()
        await asyncio.wait([making])
        return making.cancelled()

    asyncio.run(make(app, name="old"))
    before = contents(app)
    for turns in range(0, 60, 3):
        assert asyncio.run(give_up(turns))
        assert contents(app) == before, turns
        assert names(app) == ["dom0", "old", "tiny"]
        assert notes(app) == []


# while one is being made


def test_the_store_learns_of_a_vm_when_its_volumes_are_there(app, tmp_path):
    stores = []

    async def look(*_args, **_kwargs):
        await app.save_async()
        stores.append((tmp_path / "qubes.xml").read_text())
        for name in ("default_template", "default_netvm"):
            with pytest.raises(exc.QubesVMError, match="new is being made"):
                setattr(app, name, "new")
        with pytest.raises(exc.QubesVMError, match="new is being made"):
            await app.domains.remove("new")
        with pytest.raises(exc.QubesVMError, match="new is being made"):
            await app.domains["new"].start()

    app.add_handler(
        "domain-add",
        lambda _app, _event, vm, **_kwargs: vm.add_handler(
            "domain-create-on-disk", look
        ),
    )
    asyncio.run(make(app, "TemplateVM", name="new"))
    assert len(stores) == 1
    assert "new" not in stores[0]
    assert ">new<" in (tmp_path / "qubes.xml").read_text()
    assert notes(app) == []


# removals


def test_a_removal_that_fails_keeps_the_vm_and_says_why(app, monkeypatch):
    vm = asyncio.run(make(app))
    before = contents(app)
    failing(monkeypatch, "remove", 0)
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(app.domains.remove(vm))
    assert vm in app.domains
    assert contents(app) == before
    assert notes(app) == []
    monkeypatch.undo()
    asyncio.run(app.domains.remove(vm))
    assert not any("work" in name for name in contents(app))


def test_a_vm_that_stays_with_all_it_keeps_stays_for_good(app):
    """Although what keeps nothing, root and volatile, was removed."""

    async def fail():
        vm = await make(app)
        await vm.volumes["private"].start()
        with pytest.raises(StoragePoolException, match="started"):
            await app.domains.remove(vm)
        await vm.volumes["private"].stop()

    asyncio.run(fail())
    app.save()
    assert notes(app) == []
    loaded = again(app)
    assert names(loaded) == ["dom0", "tiny", "work"]
    asyncio.run(loaded.domains["work"].storage.verify())
    asyncio.run(end(loaded))


def test_so_does_one_whose_pool_went_away_and_came_back(app):
    vm = asyncio.run(make(app))
    pool = app.pools["default"].dir_path
    pool.rename(pool.with_name("elsewhere"))
    with pytest.raises(VolumeError, match=r"remove .* directory is absent"):
        asyncio.run(app.domains.remove(vm))
    pool.with_name("elsewhere").rename(pool)
    app.save()
    loaded = again(app)
    assert names(loaded) == ["dom0", "tiny", "work"]
    asyncio.run(loaded.domains["work"].storage.verify())
    asyncio.run(end(loaded))


def test_one_that_fails_half_way_is_finished_at_the_next_start(app, monkeypatch):
    vm = asyncio.run(make(app, "StandaloneVM"))
    failing(monkeypatch, "remove", 1)
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(app.domains.remove(vm))
    monkeypatch.undo()
    assert vm in app.domains
    app.save()
    assert len(notes(app)) == 1
    loaded = again(app)
    assert names(loaded) == ["dom0", "tiny"]
    assert not any("work" in name for name in contents(loaded))
    assert notes(loaded) == []
    asyncio.run(end(loaded))


def test_a_handler_that_fails_when_a_vm_is_gone_leaves_no_note_behind(app):
    """One would have the next start remove what has the volume's name by then."""
    vm = asyncio.run(make(app))

    def fail(*_args, **_kwargs):
        raise RuntimeError("a handler's own")

    app.add_handler("domain-delete", fail)
    with pytest.raises(RuntimeError, match="a handler's own"):
        asyncio.run(app.domains.remove(vm))
    app.remove_handler("domain-delete", fail)
    assert names(app) == ["dom0", "tiny"]
    app.save()
    assert notes(app) == []
    put(app, "appvms/work/private")
    loaded = again(app)
    assert contents(loaded)["appvms/work/private.img"] == b"precious"
    asyncio.run(end(loaded))


def test_two_removals_at_once_are_one(app):
    async def both():
        vm = await make(app)
        await asyncio.gather(app.domains.remove(vm), app.domains.remove(vm))

    asyncio.run(both())
    assert names(app) == ["dom0", "tiny"]


def test_the_name_is_free_when_nothing_is_left(app):
    async def scenario():
        vm = await make(app)
        removal = asyncio.ensure_future(app.domains.remove(vm))
        await asyncio.sleep(0)
        with pytest.raises(exc.QubesValueError, match="already"):
            await make(app)
        with pytest.raises(exc.QubesVMError, match="work is being removed"):
            app.domains["tiny"].netvm = vm
        await removal
        await make(app)

    asyncio.run(scenario())
    assert "appvms/work/private.img" in contents(app)


def test_no_vm_goes_while_a_volume_gets_new_content(app):
    async def scenario():
        vm = await make(app)
        async with vm.storage.importing(vm.volumes["private"], 8) as path:
            with pytest.raises(exc.QubesVMInUseError, match="being replaced"):
                await app.domains.remove(vm)
            path.write_bytes(b"12345678")
        await app.domains.remove(vm)

    asyncio.run(scenario())
    assert not any("work" in name for name in contents(app))


# orphans


def test_orphans_are_found_taken_over_and_removed(app):
    async def scenario():
        pool = app.pools["default"]
        await make(app)
        put(app, "appvms/lost/private")
        put(app, "appvms/lost/root")
        orphans = await app.find_orphans(pool)
        with pytest.raises(VolumeExistsError, match=r"lost/root\.img"):
            await make(app, name="lost", adopt=True)  # an AppVM keeps no root
        await app.remove_orphan(pool, "appvms/lost/root")
        vm = await make(app, name="lost", adopt=True)
        for vid in ("appvms/work/private", "appvms/none/private"):
            with pytest.raises(exc.QubesValueError, match="without a VM"):
                await app.remove_orphan(pool, vid)
        return orphans, vm

    orphans, vm = asyncio.run(scenario())
    assert orphans == ["appvms/lost/private", "appvms/lost/root"]
    assert asyncio.run(app.find_orphans(app.pools["default"])) == []
    assert contents(app)["appvms/lost/private.img"] == b"precious"
    assert vm.volumes["private"].size == len(b"precious")


@pytest.mark.parametrize("first", ["removed", "taken over"])
def test_an_orphan_is_removed_or_taken_over_but_not_both(app, monkeypatch, first):
    """Whoever comes first: a VM is not left without the volume that it relies on."""
    removes = ImageVolume._remove_all

    async def scenario():
        pool = app.pools["default"]
        path = put(app, "appvms/lost/private")
        slow = threading.Event()
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def remove(volume):
            loop.call_soon_threadsafe(begun.set)
            assert slow.wait(300)
            removes(volume)

        monkeypatch.setattr(ImageVolume, "_remove_all", remove)
        if first == "removed":
            removing = asyncio.ensure_future(
                app.remove_orphan(pool, "appvms/lost/private")
            )
            await begun.wait()
            making = asyncio.ensure_future(make(app, name="lost", adopt=True))
            # as far as it gets, and that is to the volume's turn
            await asyncio.wait([making], timeout=0.2)
            slow.set()
            await asyncio.gather(removing, making)
        else:
            making = asyncio.ensure_future(make(app, name="lost", adopt=True))
            await asyncio.sleep(0)
            slow.set()
            with pytest.raises(exc.QubesValueError, match="without a VM"):
                await app.remove_orphan(pool, "appvms/lost/private")
            await making
        await app.domains["lost"].storage.verify()
        assert (path.read_bytes() == b"precious") == (first == "taken over")

    asyncio.run(scenario())
    assert app.pools.volumes_going == set()


def test_what_was_taken_over_survives_a_creation_that_fails(app, monkeypatch):
    put(app, "appvms/work/private")
    before = contents(app)
    failing(monkeypatch, "create", 0)
    with pytest.raises(exc.QubesVMError, match="could not be made in pool"):
        asyncio.run(make(app, adopt=True))
    assert contents(app) == before


# pools


def test_a_pool_has_one_owner(app, tmp_path):
    pool = ReflinkPool(name="second", dir_path=tmp_path / "pool", setup_check=False)
    before = contents(app)
    with pytest.raises(StoragePoolException, match="is in use by another server"):
        asyncio.run(app.add_pool(pool))
    assert list(app.pools) == ["default"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "qubes.xml").write_bytes(app.store.path.read_bytes())
    with pytest.raises(StoreError, match="is in use by another server"):
        load(other)
    assert contents(app) == before
    asyncio.run(end(app))
    asyncio.run(end(load(other)))


def test_a_pool_that_is_not_ready_keeps_no_other_from_being_owned(app, tmp_path):
    asyncio.run(make(app))
    asyncio.run(
        app.add_pool(driver="file", name="away", dir_path=str(tmp_path / "disk"))
    )
    app.save()
    asyncio.run(end(app))
    shutil.rmtree(tmp_path / "disk")
    (tmp_path / "disk").write_text("no directory")
    loaded = load(tmp_path)
    assert "pool away is not ready" in loaded.problems[0]
    with pytest.raises(StoragePoolException, match="in use by another server"):
        asyncio.run(
            loaded.add_pool(driver="file", name="x", dir_path=tmp_path / "pool")
        )
    asyncio.run(end(loaded))


def test_a_directory_that_is_no_pool_loses_nothing(app, tmp_path):
    theirs = tmp_path / "theirs"
    files = {
        "appvms/work/private-import.img",
        "appvms/work/private.img~0123abcd",
        "appvms/work/private.img~0123abcd.removed",
        "photos/2020/cat-cow.img.old",
        ".reflink-check~0123abcd",
    }
    for name in files:
        path = theirs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"precious")

    def left():
        return {
            str(path.relative_to(theirs))
            for path in theirs.rglob("*")
            if path.is_file()
        } - {".lock"}

    async def scenario():
        for _ in range(2):
            pool = await app.add_pool(
                driver="file", name="theirs", dir_path=str(theirs)
            )
            await pool.settled()
            assert left() == files
            await app.remove_pool("theirs")

    asyncio.run(scenario())
    assert left() == files


def test_a_pool_that_is_refused_leaves_no_directory(app, tmp_path, monkeypatch):
    monkeypatch.setattr("qubes_storage.ficlone.supports_reflink", lambda _path: False)
    wanted = {"name": "new", "dir_path": str(tmp_path / "a" / "b")}
    with pytest.raises(StoragePoolException, match="no reflinks"):
        asyncio.run(app.add_pool(driver="file-reflink", **wanted))
    assert not (tmp_path / "a").exists()


# the journal


def test_a_note_that_cannot_be_read_is_told_and_stays(app):
    app.journal.directory.mkdir(exist_ok=True)
    note = app.journal.directory / "x.json"
    note.write_text('{"action": "make"}')
    with pytest.raises(StoreError, match=r"x\.json .*cannot be read"):
        again(app)
    assert note.exists()


# the end of the process at any moment

#: What changes names or files, as Python's audit hooks call it.
_CHANGES = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _kill_at(number):
    """Have this process end by SIGKILL before the change of that number."""
    left = [number]

    def hook(event, args):
        if event in _CHANGES or (event == "open" and (args[2] or 0) & _WRITING):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


async def _clone(app):
    return await app.clone_vm(app.domains["old"], "new")


async def _create(app):
    return await make(app, name="new")


async def _remove(app):
    await app.domains.remove("old")
    await app.save_async()


def _ends_by_itself(directory, operation, number):
    """Do it in a process that is killed; tell whether it came to its end."""
    pid = os.fork()
    if not pid:
        try:
            app = load(directory)
            _kill_at(number)
            asyncio.run(operation(app))
            os._exit(0)
        finally:
            os._exit(3)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), "the operation failed"
    return code == 0


@pytest.mark.parametrize("operation", [_create, _clone, _remove])
def test_a_kill_at_any_moment_leaves_no_vm_or_a_whole_one(app, operation):
    """At every change of a name or a file, one after another."""
    asyncio.run(make(app, name="old"))
    asyncio.run(end(app))
    name = "old" if operation is _remove else "new"
    for number in range(200):
        ended = _ends_by_itself(app.directory, operation, number)
        found = load(app.directory)
        there = name in found.domains
        if ended:
            assert there is not (operation is _remove)
        orphans = asyncio.run(found.find_orphans(found.pools["default"]))
        assert orphans == [], number
        assert found.problems == []
        assert notes(found) == []
        if there:
            asyncio.run(found.domains[name].storage.verify())
        asyncio.run(_begin_again(found, name))
        asyncio.run(end(found))
        if ended:
            assert number > 10
            return
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("operation", [_create, _clone, _remove])
def test_a_disk_that_is_full_at_any_moment_leaves_no_vm_or_a_whole_one(app, operation):
    """At every call that changes something, of the store, its journal and the pool."""
    asyncio.run(make(app, name="old"))
    asyncio.run(end(app))
    name = "old" if operation is _remove else "new"
    for nth in range(1, 200):
        running = load(app.directory)
        with failing_call(app.directory, nth) as fault:
            failed = _fails(running, operation)
        # who goes on at once sees the same as who comes next
        for _ in range(2):
            there = name in running.domains
            assert asyncio.run(running.find_orphans(running.pools["default"])) == []
            assert running.problems == [], fault.hit
            # a removal that got half way is finished by the next server
            if there and not (operation is _remove and notes(running)):
                asyncio.run(running.domains[name].storage.verify())
            assert failed or there is not (operation is _remove), fault.hit
            running = again(running)
        assert notes(running) == []
        asyncio.run(_begin_again(running, name))
        asyncio.run(end(running))
        if fault.hit is None:
            assert nth > 10
            return
    raise AssertionError("it never came to its end")


def _fails(app, operation):
    try:
        asyncio.run(operation(app))
    except (exc.QubesException, StoragePoolException, StoreError, OSError):
        return True
    return False


async def _begin_again(app, name):
    if name == "new" and name in app.domains:
        await app.domains.remove(name)
        await app.save_async()
    elif name == "old" and name not in app.domains:
        await make(app, name="old")
