"""The Xen XML of a core, read."""

import re
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.dom0.xen_xml import read_disk, read_domain, with_disks
from qubes_itests.hypervisor.contract import Disk

UUID = uuid.UUID(int=7)
DISK = "<disk><source dev='/x/a.img'/><target dev='xvdi'/><readonly/></disk>"


def definition(memory="<memory unit='MiB'>400</memory>", devices="", kernel=""):
    return (
        f"<domain type='xen'><name>work</name><uuid>{UUID}</uuid>{memory}"
        f"<vcpu>2</vcpu><os>{kernel}</os><devices>{devices}</devices></domain>"
    )


def test_a_definition_of_core_admin():
    kernel = "<kernel>/k/tiny/vmlinuz</kernel>"
    kernel += "<cmdline>systemd.machine_id=07 quiet  a=b</cmdline>"
    devices = f"{DISK}<interface/><console/><hostdev/><emulator/>"
    found = read_domain(definition(devices=devices, kernel=kernel))
    assert (found.name, found.uuid, found.vcpus) == ("work", UUID, 2)
    assert found.kernel == Path("/k/tiny/vmlinuz")
    assert found.disks == (Disk("xvdi", Path("/x/a.img"), read_only=True),)
    # an identity would make the saved state of each VM another one
    assert found.kernel_options == "quiet a=b"
    assert found.unsupported == ("hostdev",)


@pytest.mark.parametrize(
    ("memory", "sizes"),
    [
        ("<memory unit='MiB'>400</memory>", (400, 400)),
        # in KiB, as libvirt has it where no unit is said
        ("<memory>409600</memory>", (400, 400)),
        (
            "<memory unit='GiB'>4</memory><currentMemory>409600</currentMemory>",
            (400, 4096),
        ),
        (
            "<memory unit='MiB'>400</memory><maxMemory unit='MiB'>900</maxMemory>",
            (400, 900),
        ),
    ],
)
def test_memory_at_the_start_and_at_most(memory, sizes):
    found = read_domain(definition(memory))
    assert (found.memory, found.max_memory) == sizes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<domain", "expected XML"),
        ("<network/>", "expected <domain>, got <network>"),
        ("<domain><name>work</name></domain>", "expected <uuid> in <domain>"),
        (definition("<memory unit='TB'>1</memory>"), "expected one of KiB, MiB, GiB"),
        (definition(devices="<disk/>"), "expected a disk with source and target"),
    ],
)
def test_bad_definitions_are_told_so(text, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        read_domain(text)


@given(st.text(max_size=60))
def test_any_other_text_is_a_value_error(text):
    for read in (read_domain, read_disk):
        with pytest.raises(ValueError, match="expected"):
            read(text)


def test_disks_of_other_vms_are_borrowed():
    """The definition of a domain that runs has those that are attached, and no more."""
    own = DISK.replace("xvdi", "xvda")
    borrowed = DISK.replace("<disk>", "<disk><backenddomain name='usb'/>")
    config = read_domain(definition(devices=own + borrowed))
    assert [disk.name for disk in config.disks] == ["xvda"]
    assert [read_disk(text) for text in config.borrowed] == [
        (Disk("xvdi", Path("/x/a.img"), read_only=True), "usb")
    ]
    assert read_domain(with_disks(config, [])).borrowed == ()
    assert len(read_domain(with_disks(config, config.borrowed)).borrowed) == 1


def test_a_cdrom_is_a_disk_that_can_be_read_only():
    disk = "<disk device='cdrom'><source dev='/a'/><target dev='xvdd'/></disk>"
    assert read_disk(disk) == (Disk("xvdd", Path("/a"), read_only=True), "")


@pytest.mark.parametrize("name", ["sda", "xvd", "xvdaa", "xvd1"])
def test_a_disk_that_no_guest_here_can_have(name):
    with pytest.raises(ValueError, match=f"xvda to xvdz, got '{name}'"):
        read_disk(DISK.replace("xvdi", name))


def test_attached_disks_are_seen_in_the_definition():
    config = read_domain(definition())
    assert read_domain(with_disks(config, [DISK])).disks == (read_disk(DISK)[0],)
    assert read_domain(with_disks(config, [])).disks == ()
