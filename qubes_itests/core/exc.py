"""The errors of the core, by the names that Qubes OS gives them.

Each has the base classes and the arguments that it has there; further arguments make
messages more precise.

::

    QubesException                      (`qubes_storage.exc`, and all errors of storage)
     +-- QubesValueError                an invalid value (also a ValueError)
     |    +-- QubesPropertyValueError
     +-- QubesNoSuchPropertyError       (also an AttributeError)
     +-- QubesLabelNotFoundError, QubesTagNotFoundError, QubesFeatureNotFoundError,
     |   QubesVMNotFoundError, QubesPoolNotFoundError, QubesVolumeNotFoundError,
     |   QubesVolumeRevisionNotFoundError              (also KeyErrors)
     +-- QubesVMAlreadyExistsError      (also a ValueError)
     +-- QubesVMInvalidUUIDError
     +-- QubesLabelInUseError
     +-- QubesPoolInUseError            names what uses it
     +-- QubesVolumeCopyInUseError
     +-- QubesNotImplementedError       asked for, and not there
     +-- QubesBackupProfileNotFoundError, BackupCancelledError,
     |   BackupAlreadyRunningError      (there are no backups here)
     +-- DeviceNotAssigned, DeviceNotFound, DeviceAlreadyAttached, DeviceAlreadyAssigned
     |                                  (also KeyErrors)
     +-- UnrecognizedDevice             not there, or another one (also a ValueError)
     +-- UnexpectedDeviceProperty       contradictory data (also a ValueError)
     +-- QubesVMError                   concerns one VM
          +-- QubesNoTemplateError
          +-- QubesVMInUseError
          +-- QubesVMNotStartedError
          |    +-- QubesVMNotRunningError
          |    +-- QubesVMNotPausedError
          +-- QubesVMNotSuspendedError
          +-- QubesVMNotHaltedError
          +-- QubesVMCancelledPauseError
          +-- QubesVMShutdownTimeoutError
          +-- QubesMemoryError          (also a MemoryError)
          +-- QubesVMStartError         says which step failed

    AssertionError
     +-- ProtocolError                  an invalid request of the Admin API
          +-- QubesInvalidTagError, QubesInvalidLabelError, QubesInvalidLabelValueError,
          |   QubesUnrecognizedDeviceAssignmentMode
          +-- QubesVolumeCopyTokenNotFoundError          (also a KeyError)

    PermissionError
     +-- PermissionDenied               a request that is not allowed
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from qubes_storage.exc import QubesException, StoragePoolException

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qubes_itests.core.properties import Property
    from qubes_itests.core.vm.base import BaseVM

__all__ = [
    "BackupAlreadyRunningError",
    "BackupCancelledError",
    "DeviceAlreadyAssigned",
    "DeviceAlreadyAttached",
    "DeviceNotAssigned",
    "DeviceNotFound",
    "PermissionDenied",
    "ProtocolError",
    "QubesBackupProfileNotFoundError",
    "QubesException",
    "QubesFeatureNotFoundError",
    "QubesInvalidLabelError",
    "QubesInvalidLabelValueError",
    "QubesInvalidTagError",
    "QubesLabelInUseError",
    "QubesLabelNotFoundError",
    "QubesMemoryError",
    "QubesNoSuchPropertyError",
    "QubesNoTemplateError",
    "QubesNotImplementedError",
    "QubesPoolInUseError",
    "QubesPoolNotFoundError",
    "QubesPropertyValueError",
    "QubesTagNotFoundError",
    "QubesUnrecognizedDeviceAssignmentMode",
    "QubesVMAlreadyExistsError",
    "QubesVMCancelledPauseError",
    "QubesVMError",
    "QubesVMInUseError",
    "QubesVMInvalidUUIDError",
    "QubesVMNotFoundError",
    "QubesVMNotHaltedError",
    "QubesVMNotPausedError",
    "QubesVMNotRunningError",
    "QubesVMNotStartedError",
    "QubesVMNotSuspendedError",
    "QubesVMShutdownTimeoutError",
    "QubesVMStartError",
    "QubesValueError",
    "QubesVolumeCopyInUseError",
    "QubesVolumeCopyTokenNotFoundError",
    "QubesVolumeNotFoundError",
    "QubesVolumeRevisionNotFoundError",
    "StoragePoolException",
    "UnexpectedDeviceProperty",
    "UnrecognizedDevice",
]


class ProtocolError(AssertionError):
    """A request of the Admin API has an invalid field."""


class PermissionDenied(PermissionError):
    """A request of the Admin API is not allowed to its caller."""


class QubesInvalidTagError(ProtocolError):
    """A request names an invalid tag."""


class QubesInvalidLabelError(ProtocolError):
    """A request names an invalid label."""


class QubesInvalidLabelValueError(ProtocolError):
    """A request gives a label an invalid colour."""


class QubesUnrecognizedDeviceAssignmentMode(ProtocolError):
    """A request names an unknown mode of assignments."""


class QubesValueError(QubesException, ValueError):
    """A value is not valid."""


class QubesPropertyValueError(QubesValueError):
    """A property was set to a value that it does not take.

    :param holder: the object whose property it is.
    :param prop: the property.
    :param value: what it was set to.
    :param msg: the whole message; by default one that gives no reason.
    """

    def __init__(
        self, holder: object, prop: Property[Any], value: object, msg: str | None = None
    ) -> None:
        super().__init__(
            msg or f"property {prop.__name__!r} of {holder} cannot be {value!r}"
        )
        self.holder = holder
        self.prop = prop
        self.value = value


class PropertyWrittenError(QubesPropertyValueError, AttributeError):
    """A property that is set once and for all was set again."""


class QubesNoSuchPropertyError(QubesException, AttributeError):
    """An object has no property of that name.

    :param holder: the object.
    :param prop_name: the name.
    :param msg: the whole message.
    """

    def __init__(self, holder: object, prop_name: str, msg: str | None = None) -> None:
        super().__init__(msg or f"{holder} has no property {prop_name!r}")
        self.holder = holder
        self.prop = prop_name


class _NotFoundError(QubesException, KeyError):
    """Something was looked up by a name that nothing has."""

    def __str__(self) -> str:
        # KeyError would show the repr of the message
        return QubesException.__str__(self)


def _not_found(kind: str, name: object, known: Iterable[object]) -> str:
    listed = ", ".join(sorted(str(item) for item in known))
    return f"no such {kind}: {name!r}" + (f" (there are: {listed})" if listed else "")


class QubesLabelNotFoundError(_NotFoundError):
    """No label has that name or index.

    :param label: the name or index.
    :param known: those that there are.
    """

    def __init__(self, label: object, known: Iterable[object] = ()) -> None:
        super().__init__(_not_found("label", label, known))
        self.label = label


class QubesVMNotFoundError(_NotFoundError):
    """No VM has that name, number or UUID."""

    def __init__(self, vmname: object) -> None:
        super().__init__(f"no such VM: {vmname!r}")
        self.vmname = vmname


class QubesFeatureNotFoundError(_NotFoundError):
    """A VM does not have that feature set.

    :param domain: the VM.
    :param feature: name of the feature.
    """

    def __init__(self, domain: BaseVM, feature: str) -> None:
        super().__init__(f"no such feature: {feature!r}")
        self.vm = domain
        self.feature = feature


class QubesTagNotFoundError(_NotFoundError):
    """A VM does not have that tag.

    :param domain: the VM.
    :param tag: the tag.
    """

    def __init__(self, domain: BaseVM, tag: str) -> None:
        super().__init__(f"no such tag: {tag!r}")
        self.vm = domain
        self.tag = tag


class QubesPoolNotFoundError(_NotFoundError):
    """No storage pool has that name.

    :param name: the name.
    :param known: the names of those that there are.
    """

    def __init__(self, name: object = "", known: Iterable[object] = ()) -> None:
        super().__init__(_not_found("storage pool", name, known))


class QubesVolumeNotFoundError(_NotFoundError):
    """There is no such volume."""


class QubesVolumeRevisionNotFoundError(_NotFoundError):
    """A volume has no such revision."""


class QubesVMAlreadyExistsError(QubesValueError):
    """A VM of that name, number or UUID is there already."""


class QubesVMInvalidUUIDError(QubesException):
    """A VM's UUID is not valid.

    :param uuid: the text that was given.
    """

    def __init__(self, uuid: str) -> None:
        super().__init__(f"expected the UUID of a VM, got {uuid!r}")
        self.vmname = uuid


class QubesLabelInUseError(QubesException):
    """A label cannot be made or removed, as it is in use.

    :param label: the label.
    :param msg: the whole message.
    """

    def __init__(self, label: object, msg: str | None = None) -> None:
        super().__init__(msg or f"label {label} is in use")


class QubesPoolInUseError(QubesException):
    """The storage pool cannot be removed while something uses it.

    :param pool_name: of the pool.
    :param msg: the whole message, which says what uses it.
    """

    def __init__(self, pool_name: object, msg: str | None = None) -> None:
        super().__init__(msg or f"pool {str(pool_name)!r} is in use")


class QubesNotImplementedError(QubesException, NotImplementedError):
    """Qubes OS has it, and this does not."""

    def __init__(self, msg: str | None = None) -> None:
        super().__init__(msg or "this is not available")


class QubesBackupProfileNotFoundError(QubesException):
    """There is no such profile of backups."""

    def __init__(self, msg: str | None = None, profile: str | None = None) -> None:
        super().__init__(msg or f"there is no backup profile {profile!r}")


class BackupCancelledError(QubesException):
    """A backup was cancelled."""

    def __init__(self, msg: str | None = None) -> None:
        super().__init__(msg or "the backup was cancelled")


class BackupAlreadyRunningError(QubesException):
    """A backup was to be made while it is being made."""

    def __init__(self, msg: str | None = None) -> None:
        super().__init__(msg or "this backup is being made already")


class DeviceNotAssigned(_NotFoundError):
    """The device is not assigned, or attached, to that VM."""


class DeviceNotFound(_NotFoundError):
    """There is no such device."""


class DeviceAlreadyAttached(_NotFoundError):
    """A VM has the device already."""


class DeviceAlreadyAssigned(_NotFoundError):
    """The device is assigned to that VM already."""


class UnrecognizedDevice(QubesException, ValueError):
    """The device is not there, or is another than the expected one."""


class UnexpectedDeviceProperty(QubesException, ValueError):
    """The data of a device contradict what was asked for."""


class QubesVMError(QubesException):
    """Something failed on one VM.

    :param vm: the VM.
    :param msg: what failed; by default the sentence of the class.
    """

    _sentence: ClassVar[str] = "VM {vm} has failed"

    def __init__(self, vm: BaseVM | None, msg: str | None = None) -> None:
        super().__init__(msg or self._sentence.format(vm=vm))
        self.vm = vm


class QubesNoTemplateError(QubesVMError):
    """A VM that needs a template has none."""

    _sentence = "VM {vm} needs a template"


class QubesVMInUseError(QubesVMError):
    """The VM cannot be removed while others use it."""

    _sentence = "VM {vm} is in use"


class QubesVMNotStartedError(QubesVMError):
    """The VM is not running."""

    _sentence = "VM {vm} is not running; start it first"


class QubesVMNotRunningError(QubesVMNotStartedError):
    """The VM is halted or paused."""


class QubesVMNotPausedError(QubesVMNotStartedError):
    """The VM is neither paused nor suspended."""

    _sentence = "VM {vm} is not paused"


class QubesVMNotSuspendedError(QubesVMError):
    """The VM is not suspended."""

    _sentence = "VM {vm} is not suspended"


class QubesVMNotHaltedError(QubesVMError):
    """The VM is not halted."""

    _sentence = "VM {vm} is not halted; shut it down first"


class QubesVMCancelledPauseError(QubesVMError):
    """A handler of `domain-pre-paused` has cancelled the pause."""

    _sentence = "the pause of VM {vm} was cancelled"


class QubesVMShutdownTimeoutError(QubesVMError):
    """The VM did not shut down in time."""

    _sentence = "VM {vm} did not shut down in time"


class QubesMemoryError(QubesVMError, MemoryError):
    """There is not enough memory for the VM to start."""

    _sentence = "there is not enough memory to start VM {vm}"


class QubesVolumeCopyInUseError(QubesException):
    """A volume of a VM is being cloned already."""

    def __init__(
        self, vm: BaseVM | None, volume: object, msg: str | None = None
    ) -> None:
        super().__init__(msg or f"volume {volume} of VM {vm} is being cloned already")


class QubesVolumeCopyTokenNotFoundError(ProtocolError, KeyError):
    """A request names a token that stands for no volume."""

    def __init__(self, msg: str | None = None) -> None:
        super().__init__(msg or "the token is unknown, or was used already")

    def __str__(self) -> str:
        # KeyError would show the repr of the message
        return ProtocolError.__str__(self)


class QubesVMStartError(QubesVMError):
    """The VM did not start; nothing of the attempt is left.

    :param vm: the VM.
    :param step: the step that failed, as in "start its storage".
    :param reason: the error of the step.
    """

    def __init__(self, vm: BaseVM | None, step: str, reason: str) -> None:
        said = reason.removeprefix(f"VM {vm}: ")
        super().__init__(vm, f"VM {vm} did not start: it could not {step}: {said}")
        self.step = step
        self.reason = reason
