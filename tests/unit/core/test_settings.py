"""The settings of VMs: what each takes, refuses, and is by default."""

import pytest

from qubes_itests.core import exc
from qubes_itests.core.device.assignment import DeviceAssignment
from qubes_itests.core.device.port import Port, VirtualDevice
from qubes_itests.core.vm.boot_data import start_deadline


@pytest.fixture
def work(app, template):
    return app.add_new_vm("AppVM", name="work", label="red", template=template)


@pytest.fixture
def card(app):
    """Return a PCI device, as an assignment."""
    port = Port(app.domains["dom0"], "00_1f.2", "pci")
    return DeviceAssignment(VirtualDevice(port), mode="required")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory", 300),
        ("vcpus", 3),
        ("maxmem", 900),
        ("kernel", "other"),
        ("kernelopts", "quiet"),
        ("default_user", "root"),
        ("qrexec_timeout", 7),
        ("shutdown_timeout", 8),
        ("virt_mode", "hvm"),
    ],
)
def test_default_is_the_templates(app, work, template, name, value):
    app.kernels["other"] = None
    setattr(template, name, value)
    assert getattr(work, name) == value
    assert work.property_is_default(name)


@pytest.fixture
def told(app):
    """Collect which VMs are told that a property of theirs is another."""
    told = []
    app.add_handler(
        "domain-add",
        lambda _, _event, vm: vm.add_handler(
            "property-reset:*", lambda vm, _, name, **__: told.append((vm.name, name))
        ),
    )
    return told


@pytest.mark.parametrize(
    ("name", "value"), [("memory", 300), ("kernelopts", "quiet"), ("virt_mode", "hvm")]
)
def test_vms_are_told_when_the_default_from_their_template_changes(
    told, app, template, name, value
):
    """Also those of which the template is a template; not those that set their own."""
    work, own = (
        app.add_new_vm("AppVM", name=vm, label="red", template=template)
        for vm in ("work", "own")
    )
    work.template_for_dispvms = True
    app.add_new_vm("DispVM", name="late", template=work)
    setattr(own, name, getattr(own, name))
    told.clear()
    setattr(template, name, value)
    assert sorted(told) == [("late", name), ("work", name)]
    delattr(template, name)
    assert sorted(told[2:]) == [("late", name), ("tiny", name), ("work", name)]


@pytest.mark.parametrize(
    ("default", "name", "value"),
    [
        ("default_kernel", "kernel", None),
        ("default_qrexec_timeout", "qrexec_timeout", 7),
        ("default_shutdown_timeout", "shutdown_timeout", 7),
    ],
)
def test_vms_are_told_once_when_a_default_of_the_app_changes(
    told, app, default, name, value
):
    base = app.add_new_vm("TemplateVM", name="base", label="red")
    app.add_new_vm("AppVM", name="work", label="red", template=base)
    app.add_new_vm("StandaloneVM", name="own", label="red", **{name: value})
    told.clear()
    setattr(app, default, value)
    assert sorted(told) == [("base", name), ("work", name)]
    delattr(app, default)
    assert sorted(told[2:]) == [("base", name), ("work", name)]


def test_vms_are_told_of_another_default_dispvm(told, app, template):
    work = app.add_new_vm("AppVM", name="work", label="red", template=template)
    work.template_for_dispvms = True
    own = app.add_new_vm("AppVM", name="own", label="red", template=template)
    own.default_dispvm = None
    told.clear()
    app.default_dispvm = work
    assert told == [(vm, "default_dispvm") for vm in ("tiny", "work")]


def test_vms_are_told_of_another_icon(told, app, template):
    vm = app.add_new_vm("AppVM", name="base", label="red", template=template)
    told.clear()
    vm.label = "blue"
    vm.features["servicevm"] = True
    del vm.features["servicevm"]
    vm.template_for_dispvms = True
    del vm.template_for_dispvms
    assert [name for _, name in told if name == "icon"] == ["icon"] * 5


def test_timeouts_are_the_apps_where_neither_vm_nor_template_set_them(app, work):
    app.default_qrexec_timeout, app.default_shutdown_timeout = 5, 6
    assert (work.qrexec_timeout, work.shutdown_timeout) == (5, 6)


def test_memory_is_not_lowered_below_a_tenth_of_maxmem(work):
    work.memory, work.maxmem = 400, 4000
    with pytest.raises(exc.QubesPropertyValueError, match=r"maxmem is 4000 MiB.*lower"):
        work.memory = 399
    work.maxmem = 3990
    work.memory = 399
    assert (work.memory, work.maxmem) == (399, 3990)


def test_maxmem_by_default_is_within_what_memory_allows(work, template):
    template.memory, template.maxmem = 400, 4000
    work.memory = 100
    assert work.maxmem == 1000


@pytest.mark.parametrize("value", [0, -1, "", "400 ", 40.5, None, True, "many"])
@pytest.mark.parametrize("name", ["memory", "vcpus", "qrexec_timeout"])
def test_numbers_above_zero(work, name, value):
    with pytest.raises(exc.QubesPropertyValueError, match="expected a whole number"):
        setattr(work, name, value)


@pytest.mark.asyncio
async def test_pci_devices_make_it_hvm(work, card):
    """And pvh again when they are gone."""
    assert work.virt_mode == "pvh"
    await work.devices["pci"].assign(card)
    assert work.virt_mode == "hvm"
    with pytest.raises(exc.QubesPropertyValueError, match="PCI devices are assigned"):
        work.virt_mode = "pvh"
    await work.devices["pci"].unassign(card)
    assert work.virt_mode == "pvh"


