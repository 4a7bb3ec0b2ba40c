"""The host of an app and its hypervisor, as the core shows them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qubes_itests.core.exc import QubesException, QubesValueError

if TYPE_CHECKING:
    from qubes_itests.hypervisor.contract import Hypervisor

__all__ = ["QubesHost", "VMMConnection"]


class QubesHost:
    """What there is for the VMs of an app to share."""

    def __init__(self) -> None:
        #: The memory that is shared out among VMs, bytes; None for that of the machine.
        self.budget: int | None = None

    @property
    def no_cpus(self) -> int:
        """The number of CPUs."""
        return os.cpu_count() or 1

    @property
    def memory_total(self) -> int:
        """The memory, in KiB."""
        if self.budget is not None:
            return self.budget // 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024


class VMMConnection:
    """The connection to the hypervisor.

    :param hypervisor: of the app, or None.
    :param offline_mode: whether to do without it; None does so without a hypervisor.
    :raise QubesValueError: without a hypervisor, unless in offline mode.
    """

    #: Whether it is Xen.
    is_xen = False

    def __init__(
        self, hypervisor: Hypervisor | None, *, offline_mode: bool | None = None
    ) -> None:
        if hypervisor is None and offline_mode is False:
            raise QubesValueError(
                "an app of your own has no hypervisor: self.app of a test has one"
            )
        self._hypervisor = None if offline_mode else hypervisor

    @property
    def offline_mode(self) -> bool:
        """Whether there is no hypervisor, as where a core is only set up or read."""
        return self._hypervisor is None

    @property
    def hypervisor(self) -> Hypervisor:
        """What runs VMs.

        :raise QubesException: in offline mode.
        """
        if self._hypervisor is None:
            raise QubesException("the app is in offline mode: no VM of it can run")
        return self._hypervisor

    @property
    def libvirt_conn(self) -> object | None:
        """The object of libvirt itself; None for a back end that does without libvirt.

        What is done by it is seen by the core, as it is on Qubes OS.

        :raise QubesException: in offline mode.
        """
        return self.hypervisor.native
