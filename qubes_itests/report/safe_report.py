"""Reports of tests, in which what guests said is safe to show.

A test puts outputs of guests into its assertions, prints them, and skips for them; from
its report they go to the terminal, to JUnit XML and to the log of a CI.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    import pytest

__all__ = ["make_safe"]


def make_safe(report: pytest.TestReport) -> None:
    """Replace the texts of a report, in place, by such as can be shown."""
    if isinstance(report.longrepr, tuple):  # of a skip: its reason is told in a line
        path, line, reason = report.longrepr
        report.longrepr = path, line, safe_text(reason, limit=None)
    else:
        report.longrepr = _safe(report.longrepr)
    if hasattr(report, "wasxfail"):  # pytest sets it of what was expected to fail
        report.wasxfail = safe_text(str(report.wasxfail), limit=None)
    report.sections = _safe(report.sections)
    report.user_properties = _safe(report.user_properties)
    part = getattr(report, "context", None)
    if part is not None:  # a subtest; frozen, but a copy would take the repr of reprs
        object.__setattr__(part, "msg", part.msg and safe_text(part.msg))
        part.kwargs.update({k: safe_text(str(v)) for k, v in part.kwargs.items()})


def _safe(value: Any) -> Any:
    """Return a part of a report with safe texts; pytest's own objects are changed."""
    if isinstance(value, str):
        return safe_text(value, lines=True, limit=None)
    if isinstance(value, list):
        return [_safe(part) for part in value]
    if isinstance(value, tuple):
        return tuple(_safe(part) for part in value)
    if dataclasses.is_dataclass(value):
        for name, part in vars(value).items():
            setattr(value, name, _safe(part))
    return value
