# ruff: noqa: S314 - the XML is our own
"""Domain definitions carry the spec, and nothing in it can break out."""

from __future__ import annotations

import dataclasses
import platform
import socket
import uuid
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from qubes_itests.hypervisor.contract import Disk, DomainSpec, Interface
from qubes_itests.hypervisor.devices import find_device, plugged_in
from qubes_itests.hypervisor.domain_xml import (
    Machine,
    disk_xml,
    domain_xml,
    interface_xml,
)
from qubes_itests.hypervisor.tsc import tsc_rate

MACHINE = Machine(kvm=False, emulator=Path("/usr/bin/qemu-system-x86_64"))
DISK = Disk("xvdb", Path("/images/<odd> & 'name'.img"))
INTERFACE = Interface("00:16:3e:00:00:01", "br0")
SPEC = DomainSpec(
    name="work",
    uuid=uuid.UUID("6ad6e1a5-7a0b-4e0f-a2f1-7a6a3d8b0a11"),
    directory=Path("/run/work"),
    memory=200,
    max_memory=400,
    vcpus=2,
    kernel=Path("/boot/vmlinuz"),
    initramfs=Path("/boot/initramfs"),
    kernel_options='odd="</cmdline>"',
    disks=(DISK,),
    interfaces=(INTERFACE,),
)


def parse(**options):
    return ET.fromstring(domain_xml(SPEC, MACHINE, **options))


def test_the_spec_is_in_it():
    root = parse()
    assert root.get("type") == "qemu"
    assert root.findtext("name") == "work"
    assert root.findtext("uuid") == str(SPEC.uuid)
    assert (root.findtext("memory"), root.findtext("currentMemory")) == ("400", "200")
    assert root.findtext("vcpu") == "2"
    assert root.findtext("os/kernel") == "/boot/vmlinuz"
    assert root.findtext("os/cmdline").endswith(SPEC.kernel_options)
    port = root.find("devices/channel")
    assert port.find("target").get("name") == "org.qubes_itests.agent"
    assert port.find("source").get("path") == "/run/work/agent.sock"


def test_kvm():
    machine = dataclasses.replace(MACHINE, kvm=True)
    root = ET.fromstring(domain_xml(SPEC, machine))
    assert root.get("type") == "kvm"
    assert root.find("cpu").get("mode") == "host-passthrough"


@pytest.mark.parametrize("kvm", [True, False])
def test_processes_lie_at_the_same_addresses_where_code_is_translated(kvm):
    root = ET.fromstring(domain_xml(SPEC, dataclasses.replace(MACHINE, kvm=kvm)))
    assert ("norandmaps" in root.findtext("os/cmdline").split()) is not kvm


@pytest.mark.parametrize("kvm", [True, False])
def test_kernels_that_are_emulated_are_told_the_rate_of_the_counter(kvm):
    machine = dataclasses.replace(MACHINE, kvm=kvm, tsc_khz=2_300_000)
    options = ET.fromstring(domain_xml(SPEC, machine)).findtext("os/cmdline").split()
    assert ("tsc_early_khz=2300000" in options) is not kvm


@pytest.mark.parametrize("kvm", [True, False])
def test_an_emulated_cpu_looks_after_the_port_itself(kvm):
    text = domain_xml(SPEC, dataclasses.replace(MACHINE, kvm=kvm))
    assert ("virtio-serial-pci.ioeventfd=off" in text) is not kvm


@pytest.mark.skipif(platform.machine() != "x86_64", reason="has no such counter")
def test_the_rate_of_the_counter_is_about_the_same_each_time():
    rates = [tsc_rate() for _ in range(5)]
    assert max(rates) - min(rates) <= 5000
    assert 500_000 < min(rates) < 10_000_000


@pytest.mark.parametrize(("direct", "cache"), [(True, "none"), (False, "writeback")])
def test_disks(direct, cache):
    disk = ET.fromstring(disk_xml(DISK, direct=direct))
    assert disk.find("source").get("file") == str(DISK.path)
    assert disk.find("target").attrib == {"dev": "sdb", "bus": "scsi"}
    assert disk.findtext("serial") == "xvdb"
    assert disk.find("driver").get("cache") == cache
    assert disk.find("driver").get("discard") == "unmap"
    assert disk.find("readonly") is None
    read_only = dataclasses.replace(DISK, read_only=True)
    assert ET.fromstring(disk_xml(read_only, direct=True)).find("readonly") is not None


