"""Loggers of VMs, and the format of logs."""

from __future__ import annotations

import logging
import sys
from typing import Any

__all__ = ["Formatter", "enable", "get_vm_logger"]


class Formatter(logging.Formatter):
    """``LEVEL: MESSAGE``, and between them the name of a VM's logger.

    :param debug: show also which process, module, function and line says it.
    """

    def __init__(self, *args: Any, debug: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.debug = debug

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - overridden
        """Return the line of a record."""
        place = name = ""
        if self.debug:
            function = f"{record.module}.{record.funcName}:{record.lineno}"
            place = f"[{record.processName} {function}] "
        if self.debug or record.name.startswith("vm."):
            name = f"{record.name}: "
        return f"{record.levelname}: {place}{name}{record.message}"


def enable(
    log_level: int = logging.INFO,
    enable_debug_libvirt: bool = False,
) -> None:
    """Write what is logged to stderr, unless somebody has set logging up already.

    :param log_level: from which level on; DEBUG shows also where it was said.
    :param enable_debug_libvirt: accepted as in Qubes OS; libvirt has no logger here.
    """
    del enable_debug_libvirt
    if logging.root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(debug=log_level == logging.DEBUG))
    logging.root.addHandler(handler)
    logging.root.setLevel(log_level)


def get_vm_logger(vmname: str) -> logging.Logger:
    """Return the logger for messages about one VM."""
    return logging.getLogger(f"vm.{vmname}")
