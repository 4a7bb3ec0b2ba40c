"""The folder of a frozen test is checked as what it may be: anybody's."""

import asyncio
import contextlib
import dataclasses
import json
import os
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests import __version__
from qubes_itests.core.volume_content import BLOCK, data_blocks, write_blocks
from qubes_itests.frozen import freezing
from qubes_itests.frozen.folder import (
    BlockFile,
    Folder,
    FrozenError,
    write_manifest,
)
from qubes_itests.frozen.freezing import freeze
from qubes_itests.frozen.manifest import (
    FrozenDisk,
    FrozenInterface,
    FrozenVM,
    Kernel,
    Link,
    Manifest,
)
from qubes_itests.frozen.thawing import thaw
from qubes_itests.hypervisor.contract import DomainState
from qubes_itests.report.artifacts import Artifacts

SIZE = 10 * BLOCK + 512


@pytest.fixture
def folder(tmp_path):
    """Return a folder with one VM, whose two disks have a block in common."""
    path = tmp_path / "frozen"
    path.mkdir()
    for name in ("memory-1", "kernel-1", "initramfs-1"):
        (path / name).write_bytes(name.encode())
    (path / "app.xml").write_bytes(b"<qubes/>")
    blocks = BlockFile(path)
    root = blocks.add(SIZE, iter([(0, b"a" * BLOCK), (10 * BLOCK, b"b" * 512)]))
    private = blocks.add(SIZE, iter([(5 * BLOCK, b"a" * BLOCK)]))
    blocks.close()
    vm = FrozenVM(
        name="work",
        running=True,
        state="memory-1",
        memory=200,
        max_memory=400,
        vcpus=1,
        balanced=True,
        kernel="tiny",
        options="",
        disks=(FrozenDisk("xvda", "root", root, read_only=False),),
        interfaces=(FrozenInterface("00:16:3e:00:00:01", 1, "up"),),
    )
    manifest = Manifest(
        test="test_it",
        time=1.5,
        spread=0.25,
        machine={"QEMU": "7.2"},
        kernels=(Kernel("tiny", "kernel-1", "initramfs-1", "", "agent"),),
        vms=(vm,),
        volumes=(Link("work", "private", private),),
        policy=("* * @anyvm @anyvm deny",),
    )
    write_manifest(path, manifest)
    return path, manifest


def test_what_was_written_is_read(folder):
    path, manifest = folder
    read = Folder.read(path)
    read.require_whole()
    assert read.manifest == manifest
    assert read.app() == b"<qubes/>"
    assert read.file("memory-1").read_bytes() == b"memory-1"
    root, private = manifest.vms[0].disks[0].image, manifest.volumes[0].image
    assert dict(read.blocks(root)) == {
        0: b"a" * BLOCK,
        10 * BLOCK: b"b" * 512 + bytes(BLOCK - 512),
    }
    assert dict(read.blocks(private)) == {5 * BLOCK: b"a" * BLOCK}
    # what both have is there once
    assert (path / "blocks").stat().st_size == 2 * BLOCK
    assert str(read) == "1 VM, 0 MiB"


def set_in(*keys, value):
    """Return what changes one value of the manifest."""

    def apply(path):
        manifest = json.loads((path / "manifest.json").read_text())
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (path / "manifest.json").write_text(json.dumps(manifest))

    return apply


ENTRY = {"size": 1, "digest": "0" * 64}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "manifest.json").write_text("no"),
        lambda path: (path / "manifest.json").write_text("[" * 100_000),
        lambda path: (path / "manifest.json").write_bytes(b" " * (1 << 20) + b"{}"),
        lambda path: (path / "manifest.json").unlink(),
        set_in("version", value=2),
        set_in("format", value="another"),
        set_in("files", "../../etc/passwd", value=ENTRY),
        set_in("files", "/etc/passwd", value=ENTRY),
        set_in("files", "memory-1/../x", value=ENTRY),
        set_in("files", "blocks", "size", value=1 << 50),
        set_in("files", "blocks", "size", value=-1),
        set_in("files", "blocks", "size", value=True),
        set_in("files", value={}),
        set_in("vms", value=[{}] * 2000),
        set_in("vms", value={}),
        set_in("vms", 0, "state", value="/dev/zero"),
        set_in("vms", 0, "kernel", value="tiny\nmore"),
        set_in("vms", 0, "memory", value=401),
        set_in("vms", 0, "max_memory", value=1 << 40),
        set_in("vms", 0, "vcpus", value=0),
        set_in("vms", 0, "disks", 0, "name", value="../xvda"),
        set_in("vms", 0, "disks", 0, "image", "size", value=1 << 60),
        set_in("vms", 0, "interfaces", 0, "mac", value="00:16:3e:00:00:01'/>"),
        set_in("vms", 0, "interfaces", 0, "place", value=0),
        set_in("vms", 0, "interfaces", 0, "link", value="down"),
        set_in("vms", 0, "interfaces", 0, "link", value="sideways"),
        set_in("machine", "\x1b]0;title\x07", value="1"),
        set_in("machine", "x" * 5000, value="1"),
        set_in("spread", value=float("nan")),
        set_in("time", value=1 << 39),
        set_in("policy", value=["a\nb"]),
        set_in("policy", value="allow"),
    ],
)
def test_a_manifest_that_cannot_be_trusted(folder, damage):
    path, _ = folder
    damage(path)
    with pytest.raises(FrozenError):
        Folder.read(path)


