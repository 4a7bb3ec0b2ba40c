"""What is saved is what is loaded, whatever was set before."""

import asyncio
import contextlib
import os
import random
import select
import signal
import sys
import tempfile
import threading
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from qubes_itests.core import exc
from qubes_itests.core.app import VM_CLASSES, Qubes
from qubes_itests.core.device.assignment import DeviceAssignment
from qubes_itests.core.device.port import Port, VirtualDevice
from qubes_itests.core.store.file import StoreError
from qubes_storage.reflink import ReflinkPool

KILLS = 40

WEIRD = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["", " ", "\r\n", "]]>", "&amp;", "<!--", "\t'\"", "None", "\x85\u2028"]
)
NAMES = [f"vm{number}" for number in range(6)]
#: Something that one property or the other takes.
VALUES = st.one_of(
    st.sampled_from(NAMES),
    st.booleans(),
    st.none(),
    st.integers(-1, 9000),
    st.sampled_from(["red", "hvm", "10.137.0.9", "00:16:3e:5e:6c:01", "default"]),
    WEIRD,
)
VM = st.tuples(st.sampled_from(sorted(VM_CLASSES)), st.sampled_from(NAMES))
# which VM (or the app), which of its settable properties, by their numbers
SETTING = st.tuples(st.integers(0, 6), st.integers(0, 60), VALUES)
FEATURE = st.tuples(st.integers(0, 6), st.sampled_from("abc"), WEIRD)
TAG = st.tuples(st.integers(0, 6), st.sampled_from(["x", "y-1", "Z_2"]))
DEVICE = st.tuples(
    st.integers(0, 6), st.integers(0, 6), st.sampled_from(["sda", "*"]), WEIRD
)


def with_pool(directory):
    app = Qubes(directory / "qubes.xml", load=False)
    pool = ReflinkPool(name="default", dir_path=directory / "pool", setup_check=False)
    asyncio.run(app.add_pool(pool))
    return app


def load(app, **options):
    path = app.store.path
    return asyncio.run(
        Qubes.open(path, hypervisor=None, directory=path.parent, **options)
    )


def nth(app, number):
    return list(app.domains)[number % len(app.domains)]


def populate(app, vms):
    """Add VMs of all classes, as far as they can be."""
    for klass, name in vms:
        bases = [vm.name for vm in app.domains if vm.klass == "AppVM"]
        template = bases[0] if klass == "DispVM" and bases else "tiny"
        extra = {"template": template} if klass in ("AppVM", "DispVM") else {}
        if bases and klass == "DispVM":
            app.domains[template].template_for_dispvms = True
        with contextlib.suppress(exc.QubesException):
            app.add_new_vm(klass, name=name, label="red", **extra)


def change(app, number, which, value):
    """Set, or reset, any property of any VM or of the app; it may refuse."""
    holder = app if number == len(NAMES) else nth(app, number)
    properties = holder.property_list()
    prop = properties[which % len(properties)]
    # what disposable VMs are with it is not there after a load
    if prop.name == "auto_cleanup":
        return
    with contextlib.suppress(exc.QubesException):
        if value == "default":
            delattr(holder, prop.name)
        else:
            setattr(holder, prop.name, value)


def assign(app, frontend, backend, port, option):
    device = VirtualDevice(Port(nth(app, backend), port, "block"))
    with contextlib.suppress(exc.QubesException, ValueError):
        assignment = DeviceAssignment(device, None, {"o": option}, "auto-attach")
        asyncio.run(nth(app, frontend).devices["block"].assign(assignment))


def snapshot(app):
    """Return all that must come back, without the store's own help."""
    return {
        "app": set_properties(app),
        "pools": {name: pool.config for name, pool in app.pools.items()},
        "vms": {vm.name: (vm.klass, *state(vm)) for vm in app.domains},
    }


def set_properties(holder):
    values = {
        prop.name: getattr(holder, prop.name)
        for prop in holder.property_list()
        if not holder.property_is_default(prop)
    }
    return {name: (type(v).__name__, str(v)) for name, v in values.items()}


def state(vm):
    volumes = getattr(vm, "volumes", {})
    return (
        set_properties(vm),
        dict(vm.features),
        set(vm.tags),
        vm.firewall.rules,
        vm.notes,
        {name: volume.config for name, volume in volumes.items()},
        {
            (str(a), a.mode, tuple(a.options.items()))
            for a in vm.devices["block"].get_assigned_devices()
        },
    )


