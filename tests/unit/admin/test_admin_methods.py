"""What methods answer, in the formats that clients parse."""

import re

import pytest
from admin_client import AdminError

from qubes_itests.admin.dispatch import error_name
from qubes_itests.core import exc


def refusal(client, *call, **fields):
    with pytest.raises(AdminError) as caught:
        client.call(*call, **fields)
    return caught.value


def test_vms_are_listed_with_class_state_and_uuid(client, app):
    lines = client.call("admin.vm.List").decode().splitlines()
    assert lines == [
        f"{vm.name} class={vm.klass} state={vm.get_power_state()} uuid={vm.uuid}"
        for vm in sorted(app.domains)
    ]
    assert client.call("admin.vm.List", "work").decode().split()[:3] == [
        "work",
        "class=AppVM",
        "state=Halted",
    ]


#: method, destination, argument, payload, and the answer as a regular expression.
TRANSCRIPT = [
    ("admin.vmclass.List", "dom0", "", b"", r"AdminVM\n(\w+\n)*AppVM\n(\w+\n)*"),
    ("admin.vm.property.List", "work", "", b"", r"(?s).*^netvm\n.*"),
    ("admin.property.List", "dom0", "", b"", r"(?s).*^default_netvm\n.*"),
    ("admin.vm.property.Get", "work", "memory", b"", r"default=True type=int \d+"),
    ("admin.vm.property.Get", "work", "netvm", b"", r"default=True type=vm "),
    ("admin.vm.property.Get", "work", "label", b"", r"default=False type=label red"),
    ("admin.vm.property.Get", "work", "template", b"", r"default=\w+ type=vm tiny"),
    ("admin.vm.property.Get", "work", "debug", b"", r"default=True type=bool False"),
    ("admin.vm.property.Get", "work", "name", b"", r"default=False type=str work"),
    ("admin.vm.property.Get", "work", "qid", b"", r"default=False type=int \d+"),
    (
        "admin.vm.property.Get",
        "work",
        "uuid",
        b"",
        r"default=\w+ type=str [0-9a-f-]{36}",
    ),
    ("admin.vm.property.Get", "dom0", "label", b"", r"default=\w+ type=label black"),
    ("admin.property.Get", "dom0", "default_netvm", b"", r"default=True type=vm "),
    ("admin.vm.property.GetDefault", "work", "memory", b"", r"type=int \d+"),
    ("admin.vm.property.GetDefault", "work", "name", b"", r""),
    ("admin.vm.property.Help", "work", "memory", b"", r".*MiB.*"),
    ("admin.vm.property.Set", "work", "memory", b"500", r""),
    ("admin.vm.property.Set", "work", "debug", b"True", r""),
    ("admin.vm.property.Set", "work", "label", b"green", r""),
    ("admin.vm.property.Set", "work", "netvm", b"", r""),
    ("admin.vm.property.Set", "work", "default_user", b"joe", r""),
    ("admin.vm.property.Reset", "work", "memory", b"", r""),
    ("admin.property.Set", "dom0", "default_template", b"tiny", r""),
    ("admin.vm.feature.List", "work", "", b"", r""),
    ("admin.vm.feature.Set", "work", "os", b"Linux 100%", r""),
    ("admin.vm.tag.List", "work", "", b"", r""),
    ("admin.vm.tag.Get", "work", "mine", b"", r"0"),
    ("admin.vm.tag.Set", "work", "mine", b"", r""),
    ("admin.label.List", "dom0", "", b"", r"red\norange\n(\w+\n){6}"),
    ("admin.label.Get", "dom0", "red", b"", r"0xcc0000"),
    ("admin.label.Index", "dom0", "red", b"", r"1"),
    ("admin.vm.Create.AppVM", "dom0", "tiny", b"name=new label=red", r""),
    ("admin.vm.CreateInPool.AppVM", "dom0", "", b"name=n label=red pool=default", r""),
    ("admin.vm.Remove", "work", "", b"", r""),
]


@pytest.mark.parametrize("row", TRANSCRIPT)
def test_an_answer_has_the_format_that_clients_parse(client, row):
    *call, answer = row
    got = client.call(*call).decode()
    assert re.compile(answer, re.MULTILINE).fullmatch(got), got


