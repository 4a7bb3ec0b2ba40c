"""Disposable VMs, removal, clones and names, on the scripted hypervisor."""

import asyncio
import uuid

import pytest
import pytest_asyncio
from scripted_app import make_app, make_vm

from qubes_itests.compat_core2 import VMWrapper
from qubes_itests.core import exc
from qubes_itests.core.app import Qubes
from qubes_itests.core.device.assignment import DeviceAssignment
from qubes_itests.core.device.port import Port, VirtualDevice
from qubes_itests.core.store.file import StoreFile
from qubes_itests.core.store.journal import Journal
from qubes_itests.core.vm.appvm import AppVM
from qubes_itests.core.vm.boot_data import qubesdb_entries
from qubes_itests.core.vm.dispvm import DispVM
from qubes_storage.exc import StoragePoolException
from qubes_storage.reflink import ReflinkPool


@pytest_asyncio.fixture
async def app(tmp_path):
    return await make_app(tmp_path)


@pytest_asyncio.fixture
async def base(app):
    base = await make_vm(app, "AppVM", "base", template_for_dispvms=True)
    app.default_dispvm = base
    return base


@pytest.fixture
def told(app):
    """Collect what the app and its VMs tell of their ends."""
    told = []
    app.add_handler("domain-delete", lambda _, event, vm: told.append((vm.name, event)))
    app.add_handler(
        "domain-add",
        lambda _, _event, vm: vm.add_handler(
            "domain-*", lambda vm, event, **_: told.append((vm.name, event))
        ),
    )
    return told


def files(app):
    """Return the directories of VMs that have images."""
    pool = app.pools["default"].dir_path
    return sorted(p.parent.name for p in pool.rglob("*.img*"))


def gone(app, vm, told):
    names = [event for name, event in told if name == vm.name]
    return (
        vm not in app.domains
        and app.hypervisor.domains() == ()
        and vm.name not in files(app)
        and names.count("domain-delete") == 1
        and names.count("domain-remove-from-disk") == 1
        and app.problems == []
    )


@pytest.mark.asyncio
async def test_it_takes_after_its_template(app, base):
    base.memory, base.kernelopts, base.autostart = 300, "quiet", True
    base.features["service.x"] = True
    base.tags.add("sort")
    vm = await DispVM.from_appvm(base)
    assert vm.name == f"disp{vm.dispid}"
    assert (vm.memory, vm.kernelopts, vm.label.name) == (300, "quiet", "red")
    assert (vm.auto_cleanup, vm.autostart, vm.include_in_backups) == (
        True,
        False,
        False,
    )
    assert not hasattr(vm, "template_for_dispvms")
    assert vm.default_dispvm is base
    assert (dict(vm.features), set(vm.tags)) == (dict(base.features), {"sort"})
    assert vm.volumes["root"].source == app.default_template.volumes["root"]
    assert vm.volumes["private"].source == base.volumes["private"]
    assert not any(v.save_on_stop for v in vm.volumes.values())
    assert qubesdb_entries(vm)["/qubes-vm-persistence"] == "none"


@pytest.mark.asyncio
async def test_what_is_given_goes_before_what_is_taken(base):
    base.memory = 300
    vm = await DispVM.from_appvm(base, memory=200, label="blue", name="sys-disp")
    assert (vm.name, vm.memory, vm.label.name) == ("sys-disp", 200, "blue")


@pytest.mark.asyncio
async def test_without_a_template_it_is_made_from_the_default(app, base):
    assert app.add_new_vm("DispVM", name="named", label="red").template is base
    app.default_dispvm = None
    with pytest.raises(exc.QubesNoTemplateError, match="set that, or name a template"):
        app.add_new_vm("DispVM", name="other", label="red")
    assert "other" not in app.domains


