"""Volumes and pools over the Admin API, on real files."""

import logging
import re

import pytest
from admin_client import AdminError


def refusal(client, *call, **fields):
    with pytest.raises(AdminError) as caught:
        client.call(*call, **fields)
    return caught.value


def volume_call(client, what, vm="work", volume="private", payload=b""):
    return client.call(f"admin.vm.volume.{what}", vm, volume, payload).decode()


def pairs(text):
    return dict(line.split("=", 1) for line in text.splitlines())


@pytest.fixture
def write(app, run):
    """Write to a volume as a VM does, so that stopping it commits."""

    async def cycle(volume, content):
        await volume.start()
        with volume.path.open("r+b") as image:
            image.write(content)
        await volume.stop()

    return lambda content, vm="work": run(
        cycle(app.domains[vm].volumes["private"], content)
    )


@pytest.fixture
def content(app, run):
    """Read what a volume has committed."""

    async def read(volume):
        path = await volume.export()
        data = path.read_bytes()
        await volume.export_end(path)
        return data

    return lambda vm="work": run(read(app.domains[vm].volumes["private"]))


def test_volumes_are_listed_and_described(client, app):
    assert volume_call(client, "List", volume="").split() == list(
        app.domains["work"].volumes
    )
    info = pairs(volume_call(client, "Info", volume="root"))
    assert list(info) == [
        "pool",
        "vid",
        "size",
        "usage",
        "rw",
        "source",
        "path",
        "save_on_stop",
        "snap_on_start",
        "revisions_to_keep",
        "ephemeral",
        "is_outdated",
    ]
    assert info["vid"] == "appvms/work/root"
    assert info["source"] == "vm-templates/tiny/root"
    assert info["snap_on_start"] == "True"
    assert info["size"] == str(1 << 20)


def test_dom0_has_no_volumes(client):
    assert client.call("admin.vm.volume.List", "dom0") == b""


def test_revisions_are_listed_oldest_first_and_the_last_is_the_latest(
    client, app, write, content
):
    volume_call(client, "Set.revisions_to_keep", payload=b"3")
    for number in b"1234":
        write(bytes([number]))
    listed = volume_call(client, "ListSnapshots").split()
    revisions = app.domains["work"].volumes["private"].revisions
    assert listed == sorted(revisions, key=revisions.__getitem__)
    assert len(listed) == 3
    volume_call(client, "Revert", payload=listed[-1].encode())
    assert content()[:1] == b"3"
    assert app.saved == 2


def test_a_revision_that_is_not_there_is_refused(client, write):
    write(b"x")
    error = refusal(client, "admin.vm.volume.Revert", "work", "private", b"../../x")
    assert error.kind == "QubesDaemonAccessError"


def test_a_volume_is_resized(client, app):
    volume_call(client, "Resize", payload=str(8 << 20).encode())
    assert app.domains["work"].volumes["private"].size == 8 << 20
    assert app.saved == 1


@pytest.mark.parametrize(
    "payload",
    [b"", b"-1", b"+1", b" 1", b"1 ", b"01", b"1\n", b"1e9", b"9" * 20, "٣".encode()],
)
def test_a_size_is_plain_digits(client, app, payload):
    error = refusal(client, "admin.vm.volume.Resize", "work", "private", payload)
    assert error.kind == "QubesDaemonAccessError"
    assert app.saved == 0


def test_a_volume_is_made_smaller(client, app):
    """The tools ask for it when they are told ``--force``."""
    volume_call(client, "Resize", payload=b"4096")
    assert app.domains["work"].volumes["private"].size == 4096
    assert app.saved == 1
    error = refusal(client, "admin.vm.volume.Resize", "work", "private", b"0")
    assert error.kind == "StoragePoolException"
    assert app.saved == 1


def test_a_volume_is_cloned_by_a_token_that_is_good_for_once(
    client, app, write, content
):
    client.call("admin.vm.Create.AppVM", "dom0", "tiny", b"name=copy label=red")
    write(b"precious")
    token = volume_call(client, "CloneFrom")
    assert re.fullmatch("[A-Za-z0-9]{32}", token)
    told = []
    app.domains["copy"].add_handler(
        "domain-import-volume",
        lambda _vm, _event, name, source: told.append((name, source.vid)),
    )
    volume_call(client, "CloneTo", vm="copy", payload=token.encode())
    assert told == [("private", app.domains["work"].volumes["private"].vid)]
    assert content("copy") == content("work")
    error = refusal(
        client, "admin.vm.volume.CloneTo", "copy", "private", token.encode()
    )
    assert error.kind == "QubesDaemonAccessError"


@pytest.mark.parametrize("token", [b"", b"x" * 32, b"\xff" * 32, b"a b"])
def test_a_bogus_token_is_refused(client, app, token):
    error = refusal(client, "admin.vm.volume.CloneTo", "work", "private", token)
    assert error.kind == "QubesDaemonAccessError"
    assert app.saved == 0


