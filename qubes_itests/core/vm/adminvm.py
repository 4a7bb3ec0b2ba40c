"""AdminVM: dom0."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from qubes_itests.core.exc import QubesVMError, QubesVMNotHaltedError
from qubes_itests.core.labels import Label, find_label
from qubes_itests.core.properties import Property, stateless_property
from qubes_itests.core.vm.base import BaseVM
from qubes_itests.core.vm.database import OwnQubesDB
from qubes_itests.core.vm.settings import keyboard_layout
from qubes_itests.guest.link import dom0_services

if TYPE_CHECKING:
    import asyncio

    from qubes_itests.core.app import Qubes

__all__ = ["AdminVM"]


class _Domain0:
    """Dom0's domain, as libvirt shows it where there is Xen: it is there, and runs."""

    @staticmethod
    def ID() -> int:  # noqa: N802 - as in libvirt
        return 0

    @staticmethod
    def name() -> str:
        return "Domain-0"

    @staticmethod
    def isActive() -> int:  # noqa: N802 - as in libvirt
        return 1


class AdminVM(BaseVM):
    """Dom0: it always runs, has no domain here, and offers services."""

    own_names = re.compile("dom0")

    label: Property[Label] = Property(
        "label",
        type=find_label,
        default=lambda _vm: find_label("black"),
        doc="Its colour.",
    )

    keyboard_layout: Property[str] = Property(
        "keyboard_layout",
        setter=keyboard_layout,
        default="us++",
        doc="LAYOUT+VARIANT+OPTIONS of its keyboard.",
    )

    include_in_backups: Property[bool] = Property(
        "include_in_backups", type=bool, default=True, doc="Have it in backups."
    )

    @stateless_property(type=bool)
    def updateable(self) -> bool:
        """Whether what is installed in it stays: it does."""
        return True

    @stateless_property(type=int)
    def xid(self) -> int:
        """Return the number of its domain: 0."""
        return 0

    def __init__(self, app: Qubes) -> None:
        super().__init__(app, name="dom0", qid=0, uuid="0" * 32)
        self.libvirt_domain = _Domain0()
        #: Its database, which programs in dom0 write to.
        self.untrusted_qdb = OwnQubesDB(self.note_qdb_change)

    def get_power_state(self) -> str:
        """Return ``Running``: dom0 always does."""
        return "Running"

    async def start(self, *_args: object, **_kwargs: object) -> None:
        """Refuse: dom0 runs already."""
        raise QubesVMNotHaltedError(self, "dom0 cannot be started: it always runs")

    async def shutdown(self, *_args: object, **_kwargs: object) -> None:
        """Refuse: dom0 ends with the machine."""
        raise QubesVMError(self, "dom0 cannot be shut down from here")

    async def kill(self) -> None:
        """Refuse: dom0 ends with the machine."""
        raise QubesVMError(self, "dom0 cannot be killed")

    async def run_service(
        self,
        service: str,
        source: BaseVM | str | None = None,
        user: str | None = None,
        *,
        autostart: bool = False,
        gui: bool = False,
        filter_esc: bool = False,
        **streams: Any,
    ) -> asyncio.subprocess.Process:
        """Start a program of ``/etc/qubes-rpc``, as a call from `source`; no policy.

        :param service: ``SERVICE`` or ``SERVICE+ARGUMENT``.
        :param source: the VM that calls, or its name; dom0 by default.
        :param user: who runs it; by default the user that runs the tests.
        :param autostart: accepted for callers of Qubes OS: dom0 always runs.
        :param gui: what handlers of ``domain-cmd-pre-run`` are told.
        :param filter_esc: cannot be had.
        :param streams: as for `asyncio.create_subprocess_exec`.
        :return: the process; it ends with 127 when there is no such program.
        :raise OSError: the program cannot be executed.
        """
        del autostart
        if filter_esc:
            raise NotImplementedError("dom0 does not filter what its services write")
        await self.fire_event_async(
            "domain-cmd-pre-run", pre_event=True, start_guid=gui
        )
        caller = "dom0" if source is None else self.app.domains[source].name
        return await dom0_services.start(service, caller, user, **streams)
