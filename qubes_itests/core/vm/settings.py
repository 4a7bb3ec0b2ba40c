"""The values of settings of VMs: what each takes, and what it is by default.

The settings themselves are declared in the classes; `QubesVM` has most of them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from qubes_itests.core import config
from qubes_itests.core.network.addresses import upstream
from qubes_itests.core.properties import to_int

if TYPE_CHECKING:
    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.base import BaseVM
    from qubes_itests.core.vm.qubesvm import QubesVM

__all__ = [
    "check_for_dispvms",
    "check_netvm",
    "check_provides_network",
    "default_kernel_options",
    "default_max_memory",
    "default_netvm",
    "default_virt_mode",
    "kernel_name",
    "kernel_options",
    "keyboard_layout",
    "max_memory",
    "memory",
    "positive",
    "timestamp",
    "user",
    "virt_mode",
]

_MOST_MEMORY: Final = 10
_MOST_OPTIONS: Final = 512
_KERNEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_LAYOUT: Final = re.compile(r"[a-zA-Z0-9]+\+[a-zA-Z0-9-_]*\+[a-zA-Z0-9:_,-]*")
_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,+-]{0,31}")


def positive(_holder: object, _prop: object, value: object) -> int:
    """Setter of whole numbers above 0."""
    number = to_int(value)
    if number <= 0:
        raise ValueError("expected a whole number above 0")
    return number


def memory(vm: QubesVM, prop: object, value: object) -> int:
    """Setter of `memory`: a tenth of maxmem at least."""
    number = positive(vm, prop, value)
    if vm.property_is_default("maxmem") or vm.app.loading:
        return number
    if vm.maxmem > _MOST_MEMORY * number:
        raise ValueError(
            f"maxmem is {vm.maxmem} MiB, which may be {_MOST_MEMORY} x memory at most:"
            " lower it first"
        )
    return number


def max_memory(vm: QubesVM, _prop: object, value: object) -> int:
    """Setter of `maxmem`: ten times the memory at most; 0 for no balancing."""
    number = to_int(value)
    most = _MOST_MEMORY * vm.memory
    # a store may be older than the rule that memory is not lowered either
    if number < 0 or (number > most and not vm.app.loading):
        raise ValueError(
            f"expected MiB from 0 (no balancing) to {_MOST_MEMORY} x memory,"
            f" here {most}"
        )
    return number


def default_max_memory(vm: QubesVM) -> int:
    """Return the template's, as far as the VM's own memory lets it have that."""
    template = vm.template_or_none
    most = config.defaults["maxmem"] if template is None else template.maxmem
    return min(most, _MOST_MEMORY * vm.memory)


def _has_pci(vm: BaseVM) -> bool:
    return any(vm.devices["pci"].get_assigned_devices())


def virt_mode(vm: QubesVM, _prop: object, value: object) -> str:
    """Setter of `virt_mode`."""
    mode = str(value).lower()
    if mode not in ("pvh", "hvm"):
        raise ValueError("expected pvh or hvm")
    if mode == "pvh" and _has_pci(vm):
        raise ValueError("PCI devices are assigned to it: expected hvm")
    return mode


def default_virt_mode(vm: QubesVM) -> str:
    """Return hvm where PCI devices ask for it, else the template's, else pvh."""
    if _has_pci(vm):
        return "hvm"
    template = vm.template_or_none
    return "pvh" if template is None else template.virt_mode


def kernel_name(holder: Qubes | QubesVM, _prop: object, value: object) -> str | None:
    """Setter of the name of one of the app's kernels; nothing stands for none."""
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not _KERNEL.fullmatch(value):
        raise ValueError("the name of a kernel has letters, digits and . _ + - only")
    app = holder.app
    # a store may come from an app that had more of them
    if value not in app.kernels and not app.loading:
        known = ", ".join(app.kernels) or "none"
        raise ValueError(f"the app does not have that kernel: it has {known}")
    return value


def kernel_options(_vm: object, _prop: object, value: object) -> str:
    """Setter of `kernelopts`."""
    options = "" if value is None else str(value)
    if len(options) > _MOST_OPTIONS:
        raise ValueError(f"expected at most {_MOST_OPTIONS} characters")
    return options


def default_kernel_options(vm: QubesVM) -> str:
    """Return nothing where no kernel takes them, else the template's."""
    if vm.kernel is None:
        return ""
    if _has_pci(vm):
        return config.defaults["kernelopts_pcidevs"]
    template = vm.template_or_none
    return config.defaults["kernelopts"] if template is None else template.kernelopts


def user(_vm: object, _prop: object, value: object) -> str:
    """Setter of names of users of a guest."""
    if not isinstance(value, str) or not _USER.fullmatch(value):
        raise ValueError("the name of a user has letters, digits and _ . , + - only")
    return value


def timestamp(_vm: object, _prop: object, value: object) -> int | None:
    """Setter of times, whole seconds since the epoch; None for never."""
    if value is None:
        return None
    number = to_int(value)
    if number < 0:
        raise ValueError("expected whole seconds since the epoch")
    return number


def keyboard_layout(_vm: object, _prop: object, value: object) -> str:
    """Setter of layouts of keyboards: LAYOUT+VARIANT+OPTIONS."""
    if not isinstance(value, str) or not _LAYOUT.fullmatch(value):
        raise ValueError("expected LAYOUT+VARIANT+OPTIONS, as in us++")
    return value


def check_for_dispvms(_holder: object, vm: BaseVM) -> None:
    """Raise ValueError for a VM that disposable VMs cannot be made from."""
    if not vm.makes_disposables:
        raise ValueError(f"{vm} has not template_for_dispvms set")


def check_provides_network(_holder: object, vm: BaseVM) -> None:
    """Raise ValueError for a VM that connects no others to the network."""
    if not vm.is_net_vm:
        raise ValueError(f"{vm} has not provides_network set")


def check_netvm(vm: QubesVM, found: QubesVM) -> None:
    """Raise ValueError for what cannot be the net VM of a VM, as by way of a loop."""
    # in what is loaded, a default that would be a loop is none when all is there
    above = _set_upstream(found) if vm.app.loading else [found, *upstream(found)]
    if vm in above:
        raise ValueError(f"{vm} would be its own net VM by way of {found}")
    check_provides_network(vm, found)


def default_netvm(vm: QubesVM) -> QubesVM | None:
    """Return the app's choice, and None where that would be a loop."""
    if not vm.provides_network:
        return vm.app.default_netvm
    found = vm.app.default_fw_netvm
    return None if vm in _set_upstream(found) else found


def _set_upstream(vm: QubesVM | None) -> list[QubesVM]:
    """Return a VM, its net VM, and so on, as far as these are set and no default."""
    above: list[QubesVM] = []
    while vm is not None and vm not in above:
        above.append(vm)
        vm = None if vm.property_is_default("netvm") else vm.netvm
    return above
