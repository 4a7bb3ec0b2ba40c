"""The events of the core: their names, their keywords, who fires them and when.

A word in capitals after the colon stands for any text: ``property-set:NAME`` is
``property-set:label`` and ``property-set:netvm`` alike.  Handlers of any other event
are refused, for they would never be called; `declare` adds events of one's own.

The list of docs/events.md is written from here, and a test compares it with what the
source fires.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from dataclasses import dataclass
from typing import Final

__all__ = ["EVENTS", "Event", "check_pattern", "declare"]


@dataclass(frozen=True)
class Event:
    """One event, or all that begin alike.

    :param name: as above.
    :param when: who fires it, and when.
    :param keywords: what each handler gets.
    :param optional: what it gets if there is such a thing; ``**``: more, as it comes.
    :param announces: whether it is fired before the thing happens, with `pre_event`.
    :param fired: whether it is fired here; if not, Qubes OS alone does.
    """

    name: str
    when: str
    keywords: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    announces: bool = False
    fired: bool = True


_ATTACHING: Final = ("device", "options")
_CHANGE: Final = ("name", "newvalue")
_GUID: Final = ("start_guid",)
_OLD: Final = ("oldvalue",)

#: All that are fired here, or by the core of Qubes OS.
EVENTS: Final = (
    Event("app-saved", "the app, when its state is saved"),
    Event("domain-add", "the app, when it has a new VM", ("vm",)),
    Event(
        "domain-pre-delete", "the app, before a VM is removed", ("vm",), announces=True
    ),
    Event("domain-delete", "the app, when a VM is removed", ("vm",)),
    Event("pool-add", "the app, when it has a new pool", ("pool",)),
    Event(
        "pool-pre-delete",
        "the app, before it forgets a pool",
        ("pool",),
        announces=True,
    ),
    Event("pool-delete", "the app, when it has forgotten a pool", ("pool",)),
    Event("qubes-close", "the app, when it is closed"),
    Event(
        "property-pre-set:NAME",
        "the app or a VM, before a property is set",
        _CHANGE,
        _OLD,
        announces=True,
    ),
    Event(
        "property-set:NAME", "the app or a VM, when a property is set", _CHANGE, _OLD
    ),
    Event(
        "property-pre-reset:NAME",
        "the app or a VM, before a property gets its default",
        ("name",),
        _OLD,
        announces=True,
    ),
    Event(
        "property-pre-del:NAME",
        "the app or a VM, after `property-pre-reset:NAME`",
        ("name",),
        _OLD,
        announces=True,
    ),
    Event(
        "property-reset:NAME",
        "the app or a VM, when a property has its default, or another default",
        ("name",),
        _OLD,
    ),
    Event(
        "property-del:NAME",
        "the app or a VM, after `property-reset:NAME` of one that was set",
        ("name",),
        _OLD,
    ),
    Event(
        "clone-properties",
        "the app or a VM, when it has the properties of another",
        ("src", "proplist"),
    ),
    Event("domain-init", "a VM, when it is new, before `domain-add`"),
    Event("domain-load", "a VM, when it is loaded from the store"),
    Event("domain-create-on-disk", "a VM, when its volumes are made"),
    Event("domain-clone-files", "a VM, when its volumes are copies", ("src",)),
    Event("domain-remove-from-disk", "a VM, before its volumes are removed"),
    Event("domain-verify-files", "a VM, when its volumes are found in order"),
    Event(
        "domain-import-volume",
        "a VM, when a volume has the content of another",
        ("name", "source"),
    ),
    Event(
        "domain-volume-import-begin",
        "a VM, before data are written to a volume; `size` in bytes",
        ("volume", "size"),
    ),
    Event(
        "domain-volume-import-end",
        "a VM, when they are written, or cannot be",
        ("volume", "success"),
    ),
    Event(
        "domain-pre-start",
        "a VM, before it starts; `mem_required` in bytes",
        (*_GUID, "mem_required"),
        announces=True,
    ),
    Event("domain-spawn", "a VM, when its domain and its agent run", _GUID),
    Event("domain-start", "a VM, when it is started", _GUID),
    Event("domain-start-failed", "a VM, when its start is undone", ("reason",)),
    Event("domain-pre-paused", "a VM, before it is paused", announces=True),
    Event("domain-paused", "a VM, when it is paused"),
    Event("domain-pre-unpaused", "a VM, before it is unpaused", announces=True),
    Event("domain-unpaused", "a VM, when it is unpaused"),
    Event(
        "domain-pre-shutdown",
        "a VM, before it is asked to shut down",
        ("force",),
        announces=True,
    ),
    Event("domain-shutdown-failed", "a VM, when it does not shut down", ("reason",)),
    Event("domain-stopped", "a VM, when its run has ended, once"),
    Event("domain-shutdown", "a VM, after `domain-stopped`"),
    Event(
        "domain-cmd-pre-run", "a VM, before it runs a command", _GUID, announces=True
    ),
    Event(
        "domain-qdb-change:PATH",
        "a VM, when an entry of its database that is watched changes",
        ("path",),
    ),
    Event(
        "domain-feature-pre-set:NAME",
        "a VM, before a feature is set",
        ("feature", "value"),
        _OLD,
        announces=True,
    ),
    Event(
        "domain-feature-set:NAME",
        "a VM, when a feature is set",
        ("feature", "value"),
        _OLD,
    ),
    Event(
        "domain-feature-pre-delete:NAME",
        "a VM, before a feature is deleted",
        ("feature",),
        announces=True,
    ),
    Event(
        "domain-feature-delete:NAME", "a VM, when a feature is deleted", ("feature",)
    ),
    Event("domain-tag-add:TAG", "a VM, when it has a new tag", ("tag",)),
    Event("domain-tag-delete:TAG", "a VM, when it has lost a tag", ("tag",)),
    Event(
        "features-request",
        "a VM, when its guest asks for features",
        ("untrusted_features",),
    ),
    Event("template-postinstall", "a VM, when its guest has qrexec for the first time"),
    Event("firewall-changed", "a VM, when its rules are set or to be read anew"),
    Event(
        "net-domain-connect", "a net VM, when a running VM is connected to it", ("vm",)
    ),
    Event("net-domain-disconnect", "a net VM, when a VM has left it", ("vm",)),
    Event(
        "device-list:CLASS", "a VM that is asked for its devices; handlers yield them"
    ),
    Event(
        "device-get:CLASS",
        "a VM that is asked for one device; a handler yields it",
        ("port_id",),
    ),
    Event(
        "device-list-attached:CLASS",
        "a VM that is asked what it has; handlers yield devices with their options",
    ),
    Event("device-list-change:CLASS", "a VM, when it exposes other devices"),
    Event("device-added:CLASS", "a VM, when it exposes one more device", ("device",)),
    Event("device-removed:CLASS", "a VM, when it exposes one less", ("port",)),
    Event(
        "device-pre-assign:CLASS",
        "a VM, before it is assigned a device, or another mode of one",
        _ATTACHING,
        announces=True,
    ),
    Event("device-assign:CLASS", "a VM, when it is assigned a device", _ATTACHING),
    Event(
        "device-assignment-changed:CLASS",
        "a VM, when an assignment has another mode",
        ("device",),
    ),
    Event("device-unassign:CLASS", "a VM, when an assignment is gone", ("device",)),
    Event(
        "device-pre-attach:CLASS",
        "a VM, for a handler to attach a device",
        _ATTACHING,
        announces=True,
    ),
    Event("device-attach:CLASS", "a VM, when a device is attached", _ATTACHING),
    Event(
        "device-pre-detach:CLASS",
        "a VM, for a handler to detach a device",
        ("port",),
        announces=True,
    ),
    Event("device-detach:CLASS", "a VM, when a device is detached", ("port",)),
    Event(
        "admin-permission:METHOD",
        "a VM that calls the Admin API, before the method acts, with what it is to do",
        ("dest", "arg"),
        ("**",),
        announces=True,
    ),
    Event(
        "backup-get-files", "a VM that is backed up; handlers yield paths", fired=False
    ),
    Event(
        "backup-progress",
        "the app, during a backup",
        ("backup_profile", "progress"),
        fired=False,
    ),
    Event("domain-is-fully-usable", "a VM that is asked whether it is", fired=False),
    Event("domain-pre-spawn", "a VM, before its domain is made", _GUID, fired=False),
    Event(
        "domain-preload-dispvm-start",
        "a VM that is to preload disposable VMs",
        ("reason",),
        fired=False,
    ),
    Event(
        "domain-preload-dispvm-used",
        "a VM, when one of its preloaded disposable VMs is used",
        ("dispvm", "delay"),
        fired=False,
    ),
    Event("domain-qdb-create", "a VM, when its database is filled", fired=False),
    Event("domain-restore", "a VM, when it comes from a backup", fired=False),
    Event("domain-resumed", "a VM, when it wakes up", fired=False),
    Event("property-load", "the app or a VM, when it is loaded", fired=False),
    Event("testevent", "an object of the core's own tests", fired=False),
)

#: With the part that stands for any text as ``*``.
_patterns: Final = {re.sub(":[A-Z]+$", ":*", event.name) for event in EVENTS}


def declare(*names: str) -> None:
    """Let handlers listen to events that are not the core's; call it before them.

    :param names: of the events; ``*`` at the end stands for any text, as in
        ``my-event:*``.
    :raise ValueError: for other wildcards.
    """
    for name in names:
        if re.search(r"[*?\[]", name.removesuffix("*")) or name in ("", "*"):
            raise ValueError(
                "expected the name of an event, with * at its end at most,"
                f" got {name!r}"
            )
    _patterns.update(names)


def check_pattern(pattern: str) -> None:
    """Refuse a handler's pattern that no declared event matches; ValueError then."""
    if pattern in _patterns or any(_match(pattern, known) for known in _patterns):
        return
    near = difflib.get_close_matches(pattern, _patterns, n=1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        "expected the name of an event that is declared (docs/events.md lists those of"
        " the core, qubes_itests.core.event_names.declare adds one's own),"
        f" got {pattern!r}{hint}"
    )


def _match(pattern: str, known: str) -> bool:
    if not re.search(r"[*?\[]", pattern):
        # As nearly all are. What follows compiles an expression for each beginning of a
        # pattern: for these it took half of the time to import the core.
        return pattern.startswith(known[:-1]) if known[-1] == "*" else pattern == known
    if not known.endswith("*"):
        return fnmatch.fnmatchcase(known, pattern)
    # what is left of the pattern may match the open part, whatever it is
    begin = known.removesuffix("*")
    return any(
        fnmatch.fnmatchcase(begin, pattern[:end]) for end in range(1, len(pattern) + 1)
    )