def link(path, name):
    (path / name).rename(path.parent / "elsewhere")
    (path / name).symlink_to(path.parent / "elsewhere")


def fifo(path, name):
    (path / name).unlink()
    os.mkfifo(path / name)


@pytest.mark.parametrize("name", ["blocks", "image-1", "memory-1", "kernel-1"])
@pytest.mark.parametrize(
    "damage",
    [
        link,
        fifo,
        lambda path, name: (path / name).unlink(),
        lambda path, name: (path / name).write_bytes(b"longer" * BLOCK),
        lambda path, name: (path / name).write_bytes(
            bytes((path / name).stat().st_size)
        ),
    ],
)
def test_a_file_that_is_not_what_was_written(folder, damage, name):
    path, _ = folder
    read = Folder.read(path)
    damage(path, name)
    with pytest.raises(FrozenError, match=name):
        read.require_whole()


@pytest.mark.parametrize("name", ["memory-1.memory", "image-9", ".hidden"])
def test_a_file_that_the_manifest_does_not_list(folder, name):
    path, _ = folder
    (path / name).symlink_to("/etc/passwd")
    with pytest.raises(FrozenError, match="does not belong"):
        Folder.read(path).require_whole()


def test_the_manifest_itself_is_no_link(folder):
    path, _ = folder
    link(path, "manifest.json")
    with pytest.raises(FrozenError):
        Folder.read(path)


@pytest.mark.parametrize("entry", [(11, 0), (0, 2), (1 << 60, 0)])
def test_blocks_that_cannot_be(folder, entry):
    path, _ = folder
    place, number = entry
    (path / "image-1").write_bytes(
        place.to_bytes(8, "little") + number.to_bytes(4, "little")
    )
    (path / "manifest.json").unlink()
    _, manifest = folder
    write_manifest(path, manifest)
    with pytest.raises(FrozenError, match="cannot be"):
        Folder.read(path).require_whole()


def test_an_image_that_unpacks_to_more_than_is_kept(folder, monkeypatch):
    path, manifest = folder
    entry = (path / "image-1").read_bytes()[:12]
    (path / "image-1").write_bytes(9 * entry)
    (path / "manifest.json").unlink()
    write_manifest(path, manifest)
    Folder.read(path).require_whole()
    # one block, nine times, and the one of the other image
    monkeypatch.setattr("qubes_itests.frozen.folder._MOST_DATA", 9 * BLOCK)
    with pytest.raises(FrozenError, match="GiB unpacked"):
        Folder.read(path).require_whole()


def test_what_could_not_be_thawed_is_not_written(folder):
    path, manifest = folder
    (path / "manifest.json").unlink()
    rules = ("* * @anyvm @anyvm deny",) * 1001
    with pytest.raises(FrozenError, match="policy"):
        write_manifest(path, dataclasses.replace(manifest, policy=rules))


def test_blocks_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """The system may write a part, as the last one of a disk that gets full."""
    write, pwrite, data = os.write, os.pwrite, os.urandom(BLOCK)
    monkeypatch.setattr(os, "write", lambda fd, part: write(fd, part[:1000]))
    monkeypatch.setattr(os, "pwrite", lambda fd, part, at: pwrite(fd, part[:1000], at))
    target = tmp_path / "target"
    target.touch()
    write_blocks(target, 2 * BLOCK, [(BLOCK, data)])
    assert target.read_bytes() == bytes(BLOCK) + data


def test_nothing_stays_among_the_artefacts_without_room_for_clones(tmp_path):
    async def machine():
        return {"QEMU": "7.2"}

    app = SimpleNamespace(hypervisor=SimpleNamespace(machine=machine))
    with pytest.raises(FileNotFoundError):
        asyncio.run(freeze(app, tmp_path / "frozen", tmp_path / "nowhere", "test"))
    assert list(tmp_path.iterdir()) == []


