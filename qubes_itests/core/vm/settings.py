"""The settings of VMs that have a domain: what each means, takes and is by default.

Where nothing else is said, a VM that has a template takes its default from there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core import config
from qubes_itests.core.events import handler
from qubes_itests.core.properties import (
    Property,
    VMProperty,
    stateless_property,
    to_int,
)
from qubes_itests.core.vm.base import BaseVM

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "SettingsMixin",
    "check_for_dispvms",
    "kernel_name",
    "keyboard_layout",
    "positive",
]

_MOST_MEMORY: Final = 10
_MOST_OPTIONS: Final = 512
_KERNEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")

#: What a VM has from its template as long as nobody sets it.
_INHERITED: Final = (
    "memory",
    "maxmem",
    "vcpus",
    "virt_mode",
    "kernel",
    "kernelopts",
    "default_user",
    "qrexec_timeout",
    "shutdown_timeout",
)
_LAYOUT: Final = re.compile(r"[a-zA-Z0-9]+\+[a-zA-Z0-9-_]*\+[a-zA-Z0-9:_,-]*")
_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,+-]{0,31}")


def _of_template(name: str, default: Any) -> Callable[[Any], Any]:
    """Return a default: the template's property, or `default` (of the VM)."""

    def find(vm: Any) -> Any:
        template = getattr(vm, "template", None)
        if template is not None:
            return getattr(template, name)
        return default(vm) if callable(default) else default

    return find


def positive(_holder: object, _prop: object, value: object) -> int:
    """Setter of whole numbers above 0."""
    number = to_int(value)
    if number <= 0:
        raise ValueError("it takes a whole number above 0")
    return number


def _memory(vm: Any, prop: object, value: object) -> int:
    number = positive(vm, prop, value)
    if vm.property_is_default("maxmem") or vm.app.loading:
        return number
    if vm.maxmem > _MOST_MEMORY * number:
        raise ValueError(
            f"maxmem is {vm.maxmem} MiB, which may be {_MOST_MEMORY} x memory at most:"
            " lower it first"
        )
    return number


def _max_memory(vm: Any, _prop: object, value: object) -> int:
    number = to_int(value)
    most = _MOST_MEMORY * vm.memory
    # a store may be older than the rule that memory is not lowered either
    if number < 0 or (number > most and not vm.app.loading):
        raise ValueError(
            f"it takes MiB from 0 (no balancing) to {_MOST_MEMORY} x memory,"
            f" here {most}"
        )
    return number


def _default_max_memory(vm: Any) -> int:
    most: int = _of_template("maxmem", config.defaults["maxmem"])(vm)
    memory: int = vm.memory
    return min(most, _MOST_MEMORY * memory)


def _has_pci(vm: BaseVM) -> bool:
    return any(vm.devices["pci"].get_assigned_devices())


def _virt_mode(vm: BaseVM, _prop: object, value: object) -> str:
    mode = str(value).lower()
    if mode not in ("pvh", "hvm"):
        raise ValueError("it takes pvh or hvm")
    if mode == "pvh" and _has_pci(vm):
        raise ValueError("PCI devices are assigned to it: it takes hvm")
    return mode


def _default_virt_mode(vm: BaseVM) -> str:
    if _has_pci(vm):
        return "hvm"
    mode: str = _of_template("virt_mode", "pvh")(vm)
    return mode


def kernel_name(holder: Any, _prop: object, value: object) -> str | None:
    """Setter of the name of one of the app's kernels; nothing stands for none."""
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not _KERNEL.fullmatch(value):
        raise ValueError("the name of a kernel has letters, digits and . _ + - only")
    app = getattr(holder, "app", holder)
    # a store may come from an app that had more of them
    if value not in app.kernels and not app.loading:
        known = ", ".join(app.kernels) or "none"
        raise ValueError(f"the app does not have that kernel: it has {known}")
    return value


def _kernel_options(_vm: object, _prop: object, value: object) -> str:
    options = "" if value is None else str(value)
    if len(options) > _MOST_OPTIONS:
        raise ValueError(f"it takes at most {_MOST_OPTIONS} characters")
    return options


def _default_kernel_options(vm: Any) -> str:
    if vm.kernel is None:
        return ""
    if _has_pci(vm):
        return config.defaults["kernelopts_pcidevs"]
    options: str = _of_template("kernelopts", config.defaults["kernelopts"])(vm)
    return options


def _user(_vm: object, _prop: object, value: object) -> str:
    if not isinstance(value, str) or not _USER.fullmatch(value):
        raise ValueError("the name of a user has letters, digits and _ . , + - only")
    return value


def _timestamp(_vm: object, _prop: object, value: object) -> int | None:
    if value is None:
        return None
    number = to_int(value)
    if number < 0:
        raise ValueError("it takes whole seconds since the epoch")
    return number


def keyboard_layout(_vm: object, _prop: object, value: object) -> str:
    """Setter of layouts of keyboards: LAYOUT+VARIANT+OPTIONS."""
    if not isinstance(value, str) or not _LAYOUT.fullmatch(value):
        raise ValueError("it takes LAYOUT+VARIANT+OPTIONS, as in us++")
    return value


