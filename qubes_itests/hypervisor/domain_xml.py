"""Domain definitions for libvirt's QEMU driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.hypervisor.contract import Disk, DomainSpec, Interface

__all__ = [
    "CHANNEL_NAME",
    "KERNEL_OPTIONS",
    "SPARE_PORTS",
    "Machine",
    "channel_path",
    "console_pipe",
    "disk_xml",
    "domain_xml",
    "interface_xml",
    "memory_arguments",
]

#: The virtio-serial port on which the guest's agent listens.
CHANNEL_NAME = "org.qubes_itests.agent"

#: QEMU's XML namespace of libvirt, for what libvirt has no element for.
_QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
ET.register_namespace("qemu", _QEMU)

#: QEMU's name for a domain's memory; a state names it too.
_MEMORY = "memory"
#: What shared_memory.c knows a file by that may only be read.
_READ_ONLY = "/proc/qubes_itests/read-only"

#: Ports that wait for a hot-plugged device; a network interface takes one each.
SPARE_PORTS = 4

#: libvirt puts its own devices below this slot.
_FIRST_SLOT = 0x10

#: The kernel command line that all domains begin with. `cryptomgr` and the blacklist
#: skip self-tests, probes and certificates that cost the better part of a second under
#: emulation; a kernel that does not know these names ignores them. The last two let a
#: balloon take what an idle guest of 4000 MiB keeps else: 64 MiB of buffers that no
#: device here needs, and 110 MiB kept free in proportion to what it booted with.
KERNEL_OPTIONS = (
    "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off"
    " random.trust_cpu=on 8250.nr_uarts=1 nokaslr cryptomgr.notests"
    " initcall_blacklist=init_kprobe_trace,load_system_certificate_list"
    " swiotlb=noforce sysctl.vm.min_free_kbytes=8192"
)

#: More of it under emulation: QEMU finds what it has translated by its address, so code
#: that lies elsewhere in each process is translated anew for each.
_EMULATION_OPTIONS = "norandmaps"


@dataclass(frozen=True, slots=True)
class Machine:
    """What all domains of a hypervisor share.

    :param kvm: hardware virtualisation, else emulation.
    :param emulator: the QEMU program.
    :param machine: QEMU's machine type.
    :param cpu: QEMU's CPU model under emulation. A model without ERMS: emulated
        string moves are several times slower than emulated loops.
    :param tsc_khz: rate of its time-stamp counter under emulation, None if unknown.
    :param memory_library: see shared_memory.c; None where clones have no memory in
        common.
    """

    kvm: bool
    emulator: Path
    machine: str = "q35"
    cpu: str = "Nehalem"
    tsc_khz: int | None = None
    memory_library: Path | None = None


def channel_path(spec: DomainSpec) -> Path:
    """Return the socket on which QEMU offers the agent's port."""
    return spec.directory / "agent.sock"


def console_pipe(spec: DomainSpec) -> Path:
    """Return the path that QEMU is given for its console, without `.in`, `.out`."""
    return spec.directory / "console.pipe"


def domain_xml(
    spec: DomainSpec,
    machine: Machine,
    *,
    direct_disks: frozenset[str] = frozenset(),
    incoming: str | None = None,
    memory_file: Path | None = None,
) -> str:
    """Return the definition of a domain.

    :param direct_disks: names of the disks whose files can be opened with O_DIRECT.
    :param incoming: QEMU's address of a saved state to start from.
    :param memory_file: what its memory is: the file itself, or with `incoming` a copy
        on write of it.
    """
    root = ET.Element("domain", type="kvm" if machine.kvm else "qemu")
    _add(root, "name", spec.name)
    _add(root, "uuid", str(spec.uuid))
    _add(root, "memory", str(spec.max_memory), unit="MiB")
    _add(root, "currentMemory", str(spec.memory), unit="MiB")
    _add(root, "vcpu", str(spec.vcpus))
    root.append(_os(spec, machine))
    _add(_add(root, "features"), "acpi")
    root.append(_cpu(machine))
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        _add(root, event, "destroy")
    devices = _devices(spec, machine)
    root.append(devices)
    root.append(_capabilities())
    arguments = memory_arguments(
        spec.max_memory, memory_file, writable=incoming is None
    )
    devices.extend(_disk(d, direct=d.name in direct_disks) for d in spec.disks)
    devices.extend(_interface(interface) for interface in spec.interfaces)
    if not machine.kvm:
        # The emulated CPU is one of QEMU's threads, and looks after the guest's port
        # itself: to wake another thread for that takes longer than the work.
        arguments += ["-global", "virtio-serial-pci.ioeventfd=off"]
    if incoming is not None:
        arguments += ["-incoming", incoming]
    line = ET.SubElement(root, f"{{{_QEMU}}}commandline")
    for argument in arguments:
        ET.SubElement(line, f"{{{_QEMU}}}arg", value=argument)
    if memory_file is not None and incoming is not None:
        library = str(machine.memory_library)
        ET.SubElement(line, f"{{{_QEMU}}}env", name="LD_PRELOAD", value=library)
    return ET.tostring(root, encoding="unicode")


def memory_arguments(size: int, file: Path | None, *, writable: bool) -> list[str]:
    """Return QEMU's arguments for a domain's memory.

    libvirt's own element would name the file after the domain.

    :param size: MiB.
    :param file: what it is kept in; None for none.
    :param writable: whether the file is the memory, or what is copied on write.
    """
    kind = "memory-backend-ram"
    if file is not None:
        path = str(file) if writable else f"{_READ_ONLY}{file}"
        share = "on" if writable else "off"
        kind = f"memory-backend-file,share={share},mem-path={path.replace(',', ',,')}"
    backend = f"{kind},id={_MEMORY},size={size}M"
    return ["-object", backend, "-machine", f"memory-backend={_MEMORY}"]


