"""The errors of the core are those that code written for Qubes OS catches."""

from __future__ import annotations

import builtins

import pytest

from qubes_itests.core import exc
from qubes_storage.exc import VolumeExistsError


class Something:
    """What stands for a VM, and for a property of it."""

    __name__ = name = "work"

    def __str__(self):
        return self.name


WORK = Something()
ONE_VM = {"vm": WORK, "msg": "no"}
MESSAGE = {"msg": "no"}

#: Of what classes each is in Qubes OS, and the arguments that it takes there; those
#: without arguments of their own take any, as exceptions do.
CLASSES = {
    "BackupAlreadyRunningError": ("QubesException", MESSAGE),
    "BackupCancelledError": ("QubesException", MESSAGE),
    "DeviceAlreadyAssigned": ("QubesException KeyError", None),
    "DeviceAlreadyAttached": ("QubesException KeyError", None),
    "DeviceNotAssigned": ("QubesException KeyError", None),
    "DeviceNotFound": ("QubesException KeyError", None),
    "PermissionDenied": ("PermissionError", None),
    "ProtocolError": ("AssertionError", None),
    "QubesBackupProfileNotFoundError": ("QubesException", MESSAGE | {"profile": "x"}),
    "QubesException": ("Exception", None),
    "QubesFeatureNotFoundError": (
        "QubesException KeyError",
        {"domain": WORK, "feature": "os"},
    ),
    "QubesInvalidLabelError": ("ProtocolError", None),
    "QubesInvalidLabelValueError": ("ProtocolError", None),
    "QubesInvalidTagError": ("ProtocolError", None),
    "QubesLabelInUseError": ("QubesException", MESSAGE | {"label": "pink"}),
    "QubesLabelNotFoundError": ("QubesException KeyError", {"label": "pink"}),
    "QubesMemoryError": ("QubesVMError MemoryError", ONE_VM),
    "QubesNoSuchPropertyError": (
        "QubesException AttributeError",
        MESSAGE | {"holder": WORK, "prop_name": "colour"},
    ),
    "QubesNoTemplateError": ("QubesVMError", ONE_VM),
    "QubesNotImplementedError": ("QubesException NotImplementedError", MESSAGE),
    "QubesPoolInUseError": ("QubesException", MESSAGE | {"pool_name": "default"}),
    "QubesPoolNotFoundError": ("KeyError", None),
    "QubesPropertyValueError": (
        "QubesValueError",
        MESSAGE | {"holder": WORK, "prop": WORK, "value": "pink"},
    ),
    "QubesTagNotFoundError": ("QubesException KeyError", {"domain": WORK, "tag": "x"}),
    "QubesUnrecognizedDeviceAssignmentMode": ("ProtocolError", None),
    "QubesVMAlreadyExistsError": ("QubesException", None),
    "QubesVMCancelledPauseError": ("QubesVMError", ONE_VM),
    "QubesVMError": ("QubesException", ONE_VM),
    "QubesVMInUseError": ("QubesVMError", ONE_VM),
    "QubesVMInvalidUUIDError": ("QubesException", {"uuid": "x"}),
    "QubesVMNotFoundError": ("QubesException KeyError", {"vmname": "work"}),
    "QubesVMNotHaltedError": ("QubesVMError", ONE_VM),
    "QubesVMNotPausedError": ("QubesVMNotStartedError", ONE_VM),
    "QubesVMNotRunningError": ("QubesVMNotStartedError", ONE_VM),
    "QubesVMNotStartedError": ("QubesVMError", ONE_VM),
    "QubesVMNotSuspendedError": ("QubesVMError", ONE_VM),
    "QubesVMShutdownTimeoutError": ("QubesVMError", ONE_VM),
    "QubesValueError": ("QubesException ValueError", None),
    "QubesVolumeCopyInUseError": (
        "QubesException",
        ONE_VM | {"volume": "root"},
    ),
    "QubesVolumeCopyTokenNotFoundError": ("ProtocolError KeyError", MESSAGE),
    "QubesVolumeNotFoundError": ("KeyError", None),
    "QubesVolumeRevisionNotFoundError": ("KeyError", None),
    "StoragePoolException": ("QubesException", None),
    "UnexpectedDeviceProperty": ("QubesException ValueError", None),
    "UnrecognizedDevice": ("QubesException ValueError", None),
}


def named(name):
    return getattr(exc, name, None) or getattr(builtins, name)


@pytest.mark.parametrize(("name", "said"), CLASSES.items(), ids=CLASSES)
def test_it_is_caught_and_made_as_there(name, said):
    bases, arguments = said
    cls = getattr(exc, name)
    for base in bases.split():
        assert issubclass(cls, named(base))
    error = cls("no") if arguments is None else cls(**arguments)
    assert str(error) == "no" if "msg" in (arguments or {}) else str(error)


def test_all_that_are_there_are_here_and_public():
    assert set(exc.__all__) == {*CLASSES, "QubesVMStartError"}


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, (_, said) in CLASSES.items()
        if said and "msg" in said and n != "QubesVMError"
    ],
)
def test_without_a_message_it_has_one_of_its_own(name):
    arguments = {k: v for k, v in CLASSES[name][1].items() if k != "msg"}
    text = str(getattr(exc, name)(**arguments))
    assert text
    assert text != "no"
    assert not text.startswith(("'", '"')), "the repr that a KeyError shows"


def test_what_they_tell_of():
    assert exc.QubesVMError(WORK, "no").vm is WORK
    error = exc.QubesPropertyValueError(WORK, WORK, "pink")
    assert (error.holder, error.prop, error.value) == (WORK, WORK, "pink")
    assert exc.QubesNoSuchPropertyError(WORK, "colour").prop == "colour"
    assert exc.QubesVMNotFoundError("work").vmname == "work"
    assert exc.QubesLabelNotFoundError("pink").label == "pink"
    feature = exc.QubesFeatureNotFoundError(WORK, "os")
    assert (feature.vm, feature.feature) == (WORK, "os")
    tag = exc.QubesTagNotFoundError(WORK, "mine")
    assert (tag.vm, tag.tag) == (WORK, "mine")


def test_errors_of_storage_are_errors_of_the_core():
    with pytest.raises(exc.QubesException):
        raise VolumeExistsError("default", "appvms/work/root", "create", "it is there")
