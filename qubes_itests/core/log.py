"""The loggers of VMs."""

from __future__ import annotations

import logging

__all__ = ["get_vm_logger"]


def get_vm_logger(vmname: str) -> logging.Logger:
    """Return the logger for what is said of one VM."""
    return logging.getLogger(f"vm.{vmname}")
