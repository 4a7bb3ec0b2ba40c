"""The errors of the core, by the names that Qubes OS gives them.

::

    QubesException
     +-- QubesValueError                a value that cannot be (also a ValueError)
     |    +-- QubesPropertyValueError
     +-- QubesNoSuchPropertyError       (also an AttributeError)
     +-- QubesLabelNotFoundError, QubesTagNotFoundError, QubesFeatureNotFoundError,
     |   QubesVMNotFoundError, QubesPoolNotFoundError   (also KeyErrors)
     +-- QubesNoTemplateError
     +-- QubesPoolInUseError            names what uses it
     +-- QubesNotImplementedError       asked for, and not there
     +-- DeviceNotAssigned, DeviceAlreadyAttached, DeviceAlreadyAssigned
     |                                  (also KeyErrors)
     +-- UnrecognizedDevice             not there, or another one (also a ValueError)
     +-- ProtocolError                  a request of the Admin API that cannot be
     |    +-- UnexpectedDeviceProperty  it contradicts itself about a device
     +-- PermissionDenied               a request that may not be
     +-- QubesVMError                   concerns one VM
          +-- QubesVMInUseError
          +-- QubesVMNotStartedError
          |    +-- QubesVMNotRunningError
          |    +-- QubesVMNotPausedError
          +-- QubesVMNotHaltedError
          +-- QubesVMShutdownTimeoutError
          +-- QubesVMStorageError       says which volume could not be made
          +-- QubesVMStartError         says which step failed
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qubes_itests.exc import HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "DeviceAlreadyAssigned",
    "DeviceAlreadyAttached",
    "DeviceNotAssigned",
    "PermissionDenied",
    "ProtocolError",
    "QubesException",
    "QubesFeatureNotFoundError",
    "QubesLabelNotFoundError",
    "QubesNoSuchPropertyError",
    "QubesNoTemplateError",
    "QubesNotImplementedError",
    "QubesPoolInUseError",
    "QubesPoolNotFoundError",
    "QubesPropertyValueError",
    "QubesTagNotFoundError",
    "QubesVMError",
    "QubesVMInUseError",
    "QubesVMNotFoundError",
    "QubesVMNotHaltedError",
    "QubesVMNotPausedError",
    "QubesVMNotRunningError",
    "QubesVMNotStartedError",
    "QubesVMShutdownTimeoutError",
    "QubesVMStartError",
    "QubesVMStorageError",
    "QubesValueError",
    "UnexpectedDeviceProperty",
    "UnrecognizedDevice",
]


class QubesException(HarnessError):  # noqa: N818 - its name in Qubes OS
    """The base of all errors of the core."""


class QubesValueError(QubesException, ValueError):
    """A value that cannot be."""


class QubesPropertyValueError(QubesValueError):
    """A property was set to a value that it does not take.

    :param holder: the object whose property it is.
    :param name: the property's name.
    :param value: what it was set to.
    :param reason: what it takes.
    """

    def __init__(self, holder: object, name: str, value: object, reason: str) -> None:
        super().__init__(f"property {name!r} of {holder} cannot be {value!r}: {reason}")
        self.holder = holder
        self.name = name
        self.value = value
        self.reason = reason


class PropertyWrittenError(QubesPropertyValueError, AttributeError):  # type: ignore[misc]
    """A property that is set once and for all was set again."""

    def __init__(self, holder: object, name: str, value: object) -> None:
        super().__init__(holder, name, value, "it is set once and for all")


class QubesNoSuchPropertyError(QubesException, AttributeError):
    """An object has no property of that name."""

    def __init__(self, holder: object, name: str) -> None:
        super().__init__(f"{holder} has no property {name!r}")
        self.holder = holder
        self.name = name


class _NotFoundError(QubesException, KeyError):
    """Something was looked up by a name that nothing has."""

    kind = "object"

    def __init__(self, name: object, known: Iterable[object] = ()) -> None:
        message = f"no such {self.kind}: {name!r}"
        if listed := ", ".join(sorted(str(item) for item in known)):
            message += f" (there are: {listed})"
        super().__init__(message)
        self.name = name

    def __str__(self) -> str:
        # KeyError would show the repr of the message
        return str(self.args[0])


class QubesLabelNotFoundError(_NotFoundError):
    """No label has that name or index."""

    kind = "label"


class QubesVMNotFoundError(_NotFoundError):
    """No VM has that name, number or UUID."""

    kind = "VM"


class QubesPoolNotFoundError(_NotFoundError):
    """No storage pool has that name."""

    kind = "storage pool"


class QubesFeatureNotFoundError(_NotFoundError):
    """The VM does not have that feature set."""

    kind = "feature"


class QubesTagNotFoundError(_NotFoundError):
    """The VM does not have that tag."""

    kind = "tag"


class QubesPoolInUseError(QubesException):
    """The storage pool cannot be removed while something uses it.

    :param name: of the pool.
    :param users: what uses it.
    """

    def __init__(self, name: str, users: Iterable[str]) -> None:
        self.name = name
        self.users = tuple(users)
        super().__init__(
            f"pool {name!r} is used by {', '.join(self.users)}; change these first"
        )


class QubesNoTemplateError(QubesException):
    """A VM that needs a template was made without one."""


class QubesNotImplementedError(QubesException, NotImplementedError):
    """Qubes OS has it, and this does not."""


class ProtocolError(QubesException):
    """A request of the Admin API has a field that cannot be."""


class PermissionDenied(QubesException):
    """A request of the Admin API is not allowed to who makes it."""


class UnexpectedDeviceProperty(ProtocolError):  # noqa: N818 - its name in Qubes OS
    """What was sent contradicts itself about a device.

    :param name: the property.
    :param found: what it is.
    :param expected: what it has to be.
    """

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(f"{name} of the device is {found!r}, not {expected!r}")
        self.name = name
        self.found = found
        self.expected = expected


class _DeviceError(QubesException, KeyError):
    """A device is not where a request expects it."""

    def __str__(self) -> str:
        # KeyError would show the repr of the message
        return str(self.args[0])


class DeviceNotAssigned(_DeviceError):  # noqa: N818 - its name in Qubes OS
    """The device is not assigned, or attached, to that VM."""


class DeviceAlreadyAttached(_DeviceError):  # noqa: N818
    """A VM has the device already."""


class DeviceAlreadyAssigned(_DeviceError):  # noqa: N818
    """The device is assigned to that VM already."""


class UnrecognizedDevice(QubesException, ValueError):  # noqa: N818
    """The device is not there, or is another than the expected one."""


class QubesVMError(QubesException):
    """Something failed on one VM.

    :param vm: the VM.
    :param message: what failed.
    """

    def __init__(self, vm: Any, message: str = "") -> None:
        super().__init__(message or f"something failed on {vm}")
        self.vm = vm


class QubesVMInUseError(QubesVMError):
    """The VM cannot be removed while others use it."""


class QubesVMNotStartedError(QubesVMError):
    """The VM is not running."""

    def __init__(self, vm: Any, message: str = "") -> None:
        super().__init__(vm, message or f"VM {vm} is not running; start it first")


class QubesVMNotRunningError(QubesVMNotStartedError):
    """The VM is not running."""


class QubesVMNotPausedError(QubesVMNotStartedError):
    """The VM is neither paused nor suspended."""

    def __init__(self, vm: Any, message: str = "") -> None:
        super().__init__(vm, message or f"VM {vm} is not paused")


class QubesVMNotHaltedError(QubesVMError):
    """The VM is not halted."""

    def __init__(self, vm: Any, message: str = "") -> None:
        super().__init__(vm, message or f"VM {vm} is not halted; shut it down first")


class QubesVMShutdownTimeoutError(QubesVMError):
    """The VM did not shut down in time."""

    def __init__(self, vm: Any, timeout: float) -> None:
        super().__init__(
            vm, f"VM {vm} did not shut down within {timeout:g} s; kill() stops it"
        )
        self.timeout = timeout


class QubesVMStorageError(QubesVMError):
    """A volume of the VM could not be made; those made before it are gone again.

    :param vm: the VM.
    :param volume: the volume, which says in what pool it is.
    :param reason: what the system said, as in "No space left on device".
    """

    def __init__(self, vm: Any, volume: Any, reason: str) -> None:
        super().__init__(
            vm,
            f"volume {volume.name} of VM {vm} could not be made in pool"
            f" {volume.pool}: {reason}",
        )
        self.volume = volume
        self.reason = reason


class QubesVMStartError(QubesVMError):
    """The VM did not start; nothing of the attempt is left.

    :param vm: the VM.
    :param step: the step that failed, as in "start its storage".
    :param reason: what the step said.
    """

    def __init__(self, vm: Any, step: str, reason: str) -> None:
        said = reason.removeprefix(f"VM {vm}: ")
        super().__init__(vm, f"VM {vm} did not start: it could not {step}: {said}")
        self.step = step
        self.reason = reason
