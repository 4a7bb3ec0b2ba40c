"""Errors of the hypervisor layer.

::

    HypervisorError
     +-- StateError          the domain is in another state than the call needs
     +-- SavedStateError     a saved state did not load
"""

from __future__ import annotations

from qubes_itests.exc import HarnessError

__all__ = [
    "HypervisorError",
    "SavedStateError",
    "StateError",
]


class HypervisorError(HarnessError):
    """A call to the hypervisor failed.

    :param domain: name of the domain, empty if none is concerned.
    :param action: what was tried, as in "start".
    :param reason: the hypervisor's own words.
    """

    def __init__(self, domain: str, action: str, reason: str) -> None:
        subject = f"domain {domain!r}" if domain else "the hypervisor"
        super().__init__(f"cannot {action} {subject}: {reason}")
        self.domain = domain
        self.action = action
        self.reason = reason


class StateError(HypervisorError):
    """The domain is in another state than the call needs."""


class SavedStateError(HypervisorError):
    """A saved state did not load; a cold start may."""
