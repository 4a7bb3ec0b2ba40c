"""All methods of the Admin API: importing this registers them."""

from __future__ import annotations

from qubes_itests.admin.dispatch import METHODS

from . import (
    backup,
    device,
    events,
    feature,
    label,
    pool,
    power,
    property,  # noqa: A004
    settings,
    vm,
    volume,
)

__all__ = ["METHODS"]

_MODULES = (
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
