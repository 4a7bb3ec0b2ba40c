"""What a core imports as ``xen.lowlevel.xs``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from qubes_itests.dom0 import modules

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__: list[str] = []


class xs:
    """A connection to the XenStore, without transactions: each is an empty string."""

    def __getattr__(self, name: str) -> NoReturn:
        modules.missing(f"xen.lowlevel.xs.xs.{name}", name)

    def read(self, transaction: str, path: str) -> bytes | None:
        return modules.machine().xen.store.read(path)

    def write(self, transaction: str, path: str, value: str | bytes) -> None:
        modules.machine().xen.store.write(path, value)

    def ls(self, transaction: str, path: str) -> list[str] | None:
        return modules.machine().xen.store.names(path)

    def rm(self, transaction: str, path: str) -> None:
        modules.machine().xen.store.remove(path)

    def set_permissions(
        self, transaction: str, path: str, permissions: Sequence[dict[str, Any]]
    ) -> None:
        """Do nothing: no guest writes into this store."""

    def close(self) -> None:
        pass