@pytest.mark.asyncio
async def test_its_template_must_be_meant_for_it(app, base):
    plain = await make_vm(app, "AppVM", "plain")
    with pytest.raises(exc.QubesPropertyValueError, match="template_for_dispvms"):
        app.add_new_vm("DispVM", template=plain)
    with pytest.raises(exc.QubesPropertyValueError, match="is no AppVM"):
        app.add_new_vm("DispVM", template="tiny")
    with pytest.raises(exc.QubesException, match="is no template for disposable VMs"):
        await DispVM.from_appvm(plain)
    vm = await DispVM.from_appvm(base)
    with pytest.raises(exc.QubesVMInUseError, match=f"{vm.name} are made from it"):
        base.template_for_dispvms = False
    with pytest.raises(exc.QubesVMInUseError, match=f"{vm.name} are made from it"):
        del base.template_for_dispvms
    with pytest.raises(exc.QubesVMInUseError, match=vm.name):
        del app.domains[base]


@pytest.mark.asyncio
async def test_what_is_a_default_dispvm_remains_fit_for_it(app, base):
    """The app could be saved otherwise, but not loaded."""
    work = await make_vm(app, "AppVM", "work", default_dispvm=base)
    for user in (work, app):
        with pytest.raises(exc.QubesVMInUseError, match=f"default_dispvm of.* {user}"):
            base.template_for_dispvms = False
        with pytest.raises(exc.QubesVMInUseError, match=f"default_dispvm of.* {user}"):
            del base.template_for_dispvms
        user.default_dispvm = None
    del base.template_for_dispvms


@pytest.mark.parametrize("cls", ["TemplateVM", "StandaloneVM", "DispVM"])
@pytest.mark.usefixtures("base")
@pytest.mark.asyncio
async def test_disposable_vms_are_made_from_appvms_only(app, cls):
    """Others cannot even be meant for it, nor be the default."""
    vm = app.add_new_vm(cls, name="other", label="red")
    with pytest.raises(exc.QubesNoSuchPropertyError):
        vm.property_get_def("template_for_dispvms")
    with pytest.raises(exc.QubesPropertyValueError, match="has not template_for_disp"):
        app.default_dispvm = vm


async def shut_down(vm):
    await vm.shutdown(wait=True)


async def end_inside(vm):
    vm.domain.end()
    await vm.wait_ended(5)


async def kill(vm):
    await vm.kill()


async def clean_up(vm):
    await asyncio.gather(vm.cleanup(), vm.cleanup())


@pytest.mark.parametrize("end", [shut_down, end_inside, kill, clean_up])
@pytest.mark.asyncio
async def test_it_is_gone_after_its_end(app, base, told, end):
    vm = await DispVM.from_appvm(base)
    assert vm.name in app.domains
    await vm.start()
    await end(vm)
    assert gone(app, vm, told)


@pytest.mark.asyncio
async def test_it_is_gone_after_a_start_that_fails(app, base, told):
    vm = await DispVM.from_appvm(base)
    app.hypervisor.failing = {"enter"}
    with pytest.raises(exc.QubesVMStartError):
        await vm.start()
    assert gone(app, vm, told)


@pytest.mark.asyncio
async def test_it_is_gone_after_a_start_that_is_refused(app, base, told):
    vm = await DispVM.from_appvm(base)
    vm.features["prohibit-start"] = "repairs"
    with pytest.raises(exc.QubesVMError, match="repairs"):
        await vm.start()
    assert gone(app, vm, told)


