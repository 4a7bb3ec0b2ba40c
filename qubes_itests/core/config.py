"""The constants of the core."""

from __future__ import annotations

from typing import Final, TypedDict

__all__ = [
    "defaults",
    "dispvm_prefix",
    "max_dispid",
    "max_qid",
    "qubes_base_dir",
    "system_path",
    "vm_name_length",
]

_GIB: Final = 1024**3

#: The highest number that a VM may have; its two bytes are a part of its IP address.
max_qid: Final = 65_000

#: The highest number in the name of a disposable VM.
max_dispid: Final = 9999

#: What comes before that number.
dispvm_prefix: Final = "disp"

#: How many characters a VM's name may have.
vm_name_length: Final = 31

#: Where Qubes OS keeps its state. Nothing of this core is there.
qubes_base_dir: Final = "/var/lib/qubes"

#: Names below that directory, and of programs, in Qubes OS.
system_path: Final[dict[str, str]] = {
    "qrexec_client_path": "/usr/bin/qrexec-client",
    "qrexec_daemon_path": "/usr/sbin/qrexec-daemon",
    "qubes_appvms_dir": "appvms",
    "qubes_kernels_base_dir": "vm-kernels",
    "qubes_store_filename": "qubes.xml",
    "qubes_templates_dir": "vm-templates",
}


class Defaults(TypedDict):
    """Of properties and volumes: memory in MiB, sizes in bytes, times in seconds."""

    memory: int
    hvm_memory: int
    maxmem: int
    vcpus: int
    kernelopts: str
    kernelopts_pcidevs: str
    qrexec_timeout: int
    shutdown_timeout: int
    root_img_size: int
    private_img_size: int
    volatile_img_size: int


#: What properties and volumes are as long as nobody sets them.
defaults: Final[Defaults] = {
    "memory": 400,
    "hvm_memory": 400,
    # there is balancing only where a run has a memory budget, and a VM asks for it
    "maxmem": 0,
    "vcpus": 2,
    "kernelopts": "swiotlb=2048",
    "kernelopts_pcidevs": "",
    "qrexec_timeout": 60,
    "shutdown_timeout": 60,
    "root_img_size": 10 * _GIB,
    "private_img_size": 2 * _GIB,
    "volatile_img_size": 1 * _GIB,
}
