"""The constants of the core."""

from __future__ import annotations

from typing import Final, TypedDict

__all__ = [
    "Defaults",
    "backup_profile_dir",
    "defaults",
    "dispvm_prefix",
    "max_default_label",
    "max_dispid",
    "max_qid",
    "qmemman_avail_mem_file",
    "qubes_base_dir",
    "qubes_ipv6_prefix",
    "suspend_timeout",
    "system_path",
    "vm_name_length",
]

_GIB: Final = 1024**3

#: The highest number that a VM may have; its two bytes are a part of its IP address.
max_qid: Final = 10_000

#: The numbers in the names of disposable VMs are below this one.
max_dispid: Final = 10_000

#: The highest number of a label that is always there.
max_default_label: Final = 8

#: What comes before that number.
dispvm_prefix: Final = "disp"

#: How many characters a VM's name may have.
vm_name_length: Final = 31

#: Where Qubes OS keeps its state. Nothing of this core is there.
qubes_base_dir: Final = "/var/lib/qubes"

#: The first half of IPv6 addresses of VMs; see `.vm.addresses`.
qubes_ipv6_prefix: Final = "fd09:24ef:4179:0000"

#: Seconds in which a guest has to get ready to be suspended, in Qubes OS.
suspend_timeout: Final = 60

#: Files of Qubes OS that nothing here reads or writes.
backup_profile_dir: Final = "/etc/qubes/backup"
qmemman_avail_mem_file: Final = "/var/run/qubes/qmemman-avail-mem"

#: Names below that directory, and of programs, in Qubes OS.
system_path: Final[dict[str, str]] = {
    "dom0_services_dir": "/var/run/qubes-service",
    "qrexec_client_path": "/usr/bin/qrexec-client",
    "qrexec_daemon_path": "/usr/sbin/qrexec-daemon",
    "qrexec_rpc_multiplexer": "/usr/lib/qubes/qubes-rpc-multiplexer",
    "qubes_appvms_dir": "appvms",
    "qubes_icon_dir": "/usr/share/icons/hicolor/128x128/devices",
    "qubes_kernels_base_dir": "vm-kernels",
    "qubes_store_filename": "qubes.xml",
    "qubes_templates_dir": "vm-templates",
    "qubesdb_daemon_path": "/usr/sbin/qubesdb-daemon",
}


class Defaults(TypedDict):
    """Of properties and volumes: memory in MiB, sizes in bytes, times in seconds."""

    memory: int
    hvm_memory: int
    maxmem: int
    vcpus: int
    kernelopts: str
    kernelopts_pcidevs: str
    kernelopts_common: str
    qrexec_timeout: int
    shutdown_timeout: int
    root_img_size: int
    private_img_size: int
    volatile_img_size: int


#: Defaults of properties and volumes.
defaults: Final[Defaults] = {
    "memory": 400,
    "hvm_memory": 400,
    # there is balancing only where a run has a memory budget, and a VM asks for it
    "maxmem": 0,
    "vcpus": 2,
    "kernelopts": "swiotlb=2048",
    "kernelopts_pcidevs": "",
    "kernelopts_common": "",
    "qrexec_timeout": 60,
    "shutdown_timeout": 60,
    "root_img_size": 10 * _GIB,
    "private_img_size": 2 * _GIB,
    "volatile_img_size": 1 * _GIB,
}
