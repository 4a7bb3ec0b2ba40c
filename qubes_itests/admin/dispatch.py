"""Methods by name, and what every call of one goes through.

A method declares what its destination, argument and payload may be; whatever else
arrives is refused here, before the method runs.
"""

from __future__ import annotations

import asyncio
import enum
import inspect
import logging
import re
import subprocess
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qubes_itests.admin.hub import EventHub
from qubes_itests.admin.protocol import Request, encode_exception, encode_reply
from qubes_itests.admin.tokens import CloneTokens
from qubes_itests.core.exc import (
    PermissionDenied,
    PropertyWrittenError,
    ProtocolError,
    QubesException,
    QubesVMInvalidUUIDError,
    QubesVMNotFoundError,
)
from qubes_itests.core.store.saving import save
from qubes_itests.core.vm.adminvm import AdminVM
from qubes_itests.exc import HarnessError
from qubes_itests.limited_log import LimitedLog

if TYPE_CHECKING:
    from qubes_itests.admin.streams import EventStream
    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.base import BaseVM

__all__ = [
    "EXPECTED_ERRORS",
    "METHODS",
    "Call",
    "Destination",
    "Dispatcher",
    "error_name",
    "method",
    "save",
]

log = logging.getLogger("qubes.admin")

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")

#: The classes that clients know; an error travels as the nearest of its bases.
_KNOWN_ERRORS: Final = {
    "DeviceAlreadyAssigned",
    "DeviceAlreadyAttached",
    "DeviceNotAssigned",
    "QubesException",
    "QubesFeatureNotFoundError",
    "QubesLabelNotFoundError",
    "QubesMemoryError",
    "QubesNoSuchPropertyError",
    "QubesNoTemplateError",
    "QubesNotImplementedError",
    "QubesPoolInUseError",
    "QubesPropertyValueError",
    "QubesTagNotFoundError",
    "QubesVMError",
    "QubesVMInUseError",
    "QubesVMNotFoundError",
    "QubesVMNotHaltedError",
    "QubesVMNotPausedError",
    "QubesVMNotRunningError",
    "QubesVMNotStartedError",
    "QubesVMNotSuspendedError",
    "QubesVMShutdownTimeoutError",
    "QubesValueError",
    "StoragePoolException",
    "UnexpectedDeviceProperty",
    "UnrecognizedDevice",
}
#: What a call may raise that is no defect of the server.
EXPECTED_ERRORS: Final = (
    HarnessError,
    PermissionDenied,
    ProtocolError,
    QubesException,
    subprocess.CalledProcessError,
)
_UUID: Final = re.compile(r"uuid:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Destination(enum.Enum):
    """What a method may be about."""

    ANY = enum.auto()
    DOM0 = enum.auto()
    VM = enum.auto()


@dataclass(slots=True)
class Call:
    """One call of a method, its fields validated.

    :param app: whom it is made to.
    :param method: its name.
    :param source: the VM that calls.
    :param destination: the VM that it is about.
    :param raw_argument: the argument as it came.
    :param tokens: those that volumes are cloned by.
    :param hub: where streams get their events.
    :param stream: takes the events of a method that sends any.
    """

    app: Qubes
    method: str
    source: BaseVM
    destination: BaseVM
    raw_argument: str
    tokens: CloneTokens
    hub: EventHub
    stream: EventStream | None = None
    #: What the method's validators made of the argument and the payload.
    argument: Any = field(default=None, init=False)
    payload: Any = field(default=None, init=False)

    def permit(self, **kwargs: Any) -> list[Any]:
        """Fire ``admin-permission:METHOD`` on the source; a handler vetoes by raising.

        :param kwargs: what the call is going to do, for the handlers.
        :return: filters: functions that tell whether the source may see an item.
        """
        filters: list[Any] = self.source.fire_event(
            f"admin-permission:{self.method}",
            pre_event=True,
            dest=self.destination,
            arg=self.raw_argument,
            **kwargs,
        )
        return filters

    def permitted(self, items: Iterable[_T], **kwargs: Any) -> list[_T]:
        """Fire the same event, and return the items that pass all filters."""
        filters = self.permit(**kwargs)
        if not filters:
            return list(items)
        return [item for item in items if all(allows(item) for allows in filters)]


@dataclass(frozen=True, slots=True)
class Method:
    """A method and what it takes."""

    name: str
    function: Callable[[Call], Any]
    destination: Destination
    argument: Callable[[Call], Any] | None
    payload: Callable[[Call, bytes], Any] | None
    saves: bool
    streams: bool

    def validate(self, call: Call, payload: bytes) -> None:
        """Fill in the call; ProtocolError for what the method does not take."""
        is_dom0 = isinstance(call.destination, AdminVM)
        if self.destination is Destination.DOM0 and not is_dom0:
            raise ProtocolError(f"{self.name} is a method of dom0 alone")
        if self.destination is Destination.VM and is_dom0:
            raise ProtocolError(f"{self.name} is no method of dom0")
        if self.saves:
            call.destination.check_whole()
        if self.argument is not None:
            call.argument = self.argument(call)
        elif call.raw_argument:
            raise ProtocolError(f"{self.name} takes no argument")
        if self.payload is not None:
            call.payload = self.payload(call, payload)
        elif payload:
            raise ProtocolError(f"{self.name} takes no payload")
        if self.streams and call.stream is None:
            raise ProtocolError(f"{self.name} needs a connection that takes events")


#: All methods, by name.
METHODS: Final[dict[str, Method]] = {}


def method(
    *names: str,
    destination: Destination = Destination.ANY,
    argument: Callable[[Call], Any] | None = None,
    payload: Callable[[Call, bytes], Any] | None = None,
    saves: bool = False,
    streams: bool = False,
) -> Callable[[_F], _F]:
    """Make a function, plain or a coroutine function, a method of the Admin API.

    It is called with the `Call` and returns the content of the reply, None for none.

    :param names: of the methods.
    :param destination: what they may be about.
    :param argument: makes a value of the argument, or raises; None if there is none.
    :param payload: the same of the payload.
    :param saves: whether the app is saved afterwards.
    :param streams: whether it sends events, and ends when the client goes.
    """

    def register(function: _F) -> _F:
        for name in names:
            METHODS[name] = Method(
                name, function, destination, argument, payload, saves, streams
            )
        return function

    return register


#: What clients raise when a call is refused.  They know the classes of the two refusals
#: too, but no tool expects these: of them qubesd says nothing, and so the tools take an
#: empty answer, which is of this class, for a refusal.  A property that is set once and
#: for all is one of them too: a clone leaves out what it may not set.
_REFUSED: Final = "QubesDaemonAccessError"


def error_name(error: BaseException) -> str:
    """Return the name under which a client is told of an error."""
    for cls in type(error).__mro__:
        if cls in {ProtocolError, PermissionDenied, PropertyWrittenError}:
            return _REFUSED
        if cls.__name__ in _KNOWN_ERRORS:
            return cls.__name__
    return "QubesException"


class Dispatcher:
    """Answers requests.

    :param app: whom they are made to.
    :param methods: those there are, by name.
    :param debug: whether clients get tracebacks.
    """

    def __init__(
        self, app: Qubes, methods: Mapping[str, Method], *, debug: bool = False
    ) -> None:
        self.app = app
        self.methods = methods
        self.debug = debug
        self._tokens = CloneTokens()
        self._hub = EventHub(app)
        self._limited = LimitedLog(log)

    async def answer(
        self, request: Request, stream: EventStream | None = None
    ) -> bytes | None:
        """Do what is asked, and return the reply, which tells of errors too.

        :param stream: takes the events, for methods that send any.
        :return: None if events were the answer.
        """
        try:
            content = await self._execute(request, stream)
        except EXPECTED_ERRORS as error:
            return self._refusal(request, error)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # what the method waited for was: its caller still waits
            return self._defect(request, error)
        except Exception as error:  # noqa: BLE001 - logged, and the client told
            return self._defect(request, error)
        if stream is not None and stream.begun:
            return None
        return encode_reply(content or "")

    def _defect(self, request: Request, error: BaseException) -> bytes:
        # as text: a record must not keep objects of the frames alive
        log.error("%s failed:\n%s", request, traceback.format_exc())
        told = (
            f"{request.method} failed unexpectedly ({type(error).__name__});"
            " the server's log says more"
        )
        return self._encode(HarnessError(told), error)

    def _refusal(self, request: Request, error: BaseException) -> bytes:
        if isinstance(error, (ProtocolError, PermissionDenied)):
            self._limited.warning(
                request.source, "%s is refused: %s", request, str(error)
            )
        else:
            self._limited.info(request.source, "%s: %s", request, str(error))
        return self._encode(error, error)

    def _encode(self, told: BaseException, cause: BaseException) -> bytes:
        lines = traceback.format_exception(cause) if self.debug else ()
        return encode_exception(error_name(told), str(told), "".join(lines))

    async def _execute(
        self, request: Request, stream: EventStream | None
    ) -> str | None:
        found = self.methods.get(request.method)
        if found is None:
            raise ProtocolError(f"there is no method {request.method!r}")
        call = Call(
            self.app,
            request.method,
            self._domain(request.source),
            self._domain(request.destination),
            request.argument,
            self._tokens,
            self._hub,
            stream,
        )
        found.validate(call, request.payload)
        content = found.function(call)
        if inspect.isawaitable(content):
            content = await content
        if found.saves:
            # before the reply: what a client was told to be done is there after a crash
            await save(self.app)
        return content  # type: ignore[no-any-return]

    def _domain(self, name: str) -> BaseVM:
        key: object = name
        if name.startswith("uuid:"):
            if not _UUID.fullmatch(name):
                raise QubesVMInvalidUUIDError(name.removeprefix("uuid:"))
            key = uuid.UUID(name.removeprefix("uuid:"))
        found = self.app.domains.get(key)
        if found is None:
            raise QubesVMNotFoundError(name)
        return found
