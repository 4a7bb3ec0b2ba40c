"""The Xen XML of a core, read."""

import re
import uuid
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.dom0.xen_xml import (
    InterfaceConfig,
    read_device,
    read_domain,
    with_devices,
)
from qubes_itests.hypervisor.contract import Disk

UUID = uuid.UUID(int=7)
DISK = "<disk><source dev='/x/a.img'/><target dev='xvdi'/><readonly/></disk>"

INTERFACE = (
    "<interface type='ethernet'><mac address='00:16:3E:5e:6c:00'/>"
    "<ip address='10.137.0.5'/><backenddomain name='sys-net'/></interface>"
)


def definition(memory="<memory unit='MiB'>400</memory>", devices="", kernel=""):
    return (
        f"<domain type='xen'><name>work</name><uuid>{UUID}</uuid>{memory}"
        f"<vcpu>2</vcpu><os>{kernel}</os><devices>{devices}</devices></domain>"
    )


def test_a_definition_of_core_admin():
    kernel = "<kernel>/k/tiny/vmlinuz</kernel>"
    kernel += "<cmdline>systemd.machine_id=07 quiet  a=b</cmdline>"
    devices = f"{DISK}{INTERFACE}<console/><hostdev/><emulator/>"
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
    for read in (read_domain, read_device):
        with pytest.raises(ValueError, match="expected"):
            read(text)


def test_disks_of_other_vms_are_borrowed():
    """The definition of a domain that runs has those that are attached, and no more."""
    own = DISK.replace("xvdi", "xvda")
    borrowed = DISK.replace("<disk>", "<disk><backenddomain name='usb'/>")
    config = read_domain(definition(devices=own + borrowed))
    assert [disk.name for disk in config.disks] == ["xvda"]
    assert [read_device(text) for text in config.borrowed] == [
        (Disk("xvdi", Path("/x/a.img"), read_only=True), "usb")
    ]
    assert read_domain(with_devices(config, [])).borrowed == ()
    assert len(read_domain(with_devices(config, config.borrowed)).borrowed) == 1


def test_a_cdrom_is_a_disk_that_can_be_read_only():
    disk = "<disk device='cdrom'><source dev='/a'/><target dev='xvdd'/></disk>"
    assert read_device(disk) == (Disk("xvdd", Path("/a"), read_only=True), "")


@pytest.mark.parametrize("name", ["sda", "xvd", "xvdaa", "xvd1"])
def test_a_disk_that_no_guest_here_can_have(name):
    with pytest.raises(ValueError, match=f"xvda to xvdz, got '{name}'"):
        read_device(DISK.replace("xvdi", name))


def test_attached_disks_are_seen_in_the_definition():
    config = read_domain(definition())
    assert read_domain(with_devices(config, [DISK])).disks == (read_device(DISK)[0],)
    assert read_domain(with_devices(config, [])).disks == ()


def test_an_interface_to_a_net_vm():
    found = InterfaceConfig(
        "00:16:3e:5e:6c:00", IPv4Address("10.137.0.5"), None, "sys-net"
    )
    assert read_device(INTERFACE) == found
    more = "<ip address='fd09:24ef:4179::a89:5' family='ipv6'/></interface>"
    ip6 = read_device(INTERFACE.replace("</interface>", more)).ip6
    assert ip6 == IPv6Address("fd09:24ef:4179::a89:5")


def test_interfaces_are_seen_in_the_definition_while_they_are_attached():
    config = read_domain(definition(devices=DISK + INTERFACE))
    assert [read_device(text) for text in config.borrowed] == [read_device(INTERFACE)]
    assert read_domain(with_devices(config, [])).borrowed == ()
    again = read_domain(with_devices(config, config.borrowed))
    assert len(again.borrowed) == len(again.disks) == 1


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("<mac address='00:16:3E:5e:6c:00'/>", "got '', 'sys-net'"),
        (":5e:6c:00", "expected an interface with mac"),
        ("<backenddomain name='sys-net'/>", "got '00:16:3e:5e:6c:00', ''"),
        ("<ip address='10.137.0.5'/>", "Address cannot be empty"),
    ],
)
def test_an_interface_that_lacks_something(gone, told):
    with pytest.raises(ValueError, match=told):
        read_device(INTERFACE.replace(gone, ""))