#: method, destination, argument, payload, and the exception's type.
REFUSED = [
    ("admin.vm.List", "dom0", "x", b"", "QubesDaemonAccessError"),
    ("admin.vm.List", "dom0", "", b"x", "QubesDaemonAccessError"),
    ("admin.property.Get", "work", "default_netvm", b"", "QubesDaemonAccessError"),
    ("admin.label.List", "work", "", b"", "QubesDaemonAccessError"),
    ("admin.vm.property.Get", "work", "", b"", "QubesNoSuchPropertyError"),
    ("admin.vm.property.Get", "work", "__init__", b"", "QubesNoSuchPropertyError"),
    ("admin.vm.property.Get", "work", "start", b"", "QubesNoSuchPropertyError"),
    ("admin.vm.property.Set", "work", "memory", b"", "QubesPropertyValueError"),
    ("admin.vm.property.Set", "work", "memory", b"-5", "QubesPropertyValueError"),
    ("admin.vm.property.Set", "work", "memory", b" 5", "QubesPropertyValueError"),
    ("admin.vm.property.Set", "work", "memory", b"4e3", "QubesPropertyValueError"),
    ("admin.vm.property.Set", "work", "debug", b"", "QubesPropertyValueError"),
    ("admin.vm.property.Set", "work", "debug", b"2", "QubesPropertyValueError"),
    ("admin.vm.property.Set", "work", "debug", b" True", "QubesPropertyValueError"),
    ("admin.vm.property.Set", "work", "debug", b"True\n", "QubesPropertyValueError"),
    ("admin.vm.volume.Set.rw", "work", "private", b"True\n", "QubesDaemonAccessError"),
    ("admin.vm.property.Set", "work", "netvm", b"no-such", "QubesPropertyValueError"),
    ("admin.vm.property.Set", "work", "netvm", b"a b", "QubesPropertyValueError"),
    ("admin.vm.property.Set", "work", "label", b"pink", "QubesLabelNotFoundError"),
    ("admin.vm.property.Set", "work", "label", b"1", "QubesPropertyValueError"),
    (
        "admin.vm.property.Set",
        "work",
        "default_user",
        b"\xff",
        "QubesDaemonAccessError",
    ),
    (
        "admin.vm.property.Set",
        "work",
        "default_user",
        b"a\nb",
        "QubesPropertyValueError",
    ),
    ("admin.vm.property.Set", "work", "uuid", b"1", "QubesDaemonAccessError"),
    ("admin.vm.feature.Get", "work", "os", b"", "QubesFeatureNotFoundError"),
    ("admin.vm.feature.Get", "work", "", b"", "QubesDaemonAccessError"),
    ("admin.vm.feature.CheckWithTemplate", "dom0", "", b"", "QubesDaemonAccessError"),
    ("admin.vm.feature.Set", "work", "a/b", b"", "QubesDaemonAccessError"),
    ("admin.vm.feature.Set", "work", "a", b"\xff", "QubesDaemonAccessError"),
    ("admin.vm.feature.Set", "work", "a", b"1\n2", "QubesValueError"),
    ("admin.vm.feature.Set", "work", "a", b"\x7f", "QubesValueError"),
    ("admin.vm.feature.Remove", "work", "a", b"", "QubesFeatureNotFoundError"),
    ("admin.vm.tag.Set", "work", "a+b", b"", "QubesDaemonAccessError"),
    ("admin.vm.tag.Remove", "work", "a", b"", "QubesTagNotFoundError"),
    ("admin.label.Get", "dom0", "1", b"", "QubesLabelNotFoundError"),
    ("admin.label.Get", "dom0", "pink", b"", "QubesLabelNotFoundError"),
    ("admin.label.Create", "dom0", "pink", b"0xff0000", "QubesNotImplementedError"),
    (
        "admin.vm.Create.AppVM",
        "dom0",
        "nobody",
        b"name=x label=red",
        "QubesVMNotFoundError",
    ),
    (
        "admin.vm.Create.AppVM",
        "dom0",
        "work",
        b"name=x label=red",
        "QubesPropertyValueError",
    ),
    (
        "admin.vm.Create.TemplateVM",
        "dom0",
        "tiny",
        b"name=x label=red",
        "QubesValueError",
    ),
    (
        "admin.vm.Create.AppVM",
        "dom0",
        "tiny",
        b"name=work label=red",
        "QubesValueError",
    ),
    (
        "admin.vm.Create.AppVM",
        "dom0",
        "tiny",
        b"name=x name=y label=red",
        "QubesDaemonAccessError",
    ),
    (
        "admin.vm.Create.AppVM",
        "dom0",
        "tiny",
        b"name=x label=red pool=default",
        "QubesDaemonAccessError",
    ),
    (
        "admin.vm.Create.AppVM",
        "dom0",
        "tiny",
        b"name=x label=red memory=4",
        "QubesDaemonAccessError",
    ),
    (
        "admin.vm.Create.AppVM",
        "dom0",
        "tiny",
        b"name=x label=1",
        "QubesDaemonAccessError",
    ),
    (
        "admin.vm.Create.AppVM",
        "dom0",
        "tiny",
        b"name=x label=pink",
        "QubesLabelNotFoundError",
    ),
    (
        "admin.vm.Create.AppVM",
        "dom0",
        "tiny",
        b"name=../x label=red",
        "QubesValueError",
    ),
    (
        "admin.vm.Create.AppVM",
        "dom0",
        "tiny",
        b"name=x label=red \x1b[2J\n=1",
        "QubesDaemonAccessError",
    ),
    ("admin.vm.Create.AppVM", "dom0", "tiny", b"label=red", "QubesDaemonAccessError"),
    ("admin.vm.Create.AppVM", "dom0", "tiny", b"", "QubesDaemonAccessError"),
    (
        "admin.vm.CreateInPool.AppVM",
        "dom0",
        "tiny",
        b"name=x label=red pool=no",
        "QubesException",
    ),
    (
        "admin.vm.CreateInPool.AppVM",
        "dom0",
        "tiny",
        b"name=x label=red pool=default pool:root=default",
        "QubesDaemonAccessError",
    ),
    (
        "admin.vm.Create.AdminVM",
        "dom0",
        "",
        b"name=x label=red",
        "QubesDaemonAccessError",
    ),
    ("admin.vm.Remove", "dom0", "", b"", "QubesVMInUseError"),
    ("admin.vm.Remove", "tiny", "", b"", "QubesVMInUseError"),
    ("admin.vm.CreateDisposable", "dom0", "", b"x", "QubesDaemonAccessError"),
    ("admin.vm.CreateDisposable", "dom0", "", b"", "QubesNoTemplateError"),
]


