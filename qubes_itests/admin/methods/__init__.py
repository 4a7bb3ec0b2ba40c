"""The registry of all methods of the Admin API, filled by importing this."""

from __future__ import annotations

from qubes_itests.admin.dispatch import METHODS

# for what they register
from . import (
    backup,  # noqa: F401
    device,  # noqa: F401
    events,  # noqa: F401
    feature,  # noqa: F401
    label,  # noqa: F401
    pool,  # noqa: F401
    power,  # noqa: F401
    property,  # noqa: A004, F401
    settings,  # noqa: F401
    vm,  # noqa: F401
    volume,  # noqa: F401
)

__all__ = ["METHODS"]