def test_a_token_of_a_volume_that_is_gone_is_refused_and_spent(client):
    client.call("admin.vm.Create.AppVM", "dom0", "tiny", b"name=copy label=red")
    token = volume_call(client, "CloneFrom", vm="copy").encode()
    client.call("admin.vm.Remove", "copy")
    call = ("admin.vm.volume.CloneTo", "work", "private", token)
    assert "is gone" in refusal(client, *call).text
    assert "used already" in refusal(client, *call).text


def test_a_token_of_a_pool_that_is_another_now_is_refused(client, app):
    token = volume_call(client, "CloneFrom").encode()
    default = app.pools["default"]
    app.pools["default"] = object()
    error = refusal(client, "admin.vm.volume.CloneTo", "work", "private", token)
    app.pools["default"] = default
    assert "pool" in error.text


def test_content_is_imported_and_cleared(client, app, content):
    payload = b"8\n" + b"12345678"
    volume_call(client, "ImportWithSize", payload=payload)
    assert content() == b"12345678"
    volume_call(client, "Import", payload=b"abcdefgh")
    assert content() == b"abcdefgh"
    volume_call(client, "Clear")
    assert content() == bytes(8)
    assert app.domains["work"].volumes["private"].size == 8


@pytest.mark.parametrize(
    ("method", "payload"),
    [
        ("Import", b"short"),
        ("ImportWithSize", b"4\nlong."),
        ("ImportWithSize", b"6\nshort"),
        ("ImportWithSize", b"no size"),
        ("ImportWithSize", b"+4\nfour"),
    ],
)
def test_an_import_that_is_not_as_long_as_declared_changes_nothing(
    client, content, method, payload
):
    before = content()
    error = refusal(client, f"admin.vm.volume.{method}", "work", "private", payload)
    assert error.kind == "QubesDaemonAccessError"
    assert content() == before


def test_an_import_into_a_full_pool_is_told(client, app, tmp_path, monkeypatch):
    volume = app.domains["work"].volumes["private"]
    begin = type(volume).import_data
    full = tmp_path / "full"
    full.symlink_to("/dev/full")

    async def import_data(self, size):
        await begin(self, size)
        return full

    monkeypatch.setattr(type(volume), "import_data", import_data)
    call = ("admin.vm.volume.ImportWithSize", "work", "private", b"4\nfour")
    error = refusal(client, *call)
    assert error.kind == "StoragePoolException"
    assert "No space left" in error.text
    assert volume.size == 4 << 20


def test_flags_of_volumes_are_set(client, app):
    volume = app.domains["work"].volumes["private"]
    volume_call(client, "Set.rw", payload=b"False")
    assert volume.rw is False
    volume_call(client, "Set.revisions_to_keep", payload=b"-1")
    assert volume.revisions_to_keep == -1
    volume_call(client, "Set.ephemeral", payload=b"False")
    error = refusal(client, "admin.vm.volume.Set.ephemeral", "work", "volatile", b"1")
    assert "ephemeral_volatile" in error.text
    assert app.saved == 2


@pytest.mark.parametrize(
    "call",
    [
        ("Info", "work", "nothing", b""),
        ("Info", "dom0", "root", b""),
        ("Info", "work", "private", b"x"),
        ("Set.rw", "work", "private", b""),
        ("Set.rw", "work", "private", b"maybe"),
        ("Set.revisions_to_keep", "work", "private", b"-2"),
        ("Set.revisions_to_keep", "work", "private", b"many"),
    ],
)
def test_unexpected_fields_are_protocol_errors(client, call):
    what, *fields = call
    assert (
        refusal(client, f"admin.vm.volume.{what}", *fields).kind
        == "QubesDaemonAccessError"
    )


def test_pools_are_listed_and_described(client, app):
    assert client.call("admin.pool.List") == b"default\n"
    info = pairs(client.call("admin.pool.Info", argument="default").decode())
    assert info["driver"] == "file-reflink"
    assert info["name"] == "default"
    assert int(info["size"]) >= int(info["usage"])
    usage = pairs(client.call("admin.pool.UsageDetails", argument="default").decode())
    assert list(usage) == ["data_size", "data_usage"]
    vids = client.call("admin.pool.volume.List", argument="default").decode().split()
    assert "appvms/work/private" in vids
    assert app.saved == 0


@pytest.mark.parametrize(
    ("method", "argument", "name"),
    [("List", "", "default"), ("volume.List", "default", "appvms/work/private")],
)
def test_handlers_filter_pools_and_volumes_by_name(client, app, method, argument, name):
    method = f"admin.pool.{method}"
    before = client.call(method, "dom0", argument).decode().split()
    assert name in before
    app.domains["dom0"].add_handler(
        f"admin-permission:{method}",
        lambda *_args, **_kwargs: [lambda each: each != name],
    )
    after = client.call(method, "dom0", argument).decode().split()
    assert after == [each for each in before if each != name]