@pytest.mark.parametrize("value", [None, ""])
def test_text_that_is_none_comes_back(tmp_path, value):
    """None is written as empty text, and so empty text is None."""
    app = with_pool(tmp_path)
    app.add_new_vm("RemoteVM", name="far", label="red", remote_name=value)
    app.save(lock=False)
    assert app.domains["far"].remote_name is None
    assert load(app).domains["far"].remote_name is None


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.lists(VM, max_size=8),
    st.lists(SETTING, max_size=25),
    st.lists(FEATURE, max_size=5),
    st.lists(TAG, max_size=5),
    st.lists(DEVICE, max_size=3),
)
def test_any_state_comes_back(vms, settings, features, tags, devices):
    """Equal state, and equal bytes when it is saved again."""
    with tempfile.TemporaryDirectory() as directory:
        app = with_pool(Path(directory))
        app.add_new_vm("TemplateVM", name="tiny", label="black")
        populate(app, vms)
        for setting in settings:
            change(app, *setting)
        for number, name, value in features:
            with contextlib.suppress(exc.QubesException):
                nth(app, number).features[name] = value
        for number, tag in tags:
            nth(app, number).tags.add(tag)
        for device in devices:
            assign(app, *device)
        app.save(lock=False)
        saved = app.store.path.read_bytes()
        loaded = load(app)
        assert snapshot(loaded) == snapshot(app)
        loaded.save(lock=False)
        assert app.store.path.read_bytes() == saved


@pytest.fixture
def app(tmp_path):
    app = with_pool(tmp_path)
    tiny = app.add_new_vm("TemplateVM", name="tiny", label="black")
    app.add_new_vm("AppVM", name="work", label="red", template=tiny)
    return app


def test_volumes_keep_what_was_changed(app):
    work = app.domains["work"]
    work.volumes["private"].revisions_to_keep = 7
    work.volumes["private"].rw = False
    asyncio.run(app.domains["tiny"].create_on_disk())
    asyncio.run(work.create_on_disk())
    asyncio.run(work.storage.resize("private", 3 * 1024**3))
    app.save(lock=False)
    loaded = load(app).domains["work"]
    private = loaded.volumes["private"]
    assert private.revisions_to_keep == 7
    assert private.rw is False
    assert private.size == 3 * 1024**3
    assert loaded.volumes["root"].source is loaded.template.volumes["root"]
    asyncio.run(loaded.storage.verify())


def test_two_apps_do_not_lose_each_others_changes(app):
    app.save(lock=False)
    other = load(app)
    app.domains["work"].memory = 500
    app.save(lock=False)
    other.domains["work"].vcpus = 2
    with pytest.raises(StoreError, match="repeat your changes"):
        other.save()
    assert load(app).domains["work"].memory == 500


@pytest.mark.asyncio
async def test_save_async_keeps_the_order_of_changes(app):
    saves = []
    for memory in range(300, 310):
        app.domains["work"].memory = memory
        saves.append(app.save_async(lock=False))
    await asyncio.gather(*saves)
    options = {"hypervisor": None, "directory": app.directory}
    loaded = await Qubes.open(app.store.path, **options)
    assert loaded.domains["work"].memory == 309


def test_listeners_are_told_once_it_is_saved(app):
    seen = []
    app.add_handler("app-saved", lambda *_args: seen.append(app.store.path.exists()))
    app.save()
    assert seen == [True]
    app.close()
    load(app, lock=True).store.release()


def test_app_without_a_store_saves_nothing(tmp_path):
    app = Qubes(hypervisor=None, directory=tmp_path)
    before = set(tmp_path.iterdir())
    app.save()
    asyncio.run(app.save_async())
    assert set(tmp_path.iterdir()) == before


def _change_and_save_for_ever(app, report):
    number = int(app.domains["work"].features.get("number", 0))
    while True:
        number += 1
        app.domains["work"].features["number"] = str(number)
        app.domains["tiny"].notes = "x" * (number * 997 % 20_000)
        app.save()
        os.write(report, b"%d\n" % number)


def test_killed_app_comes_back_with_all_that_it_saved(app):
    """The file is a whole state after each kill, and not an older one."""
    chance = random.Random(5)  # noqa: S311 - repeatable, not secret
    app.save(lock=False)
    for _ in range(KILLS):
        reader, writer = os.pipe()
        child = load(app)
        pid = os.fork()
        if not pid:
            try:
                _change_and_save_for_ever(child, writer)
            finally:
                sys.stderr.flush()
                os._exit(1)
        os.close(writer)
        select.select([reader], [], [], 300)
        threading.Event().wait(chance.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reader, "rb") as reports:
            promised = int(reports.read().split()[-1])
        found = int(load(app).domains["work"].features["number"])
        assert found in (promised, promised + 1)
