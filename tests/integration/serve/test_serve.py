"""Serving: what a user does with it, what is kept, and how it ends."""

from __future__ import annotations

import re
import signal
import stat

import pytest
from admin_client import AdminError
from conditions import wait_until
from leftovers import wait_for_no_leftovers


def cache_of(served):
    return served.socket.parents[3]


def names(client):
    return re.findall(r"^(\S+) ", client.call("admin.vm.List").decode(), re.MULTILINE)


def create(client, name, template="tiny", **pools):
    words = "".join(f" {key}={value}" for key, value in pools.items())
    method = "admin.vm.CreateInPool.AppVM" if pools else "admin.vm.Create.AppVM"
    payload = f"name={name} label=red{words}".encode()
    client.call(method, argument=template, payload=payload)


def shell(served, vm, command):
    done = served.run("-d", vm, "root:QUBESRPC qubes.VMShell dom0", data=command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def revisions(client, vm, volume="private"):
    listed = client.call("admin.vm.volume.ListSnapshots", vm, volume)
    return listed.decode().split()


def test_a_first_visit(serve):
    """Make, start, run, revert, resize, clone to XFS, remove: as the guide has it."""
    with serve() as served:
        client = served.client
        create(client, "work")
        client.call("admin.vm.Start", "work")
        shell(served, "work", b"echo one > /rw/note; exit\n")
        client.call("admin.vm.Shutdown", "work", "wait")
        client.call("admin.vm.Start", "work")
        shell(served, "work", b"echo two > /rw/note; exit\n")
        client.call("admin.vm.Shutdown", "work", "wait")
        before = revisions(client, "work")[-1]
        client.call("admin.vm.volume.Revert", "work", "private", before.encode())
        # 3G to client tools: not a whole number of the file system's blocks
        client.call("admin.vm.volume.Resize", "work", "private", b"3000000000")
        directory = served.state / "xfs" / "slow"
        pool = f"name=slow\ndir_path={directory}\n".encode()
        client.call("admin.pool.Add", argument="file-reflink", payload=pool)
        create(client, "copy", pool="slow")
        token = client.call("admin.vm.volume.CloneFrom", "work", "private")
        client.call("admin.vm.volume.CloneTo", "copy", "private", token)
        client.call("admin.vm.Start", "copy")
        assert shell(served, "copy", b"cat /rw/note; exit\n") == b"one\n"
        blocks = shell(served, "copy", b"cat /sys/class/block/*/size; exit\n")
        assert str(3_000_000_000 // 512).encode() in blocks.split()
        client.call("admin.vm.Shutdown", "copy", "wait")
        for vm in ("copy", "work"):
            client.call("admin.vm.Remove", vm)
        client.call("admin.pool.Remove", argument="slow")
        assert names(client) == ["dom0", "tiny"]
        cache = cache_of(served)
        assert served.end() == 0
    assert wait_for_no_leftovers(cache) == []


def test_it_ends_cleanly_with_vms_that_run(serve, tmp_path):
    """SIGTERM ends the VMs in order: what they wrote last is kept."""
    directory = tmp_path / "state"
    with serve("--directory", directory) as served:
        assert stat.S_IMODE(served.socket.stat().st_mode) == 0o660
        create(served.client, "work")
        served.client.call("admin.vm.Start", "work")
        shell(served, "work", b"echo late > /rw/note; exit\n")
        cache = cache_of(served)
        assert served.end() == 0
        assert served.said[-1] == "ending: the VMs shut down\n"
    assert wait_for_no_leftovers(cache) == []
    with serve("--directory", directory) as served:
        assert names(served.client) == ["dom0", "tiny", "work"]
        served.client.call("admin.vm.Start", "work")
        assert shell(served, "work", b"cat /rw/note; exit\n") == b"late\n"


def test_nothing_but_what_is_kept_survives_a_kill(serve, tmp_path):
    """SIGKILL with a VM under way, and at once another server from the same place."""
    directory = tmp_path / "state"
    with serve("--directory", directory) as served:
        create(served.client, "work")
        served.client.call("admin.vm.property.Set", "work", "memory", b"300")
        served.client.call("admin.vm.Start", "work")
        cache = cache_of(served)
        served.end(signal.SIGKILL)
    with serve("--directory", directory) as served:
        memory = served.client.call("admin.vm.property.Get", "work", "memory")
        assert memory == b"default=False type=int 300"
        served.client.call("admin.vm.Start", "work")
        served.end(signal.SIGINT)
    assert wait_for_no_leftovers(cache) == []


def test_one_directory_has_one_server(serve, site, tmp_path):
    directory = tmp_path / "state"
    with serve("--directory", directory):
        second = site.run("serve", "--directory", str(directory))
    assert second.returncode == 4
    assert f"{directory} is in use by another `serve`" in second.stderr


def test_two_servers_do_not_know_of_each_other(serve, site):
    """The environment names the one that was started last."""
    with serve() as first, serve() as second:
        create(first.client, "one")
        create(second.client, "two")
        assert names(first.client) == ["dom0", "one", "tiny"]
        assert names(second.client) == ["dom0", "tiny", "two"]
        lines = site.run("serve", "--print-env").stdout.splitlines()
        assert f"export QUBES_ITESTS_SERVE={second.socket.parent}" in lines
        second.end()
        lines = site.run("serve", "--print-env").stdout.splitlines()
        assert f"export QUBES_ITESTS_SERVE={first.socket.parent}" in lines


def test_a_shell_with_the_variables_of_a_dead_server_calls_the_living_one(serve, site):
    """Also when it was killed, which leaves its socket; named, it is an error."""
    with serve() as living:
        with serve() as dead:
            place = dead.socket.parent
            site.environment["QUBES_ITESTS_SERVE"] = str(place)
            dead.end(signal.SIGKILL)
        lines = site.run("serve", "--print-env").stdout.splitlines()
        assert f"export QUBES_ITESTS_SERVE={living.socket.parent}" in lines
        done = site.run("qvm", "--socket", str(dead.socket), "qvm-ls")
        assert done.returncode == 4
        assert f"Nothing serves on {dead.socket}" in done.stderr
        living.end()
    done = site.run("serve", "--print-env")
    assert done.returncode == 4
    assert "Nothing serves: begin with" in done.stderr


def test_without_a_server_it_says_how_to_begin(site):
    for words in (("qvm", "qvm-ls"), ("serve", "--print-env")):
        done = site.run(*words)
        assert done.returncode == 4
        assert "begin with `itests serve`" in done.stderr


def test_a_memory_budget_holds(serve):
    with serve("--memory-budget=2500") as served:
        create(served.client, "large")
        served.client.call("admin.vm.property.Set", "large", "memory", b"2000")
        with pytest.raises(AdminError, match="not enough memory"):
            served.client.call("admin.vm.Start", "large")


def test_a_filesystem_without_reflinks_is_refused(site):
    done = site.run("serve", "--filesystem=ext4")
    assert done.returncode != 0
    assert "Pools are served from btrfs, xfs, not from 'ext4'" in done.stderr


def test_a_broken_store_is_refused_with_its_line(site, tmp_path):
    (tmp_path / "qubes.xml").write_text("<qubes>\n  <broken\n</qubes>\n")
    done = site.run("serve", "--directory", str(tmp_path))
    assert done.returncode != 0
    assert f"{tmp_path}/qubes.xml:3:" in done.stderr


def test_a_link_in_the_folder_of_the_state_is_a_block_device(server, tmp_path):
    """The bytes are those of ``qvm-block attach work dom0:data``."""
    image = tmp_path / "image"
    image.write_bytes(b"data".ljust(1 << 20, b"\0"))
    link = server.state / "block" / "data"
    link.symlink_to(image)
    exposed = server.client.call("admin.vm.device.block.Available")
    assert exposed.startswith(b"data:image:data device_id='image:data' ")
    sent = "dom0+data+image+data"
    payload = (
        b"device_id='image:data' port_id='data' devclass='block'"
        b" backend_domain='dom0' mode='manual' frontend_domain='work'"
    )
    server.client.call("admin.vm.device.block.Attach", "work", sent, payload)
    read = ("-d", "work", "root:head -c 4 /dev/xvdi")
    wait_until(lambda: server.run(*read).stdout == b"data", "the disk in the guest")
    server.client.call("admin.vm.device.block.Detach", "work", sent)
    link.unlink()
    assert server.client.call("admin.vm.device.block.Available") == b""


def add_pool(served, directory):
    payload = f"name=shared\ndir_path={directory}\n".encode()
    served.client.call("admin.pool.Add", argument="file", payload=payload)


def test_a_pool_has_one_server(serve, site, tmp_path):
    """The second is told so; when the first is killed it may have it."""
    shared = tmp_path / "shared"
    with serve() as first, serve() as second:
        add_pool(first, shared)
        create(first.client, "work", pool="shared")
        image = shared / "appvms" / "work" / "private.img"
        before = image.stat()
        with pytest.raises(AdminError, match=f"{shared} is in use by another server"):
            add_pool(second, shared)
        assert image.stat() == before
        # by its own store, as one that is loaded has it
        store = (first.state / "qubes.xml").read_bytes()
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "qubes.xml").write_bytes(store)
        third = site.run("serve", "--directory", str(tmp_path / "copy"))
        assert third.returncode != 0
        assert f"{shared} is in use by another server" in third.stderr
        assert "Traceback" not in third.stderr
        first.end(signal.SIGKILL)
        wait_until(lambda: adds(second, shared), "end of the first server")


def adds(served, directory):
    try:
        add_pool(served, directory)
    except AdminError:
        return False
    return True


def test_volumes_without_a_vm_are_told_taken_over_and_removed(serve, site, tmp_path):
    directory, shared = tmp_path / "state", tmp_path / "shared"
    for name in ("lost", "old"):
        (shared / "appvms" / name).mkdir(parents=True)
        (shared / "appvms" / name / "private.img").write_bytes(b"precious")
    with serve("--directory", directory) as served:
        add_pool(served, shared)
        served.end()
    with serve("--directory", directory) as served:
        said = "".join(served.said)
        assert "no VM has volume appvms/lost/private of pool shared" in said

        def orphans(*words):
            return site.run("orphans", f"--socket={served.socket}", *words)

        every = ["shared:appvms/lost/private", "shared:appvms/old/private"]
        assert orphans().stdout.split() == every
        with pytest.raises(AdminError, match=r"lost/private\.img is there already"):
            create(served.client, "lost", pool="shared")
        assert orphans("adopt", "lost", "AppVM", "tiny").returncode == 0
        assert orphans("remove", "shared:appvms/old/private").returncode == 0
        assert orphans().stdout == ""
        assert "lost" in names(served.client)
        again = orphans("adopt", "lost", "AppVM", "tiny")
        assert again.returncode == 4
        assert "no orphan of a VM 'lost'" in again.stderr
    assert (shared / "appvms" / "lost" / "private.img").read_bytes() == b"precious"
    assert not (shared / "appvms" / "old").exists()