def state(app):
    """Return all that an invalid request must not change."""
    return {
        str(vm): (dict(vm._values), dict(vm.features), set(vm.tags))
        for vm in app.domains
    } | {"app": dict(app._values)}


@pytest.mark.parametrize("row", REFUSED)
def test_what_is_invalid_is_refused_and_changes_nothing(client, app, row):
    *call, kind = row
    before = state(app)
    error = refusal(client, *call)
    assert error.kind == kind
    # it is printed on terminals, the server's and the client's
    assert error.text.isprintable()
    assert state(app) == before
    assert app.saved == 0


def test_only_mutations_save(client, app):
    client.call("admin.vm.property.GetAll", "work")
    client.call("admin.vm.List")
    assert app.saved == 0
    client.call("admin.vm.tag.Set", "work", "mine")
    assert app.saved == 1


def test_get_all_has_one_property_a_line(client, app):
    app.domains["work"].kernelopts = "a\\b\nc"
    lines = client.call("admin.vm.property.GetAll", "work").decode().splitlines()
    names = [line.partition(" ")[0] for line in lines]
    assert names == sorted(p.name for p in app.domains["work"].property_list())
    assert "kernelopts default=False type=str a\\\\b\\nc" in lines


def test_every_property_has_the_type_that_its_values_have(app):
    """No declaration is misread, so that a client reads back what was set."""
    kinds = {}
    for holder in (app, *app.domains):
        for prop in holder.property_list():
            kinds[prop.name] = prop.type_name
            value = getattr(holder, prop.name, None)
            expected = {bool: "bool", int: "int"}.get(type(value))
            if expected:
                assert prop.type_name == expected, prop.name
    assert {name for name, kind in kinds.items() if kind == "vm"} >= {
        "netvm",
        "template",
        "default_dispvm",
        "default_netvm",
        "default_template",
    }
    assert kinds["label"] == "label"
    assert kinds["kernel"] == "str"


def test_times_are_whole_seconds_and_set_as_they_are_read(client, app):
    get, name = "admin.vm.property.Get", "backup_timestamp"
    for time in ("start_time", name):
        assert client.call(get, "work", time) == b"default=True type=int "
    app.domains["work"].life.started_at = 1700000000.9
    assert client.call(get, "work", "start_time") == b"default=True type=int 1700000000"
    client.call("admin.vm.property.Set", "work", name, b"1700000001")
    read = client.call(get, "work", name)
    assert read == b"default=False type=int 1700000001"
    client.call("admin.vm.property.Set", "work", name, read.rpartition(b" ")[2])
    for value in (b"1700000001.5", b"2026-01-01", b"-1", b""):
        assert refusal(client, "admin.vm.property.Set", "work", name, value)
    assert refusal(client, "admin.vm.property.Set", "work", "start_time", b"1")
    assert client.call(get, "work", name) == read