def check_for_dispvms(_holder: object, vm: Any) -> None:
    """Raise ValueError for a VM that disposable VMs cannot be made from."""
    if not getattr(vm, "template_for_dispvms", False):
        raise ValueError(f"{vm} has not template_for_dispvms set")


class SettingsMixin(BaseVM):
    """The settings of a VM that has a domain."""

    memory = Property[int](
        "memory",
        type=int,
        setter=_memory,
        default=_of_template("memory", config.defaults["memory"]),
        doc="Memory at start, MiB; at least a tenth of maxmem.",
    )
    maxmem = Property[int](
        "maxmem",
        type=int,
        setter=_max_memory,
        order=1,
        default=_default_max_memory,
        doc="The most that balancing may give, MiB, at most 10 x memory; 0: it is not"
        " balanced.",
    )
    vcpus = Property[int](
        "vcpus",
        type=int,
        setter=positive,
        default=_of_template("vcpus", config.defaults["vcpus"]),
        doc="Virtual CPUs. Where they are emulated, a guest has one unless this is set,"
        " in its template or in the VM.",
    )
    virt_mode = Property[str](
        "virt_mode",
        setter=_virt_mode,
        default=_default_virt_mode,
        doc="pvh or hvm; by default hvm when PCI devices are assigned, which pvh cannot"
        " have, else the template's, else pvh.",
    )
    kernel = Property[str | None](
        "kernel",
        setter=kernel_name,
        default=_of_template("kernel", lambda vm: vm.app.default_kernel),
        doc="Name of one of the app's kernels; None to boot from the image, which pvh"
        " cannot.",
    )
    kernelopts = Property[str](
        "kernelopts",
        type=str,
        setter=_kernel_options,
        default=_default_kernel_options,
        doc="Added to the kernel's command line.",
    )
    default_user = Property[str](
        "default_user",
        setter=_user,
        default=_of_template("default_user", "user"),
        doc="Who runs commands.",
    )
    default_dispvm = VMProperty["BaseVM | None"](
        "default_dispvm",
        check=check_for_dispvms,
        default=lambda vm: vm.app.default_dispvm,
        doc="What its disposable VMs are made from.",
    )
    qrexec_timeout = Property[int](
        "qrexec_timeout",
        type=int,
        setter=positive,
        default=_of_template(
            "qrexec_timeout", lambda vm: vm.app.default_qrexec_timeout
        ),
        doc="How long the guest may take to answer: after a start, and when it is to"
        " enlarge a filesystem; seconds.",
    )
    shutdown_timeout = Property[int](
        "shutdown_timeout",
        type=int,
        setter=positive,
        default=_of_template(
            "shutdown_timeout", lambda vm: vm.app.default_shutdown_timeout
        ),
        doc="How long a shutdown may take, seconds.",
    )
    autostart = Property[bool](
        "autostart", type=bool, default=False, doc="Start it with the system."
    )
    include_in_backups = Property[bool](
        "include_in_backups", type=bool, default=True, doc="Have it in backups."
    )
    installed_by_rpm = Property[bool](
        "installed_by_rpm",
        type=bool,
        default=False,
        clone=False,
        doc="Whether a package of dom0 brought it, as templates mostly come.",
    )
    backup_timestamp = Property[int | None](
        "backup_timestamp",
        type=int,
        setter=_timestamp,
        default=None,
        clone=False,
        doc="When it was last backed up, whole seconds since the epoch; None: never.",
    )
    guivm = VMProperty["BaseVM | None"](
        "guivm",
        default=lambda vm: vm.app.default_guivm,
        doc="Who shows its windows; there are none here.",
    )
    audiovm = VMProperty["BaseVM | None"](
        "audiovm",
        default=lambda vm: vm.app.default_audiovm,
        doc="Who plays its sounds; there are none here.",
    )
    management_dispvm = VMProperty["BaseVM | None"](
        "management_dispvm",
        check=check_for_dispvms,
        default=_of_template("management_dispvm", lambda vm: vm.app.management_dispvm),
        doc="What disposable VMs that manage it are made from.",
    )
    keyboard_layout = Property[str](
        "keyboard_layout",
        setter=keyboard_layout,
        default=lambda vm: getattr(vm.guivm, "keyboard_layout", "us++"),
        doc="LAYOUT+VARIANT+OPTIONS of its keyboard.",
    )
    debug = Property[bool]("debug", type=bool, default=False, doc="Debug mode.")

    @handler(
        *(f"property-set:{name}" for name in _INHERITED),
        *(f"property-reset:{name}" for name in _INHERITED),
    )
    def on_inherited_set(self, _event: str, name: str, **_kwargs: Any) -> None:
        """Tell the VMs that take their default from here."""
        for vm in self.app.domains:
            if getattr(vm, "template", None) is self and vm.property_is_default(name):
                vm.fire_event(f"property-reset:{name}", name=name)

    @stateless_property
    def updateable(self) -> bool:
        """Whether what is installed in it stays: it has a root of its own."""
        return getattr(self, "template", None) is None
