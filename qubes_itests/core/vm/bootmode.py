"""Boot modes: kernel options, and a user, that a template offers by names.

A template, or a standalone VM, says what there is in its features:
``boot-mode.kernelopts.MODE`` are the options, ``boot-mode.default-user.MODE`` is who
runs commands then, ``boot-mode.active`` which one it has itself,
``boot-mode.appvm-default`` and ``boot-mode.standalone-default`` which one others have
that are made from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qubes_itests.core.vm.base import BaseVM
    from qubes_itests.core.vm.qubesvm import QubesVM

__all__ = ["DEFAULT", "default_mode", "kernel_options", "user"]

#: The mode that adds no options.
DEFAULT: Final = "default"


def default_mode(vm: QubesVM) -> str:
    """Return the mode that a VM asks for, or its template for it, if there is that."""
    offered = vm.features.get("boot-mode.active")
    if offered is not None and _options(vm, offered) is not None:
        return offered
    current: BaseVM = vm
    while (template := current.template_or_none) is not None:
        offered = template.offered_bootmode
        if offered is not None and _options(current, offered) is not None:
            return offered
        current = template
    return DEFAULT


def kernel_options(vm: QubesVM) -> str:
    """Return what the boot mode adds to the kernel's command line."""
    options = _options(vm, vm.bootmode)
    return _options(vm, default_mode(vm)) or "" if options is None else options


def user(vm: QubesVM) -> str:
    """Return who runs commands: as the boot mode says, else `default_user`."""
    return vm.features.check_with_template(
        f"boot-mode.default-user.{vm.bootmode}", vm.default_user
    )


def _options(vm: BaseVM, mode: str) -> str | None:
    """Return the options of a mode; None when there is no such mode."""
    if mode == DEFAULT:
        return ""
    return vm.features.check_with_template(f"boot-mode.kernelopts.{mode}", None)
