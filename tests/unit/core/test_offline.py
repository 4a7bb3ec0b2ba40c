"""An app of a test's own: made by the arguments of Qubes OS, with no hypervisor."""

import asyncio
from pathlib import Path

import pytest

from qubes_itests.core.app import Qubes
from qubes_itests.core.exc import QubesException, QubesValueError
from qubes_itests.core.store.file import StoreError
from qubes_storage.reflink import ReflinkPool


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "qubes.xml")


@pytest.fixture
def made(path):
    app = Qubes.create_empty_store(path, default_kernel="some", offline_mode=True)
    directory = app.store.path.parent / "pool"
    pool = ReflinkPool(name="default", dir_path=directory, setup_check=False)
    asyncio.run(app.add_pool(pool))
    app.add_new_vm("TemplateVM", name="tiny", label="black")
    app.save(lock=False)
    return app


@pytest.mark.usefixtures("made")
def test_it_is_loaded_when_it_is_made(path):
    app = Qubes(path)
    assert app.vmm.offline_mode
    assert Path(app.store) == Path(path)
    assert (app.default_kernel, app.domains["tiny"].qid) == ("some", 1)
    seen = []
    app.add_handler("property-set:clockvm", lambda *_args, **_kwargs: seen.append(1))
    app.clockvm = "tiny"
    assert seen == [1]
    app.save(False)
    assert Qubes(path, True, True).clockvm.name == "tiny"
    app.close()


@pytest.mark.usefixtures("made")
def test_it_is_not_loaded_when_it_is_not_to_be(path):
    app = Qubes(path, load=False, offline_mode=True)
    assert app.domains.keys() == ["dom0"]
    app.load()
    assert app.domains.keys() == ["dom0", "tiny"]


def test_the_lock_is_held_until_it_is_closed(path, made, monkeypatch):
    monkeypatch.setattr("qubes_itests.core.store.file.LOCK_TIMEOUT", 0.1)
    app = Qubes(path, lock=True)
    with pytest.raises(StoreError, match="in use by process"):
        made.save()
    app.close()
    Qubes(path, lock=True).close()


def test_what_is_there_is_not_replaced(path, made):
    before = made.store.path.read_bytes()
    with pytest.raises(QubesException, match="already"):
        Qubes.create_empty_store(path)
    assert made.store.path.read_bytes() == before


def test_what_cannot_be(path):
    with pytest.raises(StoreError, match="the first save"):
        Qubes(path)
    with pytest.raises(QubesException, match="no store"):
        Qubes().load()
    with pytest.raises(QubesValueError, match="no hypervisor"):
        Qubes(offline_mode=False)
    with pytest.raises(QubesException, match="no_such"):
        Qubes(no_such=1)


@pytest.mark.asyncio
@pytest.mark.usefixtures("made")
async def test_no_vm_starts(path):
    app = await Qubes.open(path)
    with pytest.raises(QubesException, match="offline"):
        _ = app.vmm.libvirt_conn
    vm = await app.create_vm("StandaloneVM", name="work", label="red")
    assert (vm.is_running(), vm.get_power_state()) == (False, "Halted")
    with pytest.raises(QubesException, match="offline"):
        await vm.start()
    assert vm.is_halted()
    await app.kill_all()
    app.close()


def test_a_vm_that_was_never_started_has_no_qrexec(made):
    assert not made.domains["tiny"].is_qrexec_running()
