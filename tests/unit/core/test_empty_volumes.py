"""Private volumes without a filesystem: empty ones get one before a VM starts."""

import asyncio
import os
import subprocess

import pytest
from cancelling import cancelled_everywhere

from qubes_itests.core.exc import QubesVMError
from qubes_storage import Import
from qubes_storage.exc import InvalidSizeError
from qubes_storage.uninterrupted import to_its_end

MIB = 1 << 20

pytestmark = pytest.mark.asyncio


async def empty(app, template, **properties):
    sizes = {"root": {"size": MIB}, "private": {"size": 8 * MIB}}
    if not template.volumes["root"].files.clean.exists():
        await template.volumes["root"].create()
    vm = app.add_new_vm(
        "AppVM", label="red", template=template, volume_config=sizes, **properties
    )
    await vm.create_on_disk()
    await fill(vm, lambda _path: None)
    return vm


async def fill(vm, write):
    async with Import(vm.volumes["private"]) as path:
        write(path)


def magic(path):
    """Return what tells an ext4 filesystem."""
    with path.open("rb") as file:
        file.seek(1080)
        return file.read(2)


EXT4 = b"\x53\xef"


async def started(vm):
    """Start and stop the storage of a VM; return what it started with."""
    await vm.storage.start()
    found = vm.volumes["private"].path.read_bytes()
    await vm.storage.stop()
    return found


async def test_one_of_holes(app, template):
    vm = await empty(app, template, name="work")
    found = await started(vm)
    assert found[1080:1082] == EXT4
    assert magic(vm.volumes["private"].files.clean) == EXT4


async def test_a_new_one_gets_it_at_the_first_start(app):
    """Most templates of a test never start."""
    sizes = {"root": {"size": MIB}, "private": {"size": 8 * MIB}}
    vm = app.add_new_vm("TemplateVM", name="new", label="red", volume_config=sizes)
    await vm.create_on_disk()
    assert not any(vm.volumes["private"].files.clean.read_bytes())
    assert (await started(vm))[1080:1082] == EXT4


async def test_it_has_the_directories_that_a_guest_makes(app, template):
    vm = await empty(app, template, name="work")
    await started(vm)
    found = {}
    for place in ("/", "/home"):
        command = ["debugfs", "-R", f"ls -p {place}", vm.volumes["private"].files.clean]
        listed = await asyncio.to_thread(subprocess.check_output, command, text=True)
        found |= {line.split("/")[5]: line.split("/")[2:5] for line in listed.split()}
    owner = [str(os.geteuid()), str(os.getegid())]
    for name in ("config", "home", "usrlocal"):
        assert found[name] == ["040755", *owner]
    assert found["user"] == ["040700", *owner], "a guest gives it to whose it is"


async def test_vms_that_start_at_once_from_one_find_the_same(app, template):
    base = await empty(app, template, name="base", template_for_dispvms=True)
    vms = [
        app.add_new_vm("DispVM", name=f"disp{n}", label="red", template=base)
        for n in range(1, 5)
    ]
    for vm in vms:
        await vm.create_on_disk()
    found = await asyncio.gather(*(started(vm) for vm in vms))
    assert found[0][1080:1082] == EXT4
    assert all(content == found[0] for content in found)


async def test_one_of_zeroes(app, template):
    vm = await empty(app, template, name="work")
    await fill(vm, lambda path: path.write_bytes(bytes(8 * MIB)))
    assert vm.volumes["private"].usage == 8 * MIB
    assert (await started(vm))[1080:1082] == EXT4


@pytest.mark.parametrize("place", [0, 1 << 16, 5 * MIB, 8 * MIB - 1])
async def test_what_is_not_empty_is_left_alone(app, template, place):
    """Whatever it is, somebody put it there: a single byte is enough."""

    def write(path):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")

    vm = await empty(app, template, name="work")
    await fill(vm, write)
    assert await started(vm) == bytes(place) + b"x" + bytes(8 * MIB - place - 1)


