"""All methods of the Admin API: importing this registers them."""

from __future__ import annotations

from qubes_itests.admin import (
    methods_feature,
    methods_label,
    methods_property,
    methods_vm,
)
from qubes_itests.admin.dispatch import METHODS

__all__ = ["METHODS"]

_MODULES = (methods_feature, methods_label, methods_property, methods_vm)
