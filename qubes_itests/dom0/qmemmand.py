"""The daemon of the core's qmemman, as a program: its own, in a process of its own.

``python -m qubes_itests.dom0.qmemmand XEN SOCKET AVAILABLE CONFIG CLOCK SECONDS``: the
socket of `XenServer`, that of qmemman, a file for what is available, a configuration,
``real`` or ``virtual``, for the time by which it waits, and the most seconds until it
serves; in virtual time, for all that it does. It ends with that server.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import logging
import logging.handlers
import os
import socket
import sys
import threading
import time
import traceback
from types import ModuleType, TracebackType
from typing import Any, Final

from qubes_itests.dom0 import modules

__all__: list[str] = []

_PATH: Final = sys.argv[1]
_CLOCK: Final = sys.argv[5]
#: Of what the daemon knows of a domain.
_FIELDS: Final = ("mem_used", "last_target", "no_progress", "slow_memset_react")


class Error(Exception):
    """What libxenctrl raises."""


class _Connection:
    """Calls of one handle, one at a time."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(_PATH)
        self._answers = self._socket.makefile("rb")
        self._lock = threading.Lock()

    def call(self, *words: object) -> Any:
        with self._lock:
            try:
                self._socket.sendall(json.dumps(words).encode() + b"\n")
                line = self._answers.readline()
            except OSError:
                line = b""
        if not line:
            os._exit(1)  # the machine has gone
        answer = json.loads(line)
        if "error" in answer:
            raise Error(answer["error"])
        return (
            answer["bytes"].encode("latin-1") if "bytes" in answer else answer["value"]
        )


class _Control:
    """A connection to the hypervisor."""

    def __init__(self) -> None:
        self._connection = _Connection()

    def __getattr__(self, name: str) -> Any:
        return lambda *words: self._connection.call(f"xc.{name}", *words)


class _Store:
    """A connection to the XenStore; tokens of watches stay here."""

    def __init__(self) -> None:
        self._connection = _Connection()
        self._tokens: dict[int, object] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *words: self._connection.call(f"xs.{name}", *words)

    def watch(self, path: str, token: object) -> None:
        self._tokens[id(token)] = token
        self._connection.call("xs.watch", path, id(token))

    def unwatch(self, path: str, token: object) -> None:
        self._connection.call("xs.unwatch", path, id(token))
        self._tokens.pop(id(token), None)

    def read_watch(self) -> tuple[str, object]:
        if _CLOCK == "real":
            faulthandler.cancel_dump_traceback_later()  # it serves
        while True:
            _tell(self._connection)
            path, token = self._connection.call("xs.read_watch")
            # one that was not watched any more when its turn came is dropped
            if token in self._tokens:
                return path, self._tokens[token]


class _Waits(threading.local):
    """The waits of a thread, by the time of the machine."""

    def __init__(self) -> None:
        self.connection = _Connection()


class _Lock:
    """A lock that the machine knows of: who waits for it does not work."""

    def acquire(self) -> bool:
        _waits.connection.call("acquire")
        return True

    def release(self) -> None:
        _waits.connection.call("release")

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.release()


def _sleep(seconds: float) -> None:
    _tell(_waits.connection)
    _waits.connection.call("sleep", seconds)


def _tell(connection: _Connection) -> None:
    """Say what the daemon knows of domains."""
    daemon: Any = importlib.import_module("qubes.tools.qmemmand")
    known = _member(daemon.system_state, "dom_dict", "domdict")
    domains = {domid: _said(domain) for domid, domain in tuple(known.items())}
    connection.call("state", domains)


def _said(domain: object) -> dict[str, object]:
    algorithm = importlib.import_module("qubes.qmemman.algo")
    maximum = _member(domain, "mem_max", "memory_maximum")
    said = {name: _member(domain, name) for name in _FIELDS}
    if maximum is None or said["mem_used"] is None:
        preferred = None
    else:
        preferred = _member(algorithm, "pref_mem", "prefmem")(domain)
    return {**said, "maximum": maximum or 0, "preferred": preferred}


def _member(thing: object, *names: str) -> Any:
    """Return a member by the name that it has in one of the releases of core-admin.

    :raise Error: it has none of them.
    """
    for name in names:
        if name in dir(thing):
            return getattr(thing, name)
    raise Error(f"expected {thing!r} to have {' or '.join(names)}")


_waits = _Waits()


def _main() -> None:
    path, available, config, _, seconds = sys.argv[2:]
    # nobody's time passes while it works: one that hangs would never be missed
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    modules.install()
    for name, kind in (("xs", _Store), ("xc", _Control)):
        module = ModuleType(f"xen.lowlevel.{name}")
        vars(module).update({name: kind, "Error": Error})
        modules.place(module.__name__, module)
    # it says all in the file of its standard error, and nothing to this machine's log
    vars(logging.handlers)["SysLogHandler"] = lambda _address: logging.NullHandler()
    core: Any = importlib.import_module("qubes.config")
    if available:
        core.qmemman_avail_mem_file = available
    daemon: Any = importlib.import_module("qubes.tools.qmemmand")
    daemon.SOCK_PATH = path
    if _CLOCK == "virtual":
        vars(time)["sleep"] = _sleep
        lock = "GLOBAL_LOCK" if "GLOBAL_LOCK" in vars(daemon) else "global_lock"
        vars(daemon)[lock] = _Lock()
    sys.argv[1:] = ["--foreground", "--config", config]
    daemon.main()


if __name__ == "__main__":
    try:
        _main()
    except BaseException:  # noqa: BLE001 - it may raise what it likes
        traceback.print_exc()
    sys.stderr.flush()
    # its other threads would go on, and no start would get an answer
    os._exit(1)
