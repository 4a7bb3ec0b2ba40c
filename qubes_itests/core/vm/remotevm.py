"""RemoteVM: a VM of another machine, known by its name and the way there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from qubes_itests.core.exc import QubesVMError, QubesVMNotHaltedError
from qubes_itests.core.properties import Property, VMProperty
from qubes_itests.core.vm.base import BaseVM

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qubes_storage.pool import Pool

__all__ = ["RemoteVM"]


def _refusing(action: str) -> Callable[..., Any]:
    async def refuse(self: RemoteVM, *_args: object, **_kwargs: object) -> NoReturn:
        raise QubesVMError(
            self, f"VM {self} is on another machine: cannot {action} it from here"
        )

    refuse.__doc__ = f"Refuse to {action} it: it is on another machine."
    return refuse


class RemoteVM(BaseVM):
    """A VM of another machine: names, for policy and tools; it never runs here."""

    include_in_backups: Property[bool] = Property(
        "include_in_backups", type=bool, default=False, doc="Have it in backups."
    )
    relayvm: VMProperty[BaseVM | None] = VMProperty(
        "relayvm", default=None, doc="The local VM that passes calls on."
    )
    transport_rpc: Property[str | None] = Property(
        "transport_rpc",
        type=str,
        allow_none=True,
        default=None,
        doc="The service of `relayvm` that passes calls on.",
    )
    remote_name: Property[str | None] = Property(
        "remote_name",
        type=str,
        allow_none=True,
        default=None,
        doc="Its name on its own machine.",
    )

    async def start(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Refuse to start it: it is on another machine."""
        raise QubesVMNotHaltedError(
            self, f"VM {self} is on another machine: cannot start it from here"
        )

    shutdown = _refusing("shut down")
    kill = _refusing("kill")
    pause = _refusing("pause")
    unpause = _refusing("unpause")
    suspend = _refusing("suspend")
    resume = _refusing("resume")
    run = _refusing("run commands in")
    run_service = _refusing("call services in")

    async def create_on_disk(
        self,
        pool: Pool | str | None = None,
        pools: Mapping[str, Pool | str] | None = None,
        *,
        adopt: bool = False,
    ) -> None:
        """Do nothing: it has no volumes here."""

    async def clone_disk_files(
        self, src: BaseVM, pool: Pool | str | None = None
    ) -> None:
        """Do nothing: it has no volumes here."""