def test_a_handler_vetoes(client, app):
    def veto(_vm, _event, dest, arg, **_kwargs):
        raise PermissionError(f"not {dest} {arg}")

    app.domains["dom0"].add_handler("admin-permission:admin.vm.tag.Set", veto)
    assert refusal(client, "admin.vm.tag.Set", "work", "mine")
    assert "mine" not in app.domains["work"].tags
    client.call("admin.vm.tag.Get", "work", "mine")


def test_a_handler_filters(client, app):
    def only_work(_vm, _event, **_kwargs):
        return [lambda vm: vm.name == "work"]

    app.domains["dom0"].add_handler("admin-permission:admin.vm.List", only_work)
    assert client.call("admin.vm.List").decode().count("\n") == 1


def test_a_vm_is_created_with_its_volumes_and_tagged(client, app):
    client.call("admin.vm.Create.AppVM", "dom0", "tiny", b"name=new label=green")
    vm = app.domains["new"]
    assert vm.template == app.domains["tiny"]
    assert str(vm.label) == "green"
    assert "created-by-dom0" in vm.tags
    assert vm.volumes["private"].size


def test_a_creation_that_fails_leaves_no_vm(client, app, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("no space")

    monkeypatch.setattr(type(app.domains["work"]), "create_on_disk", fail)
    refusal(
        client, "admin.vm.Create.AppVM", "dom0", "tiny", payload=b"name=new label=red"
    )
    assert "new" not in app.domains
    assert app.saved == 0


def test_a_removed_vm_is_gone_with_its_volumes(client, app, tmp_path):
    assert list(tmp_path.glob("pool/appvms/work/*"))
    client.call("admin.vm.Remove", "work")
    assert "work" not in app.domains
    assert not list(tmp_path.glob("pool/appvms/work/*.img"))


def test_disposable_vms_are_made_from_the_destination_or_the_default(client, app):
    client.call("admin.vm.property.Set", "work", "template_for_dispvms", b"True")
    name = client.call("admin.vm.CreateDisposable", "work").decode()
    assert re.fullmatch("disp[1-9][0-9]{0,3}", name)
    assert app.domains[name].template == app.domains["work"]
    assert {"created-by-dom0", "disp-created-by-dom0"} <= set(app.domains[name].tags)
    client.call("admin.property.Set", "dom0", "default_dispvm", b"work")
    uuid = client.call("admin.vm.CreateDisposable", "dom0", "", b"uuid").decode()
    assert uuid.startswith("uuid:")
    assert client.call("admin.vm.List", uuid).startswith(b"disp")
    client.call("admin.vm.Create.DispVM", "dom0", "", b"name=named label=red")
    assert app.domains["named"].template == app.domains["work"]


def test_a_disposable_vm_needs_something_to_be_made_from(client):
    error = refusal(
        client, "admin.vm.Create.DispVM", "dom0", "", b"name=named label=red"
    )
    assert error.kind == "QubesNoTemplateError"
    assert "default_dispvm" in error.text
    assert refusal(client, "admin.vm.CreateDisposable", "work").text


def test_a_vm_of_another_machine_has_no_volumes(client, app):
    client.call("admin.vm.Create.RemoteVM", "dom0", "", b"name=far label=red")
    assert client.call("admin.vm.volume.List", "far") == b""
    assert "power_state=Halted" in client.call("admin.vm.CurrentState", "far").decode()
    for method in ("Start", "Pause", "Console", "Shutdown"):
        assert refusal(client, f"admin.vm.{method}", "far").kind.startswith("QubesVM")
    assert refusal(client, "admin.vm.volume.Info", "far", "root").kind
    client.call("admin.vm.Remove", "far")
    assert "far" not in app.domains


@pytest.mark.parametrize(
    "name",
    [
        "DeviceAlreadyAssigned",
        "DeviceNotAssigned",
        "QubesPoolInUseError",
        "QubesVMShutdownTimeoutError",
        "UnexpectedDeviceProperty",
        "UnrecognizedDevice",
    ],
)
def test_an_error_travels_by_the_name_that_it_has_in_qubes_os(name):
    cls = getattr(exc, name)
    assert error_name(cls.__new__(cls)) == name


def test_truth_values_are_called_so(app):
    """Of a class that no VM of this app has, too."""
    disposable = app.get_vm_class("DispVM")
    for name in ("auto_cleanup", "include_in_backups", "debug"):
        assert getattr(disposable, name).type_name == "bool", name
