"""Errors of the guest layer.

::

    GuestError                   concerns one VM, by name
     +-- GuestGoneError          its connection has ended; what was pending fails
     |    +-- ProtocolViolation  its agent broke the protocol, and was cut off
     +-- GuestRefusedError       its agent could not carry out a request
     +-- BootError               it did not start; everything is undone
    ImageError                   a guest image could not be built
     +-- LayerError              what an app adds to a template could not be
    EnvironmentNotReadyError
     +-- NotFetchedError         the packages of a template are not in the cache
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_itests.exc import EnvironmentNotReadyError, HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.program import typed
from qubes_itests.untrusted_text import quoted

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "BootError",
    "GuestError",
    "GuestGoneError",
    "GuestRefusedError",
    "ImageError",
    "LayerError",
    "NotFetchedError",
    "ProtocolViolation",
]


class GuestError(HarnessError):
    """Something went wrong with one guest.

    :param vm: name of the VM.
    :param message: what went wrong, as the end of a sentence.
    """

    def __init__(self, vm: str, message: str) -> None:
        super().__init__(f"VM {vm}: {message}")
        self.vm = vm


class GuestGoneError(GuestError, ConnectionError):
    """The connection to a guest's agent has ended.

    :param vm: name of the VM.
    :param reason: how it ended.
    """

    def __init__(self, vm: str, reason: str) -> None:
        super().__init__(vm, f"the connection to its agent has ended: {reason}")
        self.reason = reason


class ProtocolViolation(GuestGoneError):  # noqa: N818 - names the event, as in RFCs
    """A guest's agent broke a rule of docs/agent-protocol.md and was cut off.

    :param vm: name of the VM; empty where a bare protocol object raises it.
    :param rule: the rule, as a sentence.
    :param evidence: what came instead.
    """

    def __init__(self, vm: str, rule: str, evidence: str = "") -> None:
        detail = f" ({evidence})" if evidence else ""
        super().__init__(vm, f"it broke the rule that {rule}{detail}")
        self.rule = rule
        self.evidence = evidence


class GuestRefusedError(GuestError):
    """A guest's agent could not carry out a request.

    :param vm: name of the VM.
    :param request: the request, as in "enter".
    :param reason: the agent's own words; the guest's, so not to be trusted.
    """

    def __init__(self, vm: str, request: str, reason: str) -> None:
        super().__init__(vm, f"its agent could not {request}: {reason}")
        self.request = request
        self.reason = reason


class BootError(GuestError):
    """A VM did not start; everything that the start did is undone.

    :param vm: name of the VM.
    :param step: the step that failed, as in "start the domain".
    :param reason: what the step said.
    :param console: the end of what the guest printed on its console.
    """

    def __init__(self, vm: str, step: str, reason: str, console: str = "") -> None:
        tail = f"; the end of its console:\n{quoted(console)}" if console else ""
        #: Reason and console.
        self.told = f"{reason}{tail}"
        super().__init__(vm, f"could not {step}: {self.told}")
        self.step = step
        self.reason = reason
        self.console = console


class ImageError(HarnessError):
    """A guest image could not be built.

    :param image: what was built, as in "initramfs".
    :param reason: why it failed, and what to do.
    """

    def __init__(self, image: str, reason: str) -> None:
        super().__init__(f"cannot build the {image}: {reason}")
        self.image = image
        self.reason = reason


class LayerError(ImageError):
    """What an app adds to a template could not be built.

    :param template: its name.
    :param step: what was being done, as in "run the commands of my-app".
    :param reason: how it failed.
    :param output: its end.
    :param log: the file with the whole output; None if there is none.
    """

    def __init__(
        self,
        template: str,
        step: str,
        reason: str,
        output: str = "",
        log: Path | None = None,
    ) -> None:
        # the cause comes first: some readers see no more than one line
        said = f"\n{quoted(output)}" if output else ""
        kept = f"\nthe whole output: {log}" if log is not None else ""
        super().__init__(
            f"template {template}", f"could not {step}: {reason}{said}{kept}"
        )
        self.template = template
        self.step = step
        self.why = reason
        self.output = output
        self.log = log


class NotFetchedError(EnvironmentNotReadyError):
    """The packages of a template are not in the cache.

    :param template: its name.
    """

    exit_code = ExitCode.NO_NETWORK

    def __init__(self, template: str) -> None:
        super().__init__(
            f"The packages of the template {template} are not here yet, and a run has"
            " no network to fetch them.",
            f"Build it before: {typed('template', 'build', template)}",
        )
        self.template = template