def test_interfaces():
    """In a bridge, or in a tap that libvirt must neither make nor configure."""
    in_bridge = ET.fromstring(interface_xml(INTERFACE))
    assert in_bridge.get("type") == "bridge"
    assert in_bridge.find("source").get("bridge") == "br0"
    assert in_bridge.find("target") is None
    in_tap = ET.fromstring(interface_xml(Interface(INTERFACE.mac, tap="qt1")))
    assert in_tap.get("type") == "ethernet"
    assert in_tap.find("target").attrib == {"dev": "qt1", "managed": "no"}
    assert in_tap.find("source") is None


def test_the_kernel_moves_packets_where_it_can():
    """By vhost-net, which libvirt takes under KVM, if it is there.

    Told to take it, libvirt would refuse interfaces where it is not there.
    """
    element = ET.fromstring(interface_xml(Interface(INTERFACE.mac, tap="qt1")))
    assert element.find("model").get("type") == "virtio"
    assert element.find("driver") is None


def test_a_domain_that_loads_a_state_is_told_to_wait_for_it():
    root = parse(incoming="defer")
    argument = "{http://libvirt.org/schemas/domain/qemu/1.0}commandline/*"
    values = [element.get("value") for element in root.findall(argument)]
    assert values[-2:] == ["-incoming", "defer"]
    assert "-incoming" not in [e.get("value") for e in parse().findall(argument)]


def test_what_a_frozen_domain_has_is_where_it_was():
    """A disk by its name, for which no controller is added; an interface as told."""
    address = ET.fromstring(disk_xml(Disk("xvdi", Path("/d")), direct=True)).find(
        "address"
    )
    assert (address.get("controller"), address.get("target")) == ("0", "8")
    assert ET.fromstring(interface_xml(INTERFACE)).find("address") is None
    placed = ET.fromstring(interface_xml(dataclasses.replace(INTERFACE, place=3)))
    assert placed.find("address").get("bus") == "0x03"


def test_the_machine_does_not_depend_on_the_disks():
    """What is hot-plugged finds the slots that a cold start would have used."""
    bare = dataclasses.replace(SPEC, disks=(), interfaces=())
    addresses = [
        [ET.tostring(e) for e in ET.fromstring(xml).iterfind(".//address[@type='pci']")]
        for xml in (domain_xml(SPEC, MACHINE), domain_xml(bare, MACHINE))
    ]
    assert addresses[0] == addresses[1] != []


def test_devices_are_found_by_name_and_address():
    xml = domain_xml(SPEC, MACHINE)
    assert find_device(xml, "disk", "xvdb").get("device") == "disk"
    assert find_device(xml, "interface", INTERFACE.mac) is not None
    assert find_device(xml, "disk", "xvda") is None
    assert find_device(xml, "interface", "00:16:3e:00:00:02") is None


def test_a_clone_has_memory_that_only_the_library_opens():
    """The path leads nowhere without it, and no part of it can be an option."""
    machine = dataclasses.replace(MACHINE, memory_library=Path("/run/library.so"))
    file = Path("/cache/a,share=on")
    text = domain_xml(SPEC, machine, incoming="defer", memory_file=file)
    line = ET.fromstring(text).find("{*}commandline")
    values = [argument.get("value") for argument in line.findall("{*}arg")]
    assert values[1] == (
        "memory-backend-file,share=off,"
        "mem-path=/proc/qubes_itests/read-only/cache/a,,share=on,id=memory,size=400M"
    )
    environment = line.find("{*}env")
    assert environment.attrib == {"name": "LD_PRELOAD", "value": "/run/library.so"}


def test_a_disk_behind_a_socket(tmp_path):
    """And back: where it is, is what a domain that is frozen has to be thawed with."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "nbd"))
        disk = Disk("xvdi", tmp_path / "nbd", read_only=True)
        xml = disk_xml(disk, direct=False)
    element = ET.fromstring(xml)
    assert (element.get("type"), element.find("source").get("protocol")) == (
        "network",
        "nbd",
    )
    definition = f"<domain><devices>{xml}</devices></domain>"
    assert plugged_in(definition) == ((disk,), ())