def test_a_freeze_that_is_cancelled_leaves_no_vm_stopped():
    async def cancel():
        state = DomainState.RUNNING
        begun, cancelled, ended = (asyncio.Event() for _ in range(3))

        async def suspend():
            nonlocal state
            await cancelled.wait()
            state = DomainState.PAUSED
            ended.set()

        async def pause():
            begun.set()
            # a thread, which goes on
            await asyncio.shield(asyncio.ensure_future(suspend()))

        async def resume():
            nonlocal state
            state = DomainState.RUNNING

        async def ask():
            return state

        domain = SimpleNamespace(pause=pause, resume=resume, state=ask)
        vm = Mock(**{"get_power_state.return_value": "Running"})
        vm.is_paused.return_value, vm.running_domain.return_value = False, domain
        app = Mock(**{"domains.startable.return_value": [vm]})

        async def stop():
            async with freezing._stopped(app):
                pytest.fail("it was cancelled before")

        task = asyncio.create_task(stop())
        await begun.wait()
        task.cancel()
        for _ in range(20):  # it ends now if it waits for no pause
            await asyncio.sleep(0)
        cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ended.wait()
        assert state is DomainState.RUNNING

    asyncio.run(cancel())


@given(
    st.dictionaries(
        st.integers(0, 40), st.binary(min_size=1, max_size=BLOCK), max_size=8
    ),
    st.integers(0, BLOCK),
)
def test_an_image_comes_out_as_it_went_in(tmp_path_factory, data, rest):
    path = tmp_path_factory.mktemp("image")
    source, target = path / "source", path / "target"
    size = 40 * BLOCK + rest
    with source.open("wb") as file:
        for number, block in data.items():
            file.seek(number * BLOCK)
            file.write(block)
        file.truncate(size)
    target.write_bytes(b"\xff" * 100)
    write_blocks(target, size, data_blocks(source))
    assert target.read_bytes() == source.read_bytes()


def test_a_machine_of_another_kind_is_told_in_what(folder):
    async def machine():
        return {"QEMU": "9.0", "CPU": "x"}

    path, _ = folder
    testbed = SimpleNamespace(hypervisor=SimpleNamespace(machine=machine))
    match = "QEMU: 7.2 there, 9.0 here; .*CPU: unknown there, x here"
    with pytest.raises(FrozenError, match=match):
        asyncio.run(thaw(testbed, Folder.read(path)))


def test_a_back_end_that_freezes_nothing(folder):
    async def machine():
        return {}

    path, _ = folder
    testbed = SimpleNamespace(hypervisor=SimpleNamespace(machine=machine, name="test"))
    with pytest.raises(FrozenError, match="back end 'test' freezes no VMs"):
        asyncio.run(thaw(testbed, Folder.read(path)))


def test_more_memory_than_vms_may_take_is_not_loaded(folder):
    async def machine():
        return dict(manifest.machine)

    path, manifest = folder
    os.truncate(path / "memory-1", 3 << 20)
    (path / "manifest.json").unlink()
    kind = {**manifest.machine, "qubes_itests": __version__}
    write_manifest(path, dataclasses.replace(manifest, machine=kind))
    hypervisor = SimpleNamespace(machine=machine, memory_limit=2)
    with pytest.raises(FrozenError, match="3 MiB in their memory, of 2 MiB"):
        asyncio.run(thaw(SimpleNamespace(hypervisor=hypervisor), Folder.read(path)))


@pytest.mark.parametrize("bound", ["MOST_BYTES", "_MOST_DATA"])
def test_disks_with_more_than_is_kept(tmp_path, monkeypatch, bound):
    monkeypatch.setattr(f"qubes_itests.frozen.folder.{bound}", 2 * BLOCK)
    blocks = BlockFile(tmp_path)
    with contextlib.closing(blocks), pytest.raises(FrozenError, match="more than"):
        blocks.add(SIZE, ((n * BLOCK, bytes([n + 1]) * BLOCK) for n in range(10)))


def test_a_run_freezes_some_tests_and_no_more(tmp_path):
    """Whatever attempt or app they are of; those of earlier runs do not count."""
    vm = SimpleNamespace(klass="AppVM")
    app = SimpleNamespace(domains=SimpleNamespace(startable=lambda: [vm]))
    earlier = tmp_path / "old" / "frozen" / "manifest.json"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    os.utime(earlier, (1, 1))
    artifacts = Artifacts(tmp_path)
    for number in range(8):
        place = tmp_path / f"test{number}" / f"attempt-{number}" / "frozen"
        place.mkdir(parents=True)
        (place / "manifest.json").touch()
        os.utime(place / "manifest.json", (2**33, 2**33))
    artifacts.freeze("test", SimpleNamespace(apps=[app]))
    (problem,) = artifacts.problems
    assert "8 tests of this run are frozen already" in problem
    assert not (tmp_path / "test").exists()
