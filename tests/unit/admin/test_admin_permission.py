"""Each method asks for permission before it does or tells anything."""

import pytest
from admin_client import AdminError, parse
from admin_mutations import VALID, exchange, state_of

from qubes_itests.admin.dispatch import METHODS
from qubes_itests.core.exc import PermissionDenied

#: Those whose payload must name what is there only after another call.
NEEDING_MORE = {
    "admin.vm.volume.CloneTo",
    "admin.vm.volume.Import",
    "admin.vm.volume.Revert",
}


def method_of(data):
    return data.partition(b"+")[0].decode()


@pytest.fixture
def vetoed(app):
    """Have dom0 be refused all, and return what it asked for."""
    asked = []

    def veto(_vm, event, **_kwargs):
        asked.append(event)
        raise PermissionDenied("nothing at all")

    app.domains["work"].template_for_dispvms = True
    app.add_new_vm("AppVM", name="dvm", label="red", template_for_dispvms=True)
    app.domains["dom0"].add_handler("admin-permission:*", veto)
    return asked


def test_nothing_is_done_or_told_without_permission(app, server, vetoed):
    before = state_of(app)
    refused = set()
    for data in VALID:
        vetoed.clear()
        with pytest.raises(AdminError) as caught:
            parse(exchange(server.path, data))
        if caught.value.text == "nothing at all":
            assert caught.value.kind == "QubesDaemonAccessError"
            assert vetoed == [f"admin-permission:{method_of(data)}"]
            refused.add(method_of(data))
        assert state_of(app) == before
    assert set(METHODS) - refused == NEEDING_MORE
    assert app.saved == 0


def test_no_method_is_left_out():
    assert set(map(method_of, VALID)) == set(METHODS)