@pytest.mark.asyncio
async def test_pci_devices_are_refused_to_what_is_set_to_pvh(work, card):
    work.virt_mode = "PVH"
    with pytest.raises(exc.QubesValueError, match="virt_mode of work is set to pvh"):
        await work.devices["pci"].assign(card)
    assert list(work.devices["pci"].get_assigned_devices()) == []
    del work.virt_mode
    await work.devices["pci"].assign(card)


@pytest.mark.parametrize("value", ["a/b", "..", "", None, "x" * 65, 5, "a b"])
def test_names_of_kernels(work, value):
    if value in ("", None):
        work.kernel = value
        assert work.kernel is None
    else:
        with pytest.raises(exc.QubesPropertyValueError, match="name of a kernel"):
            work.kernel = value


@pytest.mark.parametrize("value", ["a:b", "a b", "", None, 'a"', "-x", "x" * 33])
def test_names_of_users(work, value):
    with pytest.raises(exc.QubesPropertyValueError, match="name of a user"):
        work.default_user = value


def test_kernel_options_are_bounded(work):
    work.kernelopts = "x" * 512
    with pytest.raises(exc.QubesPropertyValueError, match="at most 512"):
        work.kernelopts = "x" * 513


def test_backup_timestamp_is_set_in_the_form_in_which_it_is_read(work):
    assert work.backup_timestamp is None
    for value in (1700000000, "1700000000", 0):
        work.backup_timestamp = value
        assert work.backup_timestamp == int(value)
        work.backup_timestamp = work.backup_timestamp
        text = work.property_get_def("backup_timestamp").saved(work)
        work.backup_timestamp = text
        assert work.backup_timestamp == int(value)
    del work.backup_timestamp
    work.backup_timestamp = work.backup_timestamp
    assert work.backup_timestamp is None


@pytest.mark.parametrize(
    "value", ["", "1.5", 1.5, -1, "-1", True, "0x10", "2026-01-01", " 1", [], b"1"]
)
def test_what_is_no_backup_timestamp(work, value):
    with pytest.raises(exc.QubesPropertyValueError, match="expected"):
        work.backup_timestamp = value
    assert work.backup_timestamp is None


def test_start_time_is_read_only_and_known_to_the_list_of_properties(work):
    names = {prop.name: prop.type_name for prop in work.property_list()}
    assert names["start_time"] == names["backup_timestamp"] == "int"
    assert work.start_time is None
    work.life.started_at = 1700000000.7
    assert work.start_time == 1700000000
    with pytest.raises(exc.QubesPropertyValueError, match="cannot be set"):
        work.start_time = 1


def test_what_is_computed(app, work, template):
    assert (work.klass, work.icon, work.updateable) == ("AppVM", "appvm-red", False)
    assert (template.icon, template.updateable) == ("templatevm-black", True)
    assert app.domains["dom0"].icon == "adminvm-black"
    work.template_for_dispvms = True
    assert work.icon == "dispvm-red"
    work.features["servicevm"] = True
    assert work.icon == "servicevm-red"


@pytest.mark.parametrize("name", ["default_template", "default_dispvm"])
def test_vm_properties_of_the_app_take_vm_name_and_nothing(app, template, work, name):
    work.template_for_dispvms = True
    vm = {"default_template": template, "default_dispvm": work}[name]
    for value in (vm, vm.name):
        setattr(app, name, value)
        assert getattr(app, name) is vm
    for value in ("", None):
        setattr(app, name, value)
        assert getattr(app, name) is None
    with pytest.raises(exc.QubesPropertyValueError, match="no such VM: 'nobody'"):
        setattr(app, name, "nobody")


@pytest.fixture
def machine(monkeypatch):
    """Have a machine of two CPUs; return a function that sets how many want them."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1})

    def busy(processes):
        monkeypatch.setattr("os.getloadavg", lambda: (processes, 0.0, 0.0))

    busy(0.5)
    return busy


def test_a_start_may_take_longer_where_guests_are_slow(app, work, machine):
    assert start_deadline(work) == 60
    machine(5)
    assert start_deadline(work) == 60 * 2.5
    app.hypervisor.slowness = 2.0
    assert start_deadline(work) == 60 * 2.5 * 2
    machine(1000)
    assert start_deadline(work) == 60 * 4 * 2


def test_a_time_for_a_start_that_somebody_has_set_is_exact(
    app, work, template, machine
):
    machine(1000)
    app.default_qrexec_timeout = 50
    assert start_deadline(work) == 50
    template.qrexec_timeout = 40
    assert start_deadline(work) == 40
    work.qrexec_timeout = 60
    assert start_deadline(work) == 60
    del work.qrexec_timeout, template.qrexec_timeout, app.default_qrexec_timeout
    assert start_deadline(work) == 240


def test_keyboard_layout_is_that_of_the_guivm(app, work):
    app.domains["dom0"].keyboard_layout = "de++"
    assert work.keyboard_layout == "de++"
    work.guivm = app.add_new_vm("RemoteVM", name="far", label="red")
    assert work.keyboard_layout == "us++"
    work.guivm = None
    assert work.keyboard_layout == "us++"
