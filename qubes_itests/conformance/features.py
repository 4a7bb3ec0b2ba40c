"""Features of storage drivers; a driver declares those that it lacks.

A test of the suite belongs to one feature.  A driver that lacks the feature has its
name in `lacks` (see `qubes_itests.conformance.storage`), and the same tests then prove
the lack: each has to fail with one of storage's own errors, and with nothing else.
`shared_extents` is no operation: there the test itself raises such an error.
What is `UNPROMISED` is not refused: something else happens than with other drivers, and
those tests may fail in any way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "FEATURES",
    "LACKABLE",
    "MARKER",
    "UNPROMISED",
    "check_lacks",
    "feature",
]

_REQUIRED: Final = {
    "life": "volumes are created, started, written, stopped, removed",
    "volatile": "volatile volumes are empty at every start",
    "reopening": "a new pool object finds what the last one left",
    "accounting": "sizes and usage are reported",
    "errors": "what fails is an error of storage, and changes nothing",
}

_REFUSED: Final = {
    "snapshots": "snapshots start from their source's committed image",
    "snapshot_running_source": "a source may run while snapshots of it start",
    "snapshot_saved": "snapshots may be saved on stop",
    "export": "committed images can be read, also while their VMs run",
    "import_data": "contents can be replaced by new data",
    "import_volume": "contents can be replaced by those of another volume",
    "stopped_resize": "stopped volumes can be enlarged",
    "stopped_shrink": "stopped volumes can be made smaller",
    "online_resize": "running volumes can be enlarged",
    "revisions": "one former image is kept, and can be reverted to",
    "many_revisions": "any number of former images is kept",
    "no_snapshot": "with revisions_to_keep=-1 there is no snapshot while a VM runs",
    "shared_extents": "a start takes no room; never without reflinks",
}

#: Features of which a driver without them says nothing.
UNPROMISED: Final = {
    "outdated": "snapshots know that their source has changed",
    "read_only": "read-only volumes change by imports alone",
    "dirty": "a volume is dirty from its start to its stop",
    "crash_recovery": "what a killed process leaves is gone on with, or removed",
    "strict_states": "what the state of a volume forbids is refused",
    "size_checks": "sizes that cannot be are refused",
    "config_checks": "names and configurations that cannot be are refused",
    "import_creates": "an import begins a volume that was never created",
    "second_process": "two processes never use one volume at once",
    "full_disk": "without space an operation fails as a whole",
    "power_cuts": "what an operation promised survives a power cut",
    "no_snapshot_power_cuts": "also that of a volume without snapshots",
}

#: The features that a driver may lack, with a sentence about each.
LACKABLE: Final = {**_REFUSED, **UNPROMISED}

#: All features, with a sentence about each, in the order of the table.
FEATURES: Final = {**_REQUIRED, **LACKABLE}

#: The pytest marker that says which feature a test belongs to.
MARKER: Final = "qubes_storage_feature"

Test = TypeVar("Test", bound="Callable[..., Any]")


def feature(name: str) -> Callable[[Test], Test]:
    """Return a decorator that makes a test one of a feature.

    :param name: one of `FEATURES`.
    :raise KeyError: for any other name.
    """
    FEATURES[name]
    mark: Callable[[Test], Test] = getattr(pytest.mark, MARKER)(name)
    return mark


def check_lacks(names: Iterable[str]) -> frozenset[str]:
    """Return the names of features that a driver lacks.

    :raise ValueError: for a feature that a driver may not lack.
    """
    lacks = frozenset(names)
    if unknown := sorted(lacks - set(LACKABLE)):
        raise ValueError(
            f"a driver cannot lack {', '.join(unknown)}; it may lack"
            f" {', '.join(LACKABLE)}"
        )
    return lacks