def test_drivers_are_listed_with_their_options(client):
    drivers = client.call("admin.pool.ListDrivers").decode().splitlines()
    assert "file dir_path ephemeral_volatile revisions_to_keep" in drivers
    assert (
        "file-reflink dir_path ephemeral_volatile revisions_to_keep setup_check"
        in drivers
    )


def test_a_pool_is_added_used_and_removed(client, app, tmp_path):
    payload = f"name=second\ndir_path={tmp_path}/second\nrevisions_to_keep=3\n"
    client.call("admin.pool.Add", argument="file", payload=payload.encode())
    assert app.pools["second"].revisions_to_keep == 3
    client.call("admin.pool.Set.revisions_to_keep", argument="second", payload=b"5")
    client.call("admin.pool.Set.ephemeral_volatile", argument="second", payload=b"yes")
    assert app.pools["second"].revisions_to_keep == 5
    assert app.pools["second"].ephemeral_volatile is True
    client.call(
        "admin.vm.CreateInPool.AppVM",
        argument="tiny",
        payload=b"name=new label=red pool:private=second",
    )
    assert pairs(volume_call(client, "Info", vm="new"))["pool"] == "second"
    assert "new" in refusal(client, "admin.pool.Remove", argument="second").text
    client.call("admin.vm.Remove", "new")
    client.call("admin.pool.Remove", argument="second")
    assert list(app.pools) == ["default"]


@pytest.mark.parametrize(
    ("driver", "payload"),
    [
        ("nothing", b"name=new\n"),
        ("file", b""),
        ("file", b"dir_path=/x\n"),
        ("file", b"name=new\nname=newer\ndir_path=/x\n"),
        ("file", b"name=default\ndir_path=/x\n"),
        ("file", b"name=a/b\ndir_path=/x\n"),
        ("file", b"name=new\ndir_path=/x\nsetup_check=no\n"),
        ("file", b"name=new\nnonsense\n"),
        ("file", b"name=new\ndir_path=/x\n\x1b[2J=1\n"),
        ("file", b"name=new\n"),
        ("file", b"name=new\ndir_path=/proc/nothing\n"),
        ("file", b"name=new\ndir_path=/x\nrevisions_to_keep=many\n"),
        ("file", "name=new\ndir_path=/é\n".encode()),
        ("file", b"name=new\ndir_path=/x\0y\n"),
        ("file", b"name=new\ndir_path=/x\x01y\n"),
        ("file", b"name=new\x0cdir_path=/x\n"),
        ("file", b"name=new\r\ndir_path=/x\n"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(client, app, caplog, driver, payload):
    error = refusal(client, "admin.pool.Add", argument=driver, payload=payload)
    assert error.text.isprintable()
    assert [r.message for r in caplog.records if r.levelno >= logging.ERROR] == []
    assert list(app.pools) == ["default"]
    assert app.saved == 0


def test_a_pool_that_is_not_there_is_a_protocol_error(client):
    for method in ("Info", "Remove", "UsageDetails", "volume.List"):
        error = refusal(client, f"admin.pool.{method}", argument="nothing")
        assert error.kind == "QubesDaemonAccessError"


@pytest.fixture
def lost(app):
    """Give the path of a volume that no VM has."""
    path = app.pools["default"].dir_path / "appvms" / "lost" / "private.img"
    path.parent.mkdir()
    path.write_bytes(b"precious")
    return path


def test_a_creation_over_a_volume_is_refused_and_leaves_it(client, lost):
    for cls, template in (("AppVM", "tiny"), ("StandaloneVM", "")):
        create = (f"admin.vm.Create.{cls}", "dom0", template, b"name=lost label=red")
        error = refusal(client, *create)
        assert (error.kind, str(lost) in error.text) == ("StoragePoolException", True)
    assert lost.read_bytes() == b"precious"
    assert b"lost" not in client.call("admin.vm.List")


def test_volumes_without_a_vm_are_listed_and_removed(client, lost):
    listed = ("admin.pool.volume.ListOrphans", "dom0", "default")
    assert client.call(*listed) == b"appvms/lost/private\n"
    remove = ("admin.pool.volume.RemoveOrphan", "dom0", "default")
    for vid in (b"appvms/work/private", b"../work/private"):
        assert "without a VM" in refusal(client, *remove, vid).text
    client.call(*remove, b"appvms/lost/private")
    assert client.call(*listed) == b""
    assert not lost.exists()


def test_they_are_taken_over_by_a_new_vm(client, lost, content):
    client.call("admin.vm.Adopt.AppVM", "dom0", "tiny", b"name=lost label=red")
    assert content("lost") == b"precious"
    assert client.call("admin.pool.volume.ListOrphans", "dom0", "default") == b""
    client.call("admin.vm.Remove", "lost")
    assert not lost.exists()
