"""The constants of the core."""

from __future__ import annotations

from typing import Final

__all__ = ["defaults", "dispvm_prefix", "max_dispid", "max_qid", "vm_name_length"]

_GIB: Final = 1024**3

#: The highest number that a VM may have; its two bytes are a part of its IP address.
max_qid: Final = 65_000

#: The highest number in the name of a disposable VM.
max_dispid: Final = 9999

#: What comes before that number.
dispvm_prefix: Final = "disp"

#: How many characters a VM's name may have.
vm_name_length: Final = 31

#: Defaults of properties and volumes: memory in MiB, sizes in bytes, times in seconds.
defaults: Final[dict[str, int]] = {
    "memory": 400,
    "maxmem": 0,
    "vcpus": 1,
    "qrexec_timeout": 60,
    "shutdown_timeout": 60,
    "root_img_size": 10 * _GIB,
    "private_img_size": 2 * _GIB,
    "volatile_img_size": 1 * _GIB,
}
