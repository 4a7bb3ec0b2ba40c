"""The registry of all methods of the Admin API, filled by importing this."""

from __future__ import annotations

from qubes_itests.admin.dispatch import METHODS

# for what they register
from . import (
    backup,
    device,
    events,
    feature,
    label,
    pool,
    power,
    property,
    settings,
    vm,
    volume,
)

__all__ = ["METHODS"]