@pytest.mark.asyncio
async def test_it_is_gone_after_a_start_that_is_killed(app, base, told):
    for turns in range(0, 200, 20):
        vm = await DispVM.from_appvm(base)
        starting = asyncio.ensure_future(vm.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        await vm.cleanup()
        await asyncio.wait([starting])
        starting.exception()
        assert gone(app, vm, told), turns


@pytest.mark.asyncio
async def test_it_is_gone_when_it_is_given_up_while_being_made(app, base):
    for turns in range(12):
        making = asyncio.ensure_future(DispVM.from_appvm(base))
        for _ in range(turns):
            await asyncio.sleep(0)
        making.cancel()
        await asyncio.wait([making])
    assert [vm.name for vm in app.domains if vm.klass == "DispVM"] == []
    assert not any(name.startswith("disp") for name in files(app))


@pytest.mark.asyncio
async def test_a_named_one_stays(app, base):
    vm = app.add_new_vm("DispVM", name="named", template=base)
    await vm.create_on_disk()
    await vm.start()
    await vm.kill()
    assert vm in app.domains
    await vm.cleanup()
    assert vm not in app.domains


@pytest.mark.asyncio
async def test_numbers_are_not_given_again_soon(app, base):
    numbers = [(await DispVM.from_appvm(base)).dispid for _ in range(3)]
    for number in numbers:
        await app.domains[f"disp{number}"].cleanup()
    numbers += [app.domains.get_new_unused_dispid() for _ in range(50)]
    assert len(set(numbers)) == len(numbers)
    assert all(1 <= number <= 9999 for number in numbers)


# names


@pytest.mark.parametrize(
    "name", ["disp1", "disp0042", "None", "DEFAULT", "dom0", "Domain-0", "x-dm"]
)
@pytest.mark.asyncio
async def test_names_that_are_reserved(app, name):
    with pytest.raises(exc.QubesValueError, match="reserved"):
        app.add_new_vm("AppVM", name=name, label="red")


@pytest.mark.parametrize("name", ["display", "disp-1", "sys-net", "disp"])
@pytest.mark.asyncio
async def test_names_that_look_like_reserved_ones(app, name):
    assert app.add_new_vm("AppVM", name=name, label="red").name == name


@pytest.mark.asyncio
async def test_a_name_is_for_ever(app):
    with pytest.raises(exc.QubesPropertyValueError, match="once and for all"):
        app.domains["tiny"].name = "other"


# remote VMs


@pytest.mark.asyncio
async def test_a_remote_vm_is_data(app):
    relay = await make_vm(app, "AppVM", "relay")
    vm = app.add_new_vm(
        "RemoteVM",
        name="far",
        label="red",
        relayvm=relay,
        transport_rpc="qubes.Ssh",
        remote_name="work",
    )
    assert (vm.relayvm, vm.transport_rpc, vm.remote_name) == (
        relay,
        "qubes.Ssh",
        "work",
    )
    assert vm.get_power_state() == "Halted"
    for call in (vm.start(), vm.kill(), vm.run("true")):
        with pytest.raises(exc.QubesVMError, match="is on another machine"):
            await call
    with pytest.raises(exc.QubesVMInUseError, match=r"far \(relayvm\)"):
        del app.domains[relay]
    await app.domains.remove(vm)
    assert "far" not in app.domains


# removal


@pytest.mark.asyncio
async def test_removal_takes_the_volumes_and_tells_of_it(app, told):
    vm = await make_vm(app, "AppVM", "work")
    assert "work" in files(app)
    await app.domains.remove("work")
    assert gone(app, vm, told)


@pytest.mark.asyncio
async def test_a_vm_that_runs_or_starts_is_not_removed(app):
    vm = await make_vm(app, "AppVM", "work")
    starting = asyncio.ensure_future(vm.start())
    await asyncio.sleep(0)
    with pytest.raises(exc.QubesVMNotHaltedError):
        del app.domains[vm]
    await starting
    with pytest.raises(exc.QubesVMNotHaltedError, match="shut it down before"):
        await app.domains.remove(vm)
    await vm.kill()
    await app.domains.remove(vm)


@pytest.mark.asyncio
async def test_handlers_may_object_to_a_removal(app):
    vm = await make_vm(app, "AppVM", "work")

    def object_(*_, **__):
        raise exc.QubesValueError("it is dear to me")

    app.add_handler("domain-pre-delete", object_)
    with pytest.raises(exc.QubesValueError, match="dear"):
        await app.domains.remove(vm)
    assert vm in app.domains
    assert "work" in files(app)


# on disk


@pytest.mark.asyncio
async def test_directories_that_are_there_do_not_matter(app):
    pool = app.pools["default"].dir_path
    for name in ("work", "copy"):
        (pool / "appvms" / name).mkdir(parents=True)
        (app.directory / "vms" / name).mkdir(parents=True)
    work = await make_vm(app, "AppVM", "work")
    # also of what stands for a VM, in tests that are no coroutines
    copy = await app.clone_vm(VMWrapper(work), "copy")
    assert type(copy) is type(work)
    await copy.start()
    await copy.kill()


@pytest.mark.parametrize("event", ["domain-create-on-disk", "domain-clone-files"])
@pytest.mark.asyncio
async def test_nothing_is_left_of_volumes_that_a_handler_objects_to(app, event):
    source = await make_vm(app, "AppVM", "source")

    def object_(*_, **__):
        raise exc.QubesValueError("no")

    app.add_handler("domain-add", lambda _, _event, vm: vm.add_handler(event, object_))
    clone = event == "domain-clone-files"
    making = app.clone_vm(source, "work") if clone else make_vm(app, "AppVM", "work")
    with pytest.raises(exc.QubesValueError, match="no"):
        await making
    assert "work" not in files(app)


@pytest.mark.asyncio
async def test_nothing_is_left_of_a_creation_that_fails_half_way(app):
    vm = app.add_new_vm("AppVM", name="work", label="red")
    vm.storage.init_volume("broken", {"size": 0, "rw": True, "save_on_stop": True})
    with pytest.raises(StoragePoolException, match="broken"):
        await vm.create_on_disk()
    assert "work" not in files(app)
    del app.domains[vm]


# clones


@pytest.mark.asyncio
async def test_a_clone_is_like_its_source(app):
    source = await make_vm(app, "AppVM", "work", memory=300, backup_timestamp=1)
    source.features["a"] = "b"
    source.tags.update(["x", "created-by-dom0"])
    copy = await app.clone_vm(source, "copy", vcpus=2)
    assert type(copy) is type(source)
    assert (copy.memory, copy.vcpus, copy.template) == (300, 2, source.template)
    assert copy.label == source.label
    assert copy.backup_timestamp is None
    assert (dict(copy.features), set(copy.tags)) == ({"a": "b"}, {"x"})
    assert copy.uuid != source.uuid
    assert copy.qid != source.qid
    assert {n: v.size for n, v in copy.volumes.items()} == {
        n: v.size for n, v in source.volumes.items()
    }
    await copy.start()
    await copy.kill()


@pytest.mark.asyncio
async def test_a_clone_is_of_the_class_of_its_source_whoever_has_written_that(app):
    class OwnVM(AppVM):
        pass

    source = await make_vm(app, OwnVM, "work")
    assert type(await app.clone_vm(source, "copy")) is OwnVM


@pytest.mark.asyncio
async def test_devices_are_cloned_and_keep_who_provides_them(app):
    source = await make_vm(app, "AppVM", "work")
    provider = await make_vm(app, "AppVM", "usb")
    device = VirtualDevice(Port(provider, "sda", "block"))
    assignment = DeviceAssignment(device, options={"read-only": "yes"}, mode="required")
    await source.devices["block"].assign(assignment)
    source.notes = "mine"
    source.firewall.rules = ["action=drop"]
    copy = await app.clone_vm(source, "copy")
    (cloned,) = copy.devices["block"].get_assigned_devices()
    assert (cloned.virtual_device, cloned.frontend_domain) == (device, copy)
    assert dict(cloned.options) == {"read-only": "yes"}
    assert (copy.notes, copy.firewall.rules) == ("mine", ["action=drop"])
    with pytest.raises(exc.QubesVMInUseError, match=r"work \(block device .*copy"):
        del app.domains[provider]


@pytest.mark.asyncio
async def test_a_clone_of_another_class_keeps_what_its_class_keeps(app):
    source = await make_vm(app, "AppVM", "work")
    alone = await app.clone_vm(source, "alone", cls="StandaloneVM")
    assert alone.volumes["root"].save_on_stop
    assert alone.volumes["root"].source is None
    assert alone.volumes["root"].size == source.volumes["root"].size
    await alone.start()
    await alone.kill()


@pytest.mark.asyncio
async def test_a_remote_vm_is_cloned_and_dom0_is_not(app):
    far = app.add_new_vm("RemoteVM", name="far", label="red", remote_name="work")
    assert (await app.clone_vm(far, "copy")).remote_name == "work"
    with pytest.raises(exc.QubesVMError, match="dom0 cannot be cloned"):
        await app.clone_vm(app.domains["dom0"], "other")


@pytest.mark.asyncio
async def test_nothing_is_left_of_a_clone_that_fails(app):
    source = await make_vm(app, "AppVM", "work")
    await source.start()
    with pytest.raises(exc.QubesVMNotHaltedError):
        await app.clone_vm(source, "copy")
    assert "copy" not in app.domains
    assert "copy" not in files(app)
    await source.kill()


@pytest.mark.asyncio
async def test_a_change_of_the_template_leaves_the_private_volume_alone(app, tmp_path):
    """It stays in the pool in which it was made."""
    second = ReflinkPool(name="second", dir_path=tmp_path / "2", setup_check=False)
    await app.add_pool(second)
    other = await make_vm(app, "TemplateVM", "other")
    vm = app.add_new_vm("AppVM", name="work", label="red")
    await vm.create_on_disk(pools={"private": "second"})
    vm.template = other
    assert vm.volumes["private"].pool is second
    assert vm.volumes["root"].source == other.volumes["root"]
    await vm.start()
    await vm.kill()


@pytest.mark.asyncio
async def test_volumes_of_disposable_vms_follow_the_template_of_their_template(
    app, base
):
    other = await make_vm(app, "TemplateVM", "other")
    vm = await DispVM.from_appvm(base)
    await vm.start()
    with pytest.raises(exc.QubesVMNotHaltedError):
        base.template = other
    vm.auto_cleanup = False
    await vm.kill()
    base.template = other
    assert vm.volumes["root"].source == other.volumes["root"]


# autostart


@pytest.mark.asyncio
async def test_autostart(app):
    """Each that is to start does, net VMs first, and one failure stops nobody."""
    net = await make_vm(app, "AppVM", "net", provides_network=True, autostart=True)
    for name in ("one", "two"):
        await make_vm(app, "AppVM", name, autostart=True)
    app.domains["one"].features["prohibit-start"] = "repairs"
    idle = await make_vm(app, "AppVM", "idle")
    failures = await app.start_autostart()
    assert list(failures) == ["one"]
    assert net.is_running()
    assert app.domains["two"].is_running()
    assert idle.is_halted()
    await app.kill_all()
    app.close()


@pytest.mark.asyncio
async def test_uuid_is_found(app, base):
    vm = await DispVM.from_appvm(base)
    assert app.domains[uuid.UUID(str(vm.uuid))] is vm


# the store


@pytest.mark.asyncio
async def test_named_ones_are_kept_in_the_store_and_others_are_not(app, base, tmp_path):
    """A disposable VM that is found after a crash is removed, with its volumes."""
    app.store = StoreFile(tmp_path / "qubes.xml")
    app.journal = Journal(app.store.path)
    named = app.add_new_vm("DispVM", name="named", template=base)
    await named.create_on_disk()
    left = await DispVM.from_appvm(base)
    app.add_new_vm("RemoteVM", name="far", label="red", relayvm=base, remote_name="x")
    app.save(lock=False)
    loaded = await Qubes.open(
        tmp_path / "qubes.xml",
        hypervisor=app.hypervisor,
        directory=tmp_path,
        kernels=app.kernels,
    )
    assert left.name not in loaded.domains
    assert left.name not in files(app)
    again = loaded.domains["named"]
    assert (again.template.name, again.dispid) == ("base", named.dispid)
    source = loaded.domains["base"].volumes["private"]
    assert again.volumes["private"].source is source
    far = loaded.domains["far"]
    assert (far.relayvm.name, far.remote_name) == ("base", "x")
    await again.start()
    await again.kill()
    assert loaded.problems == []


@pytest.mark.asyncio
async def test_the_default_of_who_asks_goes_first(app, base):
    other = await make_vm(app, "AppVM", "other", template_for_dispvms=True)
    work = await make_vm(app, "AppVM", "work", default_dispvm=other)
    assert app.dispvm_template(work) is other
    assert app.dispvm_template(VMWrapper(work)) is other
    assert app.dispvm_template(app.domains["dom0"]) is base
    work.default_dispvm = None
    with pytest.raises(exc.QubesNoTemplateError, match="default_dispvm of work is"):
        app.dispvm_template(work)
