"""Volumes filled from a stream, as ``qvm-volume import`` does it."""

from __future__ import annotations

import select
import socket
from contextlib import suppress

import pytest
from admin_client import AdminError, parse
from conditions import wait_until

from qubes_itests.serve.wire import IMPORT, STDIN, frame

MIB = 1 << 20


@pytest.fixture
def halted(server):
    """Return the server, with a VM `filled` that never ran."""
    server.client.call(
        "admin.vm.Create.AppVM", argument="tiny", payload=b"name=filled label=blue"
    )
    yield server
    server.client.call("admin.vm.Remove", "filled")


def info(server, vm, volume):
    lines = server.client.call("admin.vm.volume.Info", vm, volume).decode().splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_a_volume_takes_the_size_of_what_comes(halted):
    data = b"begin" + bytes(30 * MIB) + b"end"
    reply = halted.import_volume("filled", "private", b"%d\n" % len(data) + data)
    assert parse(reply) == b""
    assert info(halted, "filled", "private")["size"] == str(len(data))
    # only those in the server's own namespaces see the pool, so it is cloned and read
    assert int(info(halted, "filled", "private")["usage"]) < MIB


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"7\nsix666", "6 bytes"),
        (b"5\nsix666", "more"),
        (b"-5\nfive5", "expected a number of bytes"),
        (b"05\nfive5", "expected a number of bytes"),
        (b"", "expected a number of bytes"),
        (b"1" * 100, "expected a number of bytes"),
    ],
)
def test_wrong_sizes_change_nothing(halted, data, said):
    before = info(halted, "filled", "private")
    with pytest.raises(AdminError, match=said) as caught:
        parse(halted.import_volume("filled", "private", data))
    assert caught.value.kind == "QubesDaemonAccessError"
    assert info(halted, "filled", "private") == before


@pytest.mark.parametrize(
    ("vm", "volume", "kind"),
    [
        ("work", "private", "QubesVMNotHaltedError"),
        ("filled", "none", "QubesDaemonAccessError"),
        ("none", "private", "QubesVMNotFoundError"),
        ("dom0", "private", "QubesDaemonAccessError"),
    ],
)
def test_what_cannot_be_filled(halted, vm, volume, kind):
    with pytest.raises(AdminError) as caught:
        parse(halted.import_volume(vm, volume, b"4\nfour"))
    assert caught.value.kind == kind


def test_clients_that_vanish_within_milliseconds_leave_the_volume_free(halted):
    """Wherever their imports were by then, the next one is made as any other."""
    before = info(halted, "filled", "private")
    request = b"filled\0private\0admin.vm.volume.ImportWithSize"
    for step in range(60):
        # the one before may not have ended yet, and refuses this one
        with socket.socket(socket.AF_UNIX) as client, suppress(ConnectionError):
            client.connect(str(halted.socket.with_name("qrexec.sock")))
            client.sendall(frame(IMPORT, request) + frame(STDIN, b"%d\n" % MIB))
            client.sendall(frame(STDIN, bytes(MIB // 32)))
            select.select([], [], [], step / 1000)

    def is_free():
        try:
            return parse(halted.import_volume("filled", "private", b"4\nfour")) == b""
        except AdminError as error:
            if "an import is under way" not in str(error):
                raise
            return False

    wait_until(is_free, "end of the imports")
    after = info(halted, "filled", "private")
    assert (after["size"], after["path"]) == ("4", before["path"])