def disk_xml(disk: Disk, *, direct: bool) -> str:
    """Return the device element of a disk; `direct`: O_DIRECT works for its file."""
    return ET.tostring(_disk(disk, direct=direct), encoding="unicode")


def interface_xml(interface: Interface) -> str:
    """Return the device element of a network interface."""
    return ET.tostring(_interface(interface), encoding="unicode")


def _add(parent: ET.Element, tag: str, text: str = "", **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = text or None
    return element


def _os(spec: DomainSpec, machine: Machine) -> ET.Element:
    element = ET.Element("os")
    _add(element, "type", "hvm", arch="x86_64", machine=machine.machine)
    if spec.kernel is None:
        _add(element, "boot", dev="hd")
        return element
    _add(element, "kernel", str(spec.kernel))
    _add(element, "initrd", str(spec.initramfs))
    options = [KERNEL_OPTIONS, spec.kernel_options]
    if not machine.kvm:
        options.insert(1, _EMULATION_OPTIONS)
    if not machine.kvm and machine.tsc_khz is not None:
        # On a busy machine a kernel that measures it may find a fraction. The clock is
        # then several times too fast, for ever, and so is that of each clone.
        options.insert(2, f"tsc_early_khz={machine.tsc_khz}")
    _add(element, "cmdline", " ".join(options).strip())
    return element


def _cpu(machine: Machine) -> ET.Element:
    if machine.kvm:
        return ET.Element("cpu", mode="host-passthrough", migratable="on")
    element = ET.Element("cpu", mode="custom", match="exact", check="none")
    _add(element, "model", machine.cpu, fallback="forbid")
    # The kernel's random pool is then ready at once.
    _add(element, "feature", policy="require", name="rdrand")
    return element


def _devices(spec: DomainSpec, machine: Machine) -> ET.Element:
    devices = ET.Element("devices")
    _add(devices, "emulator", str(machine.emulator))
    _add(devices, "controller", type="usb", model="none")
    _place(_add(devices, "controller", type="virtio-serial", ports="2"), 1)
    _place(_add(devices, "controller", type="scsi", model="virtio-scsi"), 2)
    _add(devices, "controller", type="pci", index="0", model="pcie-root")
    for index in range(1, 1 + SPARE_PORTS):
        port = _add(devices, "controller", type="pci", model="pcie-root-port")
        port.set("index", str(index))
    console = _add(devices, "serial", type="pipe")
    _add(console, "source", path=str(console_pipe(spec)))
    _add(console, "target", port="0")
    channel = _add(devices, "channel", type="unix")
    _add(channel, "source", mode="bind", path=str(channel_path(spec)))
    _add(channel, "target", type="virtio", name=CHANNEL_NAME)
    balloon = _add(devices, "memballoon", model="virtio", freePageReporting="on")
    _add(balloon, "stats", period="1")
    _place(balloon, 3)
    random = _add(devices, "rng", model="virtio")
    _add(random, "backend", "/dev/urandom", model="random")
    _place(random, 4)
    _add(devices, "panic", model="isa")
    return devices


def _place(device: ET.Element, slot: int) -> None:
    """Put a device on the root bus, so that it takes none of the spare ports."""
    address = _add(device, "address", type="pci", bus="0x00")
    address.set("slot", f"0x{_FIRST_SLOT + slot:02x}")


def _disk(disk: Disk, *, direct: bool) -> ET.Element:
    kind = "block" if disk.path.is_block_device() else "file"
    if disk.path.is_socket():
        kind = "network"
    element = ET.Element("disk", type=kind, device="disk")
    driver = _add(element, "driver", name="qemu", type="raw")
    driver.set("cache", "none" if direct else "writeback")
    driver.set("discard", "unmap")
    driver.set("detect_zeroes", "unmap")
    # Else a full disk of the host stops the guest, and nobody is told.
    driver.set("error_policy", "report")
    if kind == "network":
        source = _add(element, "source", protocol="nbd")
        _add(source, "host", transport="unix", socket=str(disk.path))
    else:
        source = _add(element, "source")
        source.set("dev" if kind == "block" else "file", str(disk.path))
    _add(element, "target", dev=_target(disk.name), bus="scsi")
    _add(element, "serial", disk.name)
    # One target each. By itself libvirt has another controller for each seven of them,
    # which takes a port of an interface.
    place = _add(element, "address", type="drive", controller="0", bus="0", unit="0")
    place.set("target", str(ord(disk.name[-1]) - ord("a")))
    if disk.read_only:
        _add(element, "readonly")
    return element


def _target(name: str) -> str:
    return "sd" + name.removeprefix("xvd")


def _interface(interface: Interface) -> ET.Element:
    kind = "ethernet" if interface.tap else "bridge"
    element = ET.Element("interface", type=kind)
    _add(element, "mac", address=interface.mac)
    if interface.tap:
        _add(element, "target", dev=interface.tap, managed="no")
    else:
        _add(element, "source", bridge=interface.bridge)
    _add(element, "model", type="virtio")
    _add(element, "rom", enabled="no")
    if interface.place is not None:
        # libvirt numbers the buses behind the spare ports from 1 on
        _add(
            element, "address", type="pci", bus=f"0x{interface.place:02x}", slot="0x00"
        )
    return element


def _capabilities() -> ET.Element:
    """Have libvirt read a CPU's features in one go.

    With the capability that is taken away here it reads each of some 400 properties
    by itself, which is three quarters of the time that it adds to a start.
    """
    element = ET.Element(f"{{{_QEMU}}}capabilities")
    ET.SubElement(element, f"{{{_QEMU}}}del", capability="cpu-unavailable-features")
    return element