async def test_a_filesystem_is_left_alone(app, template):
    vm = await empty(app, template, name="work")
    first = await started(vm)
    revisions = vm.volumes["private"].revisions
    assert await started(vm) == first
    assert len(vm.volumes["private"].revisions) == len(revisions)


async def test_disposable_vms_start_from_one_that_was_empty(app, template):
    base = await empty(app, template, name="base", template_for_dispvms=True)
    vm = app.add_new_vm("DispVM", name="disp1", label="red", template=base)
    await vm.create_on_disk()
    assert (await started(vm))[1080:1082] == EXT4
    assert magic(base.volumes["private"].files.clean) == EXT4


async def test_changes_that_a_crash_has_left_are_gone_on_with(app, template):
    """They are not empty, whatever was committed before."""
    vm = await empty(app, template, name="work")
    await vm.volumes["private"].start()
    vm.volumes["private"].path.write_bytes(b"x" * 8 * MIB)
    vm.volumes["private"].use.end()  # as a process that was killed
    assert await started(vm) == b"x" * 8 * MIB


async def test_one_that_is_too_small_says_so(app, template):
    vm = await empty(app, template, name="work")
    await vm.volumes["private"].resize(4096)
    await fill(vm, lambda _path: None)
    with pytest.raises(QubesVMError, match="private of VM work"):
        await vm.storage.start()
    assert not vm.volumes["private"].pool.state("appvms/work/private").is_used()


async def test_who_is_cancelled_leaves_it_empty_or_whole(app, template):
    vm = await empty(app, template, name="work")
    volume = vm.volumes["private"]

    async def check():
        done = await asyncio.to_thread(
            subprocess.run, ["e2fsck", "-fn", volume.files.clean], capture_output=True
        )
        assert done.returncode == 0 or not any(volume.files.clean.read_bytes())
        assert not volume.pool.state(volume.vid).is_used()
        await fill(vm, lambda _path: None)

    async def start():
        await vm.storage.start()
        await to_its_end(vm.storage.stop())

    assert await cancelled_everywhere(start, check) >= 9


async def resize(vm, volume, size):
    await vm.storage.resize(volume, size)


async def import_bytes(vm, volume, size):
    async with vm.storage.importing(volume, size):
        pass


async def import_another(vm, volume, size):
    source = volume.pool.init_volume(
        vm, {"name": "extra", "size": size, "rw": True, "save_on_stop": True}
    )
    await source.create()
    await vm.storage.import_volume(volume, source)


async def create_in_its_stead(vm, volume, size):
    sizes = {volume.name: {"size": size}}
    await vm.app.create_vm(
        "TemplateVM", name="larger", label="red", volume_config=sizes
    )


@pytest.mark.parametrize("size", [(1 << 40) + 1, 1 << 43])
@pytest.mark.parametrize("name", ["root", "private"])
@pytest.mark.parametrize(
    "act", [resize, import_bytes, import_another, create_in_its_stead]
)
async def test_a_size_that_a_filesystem_does_not_reach_is_refused(
    template, name, size, act
):
    await template.create_on_disk()
    volume = template.volumes[name]
    before = volume.size, volume.revisions, await volume.pool.find_volumes()
    with pytest.raises(InvalidSizeError, match="grows to 1099511627776 bytes at most"):
        await act(template, volume, size)
    found = await volume.pool.find_volumes()
    there = {vid for vid in found if not vid.endswith("/extra")}
    assert (volume.size, volume.revisions, there) == (*before[:2], set(before[2]))
    assert "larger" not in template.app.domains


@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - 1])
@pytest.mark.parametrize("act", [resize, import_bytes, create_in_its_stead])
async def test_so_is_one_that_no_file_reaches(template, size, act):
    await template.create_on_disk()
    with pytest.raises(InvalidSizeError):
        await act(template, template.volumes["private"], size)
