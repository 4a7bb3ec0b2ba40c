"""What the hypervisor and the guest get for a start of a VM, of data and of time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_itests.core.exc import QubesVMError
from qubes_itests.core.network.addresses import network_entries
from qubes_itests.guest.link.agent import Identity
from qubes_itests.guest.start.boot import time_here
from qubes_itests.hypervisor.contract import DomainSpec

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.guest.image.template import Template

__all__ = [
    "boot_files",
    "domain_spec",
    "identity",
    "qubesdb_entries",
    "start_deadline",
]


def boot_files(vm: QubesVM) -> Template | None:
    """Return kernel and initramfs; None for an HVM that boots from its disk.

    :raise QubesVMError: when it has no kernel and cannot do without.
    """
    kernel, known = vm.kernel, vm.app.kernels
    if kernel is None and vm.virt_mode == "hvm":
        return None
    if kernel is None:
        raise QubesVMError(
            vm,
            f"VM {vm} has virt_mode {vm.virt_mode!r} and no kernel:"
            f" set its property kernel to one of {', '.join(known)}, or"
            " virt_mode to hvm, which boots from the disk",
        )
    if kernel not in known:
        raise QubesVMError(
            vm,
            f"VM {vm} has kernel {kernel!r}, which the app does not have:"
            f" it has {', '.join(known) or 'none'}",
        )
    return known[kernel]


def domain_spec(vm: QubesVM, directory: Path, files: Template | None) -> DomainSpec:
    """Return what the hypervisor has to know.

    :param directory: where it keeps what belongs to the domain.
    :param files: from `boot_files`.
    """
    options = (
        f"{files.kernel_options} {vm.kernelopts} {vm.bootmode_kernelopts}"
        if files
        else ""
    )
    # As in Qubes OS, where that is safe. A guest with two emulated CPUs waits for one
    # that does not get to run: on a busy machine one in thirty came to a stand while it
    # started. Who sets the property means it.
    one_cpu = vm.app.hypervisor.slowness > 1 and not vm.is_set_here_or_in_template(
        "vcpus"
    )
    return DomainSpec(
        name=vm.name,
        uuid=vm.uuid,
        directory=directory,
        memory=vm.memory,
        max_memory=max(vm.memory, vm.maxmem),
        vcpus=1 if one_cpu else vm.vcpus,
        kernel=None if files is None else files.kernel,
        initramfs=None if files is None else files.initramfs,
        kernel_options=options.strip(),
        disks=tuple(vm.storage.disks()),
        # what its guest is, and whether that has a balloon, nobody knows
        balanced=vm.maxmem > 0 and files is not None,
    )


def identity(vm: QubesVM) -> Identity:
    """Return what the guest has to know."""
    names = {n: vm.storage.disk_name(n) for n in vm.volumes}
    return Identity(
        name=vm.name,
        root=names.get("root", ""),
        private=names.get("private"),
        volatile=names.get("volatile"),
        root_mode="rw" if vm.volumes["root"].rw else "ro",
        default_user=vm.get_default_user(),
        db=qubesdb_entries(vm),
        services=tuple(
            name.removeprefix("service.")
            for name, value in vm.features.items()
            if name.startswith("service.") and value
        ),
        init=vm.features.check_with_template("init", "agent"),
        machine_id=vm.uuid.hex,
    )


def qubesdb_entries(vm: QubesVM) -> dict[str, str]:
    """Return what the guest finds in qubesdb when it starts."""
    template = vm.template_or_none
    entries = {
        "/name": vm.name,
        "/type": vm.klass,
        "/default-user": vm.get_default_user(),
        "/qubes-vm-type": vm.klass,
        "/qubes-vm-updateable": str(template is None),
        "/qubes-vm-persistence": vm.persistence,
        "/qubes-debug-mode": str(int(vm.debug)),
    }
    if template is not None:
        entries["/qubes-base-template"] = str(template)
    return entries | network_entries(vm)


def start_deadline(vm: QubesVM) -> float:
    """Return the seconds that a start may take.

    It is the `qrexec_timeout` that somebody has set: for the VM, its template or the
    app. With the default one a start gets more where it takes longer.
    """
    app, seconds = vm.app, float(vm.qrexec_timeout)
    if vm.is_set_here_or_in_template("qrexec_timeout"):
        return seconds
    if not app.property_is_default("default_qrexec_timeout"):
        return seconds
    return time_here(seconds, app.hypervisor)
