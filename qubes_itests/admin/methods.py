"""All methods of the Admin API: importing this registers them."""

from __future__ import annotations

from qubes_itests.admin import (
    methods_backup,
    methods_device,
    methods_events,
    methods_feature,
    methods_label,
    methods_pool,
    methods_power,
    methods_property,
    methods_settings,
    methods_vm,
    methods_volume,
)
from qubes_itests.admin.dispatch import METHODS

__all__ = ["METHODS"]

_MODULES = (
    methods_backup,
    methods_device,
    methods_events,
    methods_feature,
    methods_label,
    methods_pool,
    methods_power,
    methods_property,
    methods_settings,
    methods_vm,
    methods_volume,
)
