"""The stream of events: who hears what, and what a client that sleeps costs."""

import asyncio
import select
import socket

import pytest
from admin_client import AdminError, frame, wait_until

from qubes_itests.admin import streams
from qubes_itests.admin.methods import events as methods_events
from qubes_itests.admin.usage import Usage


def fire(app, run, name, event, **values):
    async def fire_():
        subject = app if name is None else app.domains[name]
        subject.fire_event(event, **values)

    run(fire_())


def handlers(app):
    """Count the handlers that objects of the app have of their own."""
    return {str(each): len(each._instance_handlers) for each in (app, *app.domains)}


def test_a_stream_begins_by_saying_that_it_is_there(client):
    with client.events() as events:
        first = next(events)
    assert (first.subject, first.name, first.values) == (
        "",
        "connection-established",
        {},
    )


def test_events_of_the_app_and_of_vms_are_heard(client, app, run):
    with client.events() as events:
        next(events)
        fire(app, run, None, "something", about="x")
        fire(app, run, "work", "something-else", n=1, nothing=None)
        assert (first := next(events)).subject == ""
        assert first.values == {"about": "x"}
        second = next(events)
    assert (second.subject, second.name) == ("work", "something-else")
    assert second.values == {"n": "1", "nothing": "None"}


def test_what_others_change_is_heard(client):
    with client.events() as events:
        next(events)
        client.call("admin.vm.property.Set", "work", "memory", b"500")
        heard = [next(events) for _ in range(2)]
    assert [each.name for each in heard] == [
        "property-pre-set:memory",
        "property-set:memory",
    ]
    assert heard[1].values["newvalue"] == "500"


def test_vms_that_are_added_later_are_heard_and_removed_ones_forgotten(client, app):
    before = handlers(app)
    with client.events() as events:
        next(events)
        client.call("admin.vm.Create.AppVM", "dom0", "tiny", b"name=new label=red")
        added = app.domains["new"]
        client.call("admin.vm.tag.Set", "new", "late")
        client.call("admin.vm.Remove", "new")
        names = []
        while "domain-delete" not in names:
            names.append(next(events).name)
        assert "domain-add" in names
        assert "domain-tag-add:late" in names
        assert added._instance_handlers == []
    assert set(before) == set(handlers(app))


def test_any_number_of_streams_is_one_handler(client, app, run):
    """What is fired costs the same however many listen, and all of them hear it."""
    with client.events() as first, client.events() as second:
        next(first)
        next(second)
        assert set(handlers(app).values()) == {1}
        fire(app, run, "work", "told")
        assert next(first).name == next(second).name == "told"


def test_a_stream_of_one_vm_hears_of_no_other(client, app, run):
    with client.events("work") as events:
        next(events)
        fire(app, run, "tiny", "of-tiny")
        fire(app, run, None, "of-app")
        fire(app, run, "work", "of-work")
        assert next(events).name == "of-work"


def test_questions_within_the_core_are_not_sent(client, app, run):
    with client.events() as events:
        next(events)
        fire(app, run, "work", "admin-permission:admin.vm.List")
        fire(app, run, "work", "device-get:block", port_id="x")
        fire(app, run, "work", "told")
        assert next(events).name == "told"


def test_filters_hold(client, app, run):
    app.domains["dom0"].add_handler(
        "admin-permission:admin.Events",
        lambda *_args, **_kwargs: [lambda item: item[1] != "secret"],
    )
    with client.events() as events:
        next(events)
        fire(app, run, "work", "secret")
        fire(app, run, "work", "public")
        assert next(events).name == "public"


def test_a_filter_that_fails_hides_the_event_and_harms_nobody(client, app, caplog):
    app.domains["dom0"].add_handler(
        "admin-permission:admin.Events",
        lambda *_args, **_kwargs: [lambda item: item[2]["feature"] != "secret"],
    )
    with client.events() as events:
        next(events)
        client.call("admin.vm.tag.Set", "work", "mine")
        client.call("admin.vm.feature.Set", "work", "told", b"1")
        assert next(events).name == "domain-feature-pre-set:told"
    assert "mine" in app.domains["work"].tags
    assert "KeyError: 'feature'" in caplog.text


def test_a_report_of_usage_that_fails_ends_the_stream(client, app):
    def fail(_name):
        raise ZeroDivisionError

    app.domains["dom0"].add_handler(
        "admin-permission:admin.vm.Stats", lambda *_args, **_kwargs: [fail]
    )
    with client.events(method="admin.vm.Stats") as events:
        assert next(events).name == "connection-established"
        with pytest.raises(AdminError, match="ZeroDivisionError"):
            next(events)


def test_a_veto_is_answered(client, app):
    from qubes_itests.core.exc import PermissionDenied  # noqa: PLC0415

    def veto(*_args, **_kwargs):
        raise PermissionDenied("not you")

    app.domains["dom0"].add_handler("admin-permission:admin.Events", veto)
    with client.events() as events, pytest.raises(AdminError, match="not you"):
        next(events)


def test_a_client_that_went_leaves_nothing_behind(client, app, server):
    """Nothing is sent meanwhile: that the socket is closed is seen by itself."""
    before = handlers(app)
    for _ in range(3):
        with client.events() as events:
            next(events)
            assert handlers(app) != before
        wait_until(lambda: handlers(app) == before)
    wait_until(lambda: not server.clients)


def test_a_client_that_does_not_read_is_dropped_and_delays_nobody(
    client, app, run, server, monkeypatch
):
    monkeypatch.setattr(streams, "LONGEST_BACKLOG", 100_000)
    before = handlers(app)
    with socket.socket(socket.AF_UNIX) as sleeper:
        sleeper.connect(str(server.path))
        sleeper.sendall(frame("admin.Events"))
        sleeper.shutdown(socket.SHUT_WR)
        wait_until(lambda: handlers(app) != before)
        with client.events() as events:
            next(events)
            for _ in range(100):
                fire(app, run, "work", "long", text="x" * 10_000)
                assert next(events).name == "long"
            gone = select.poll()
            gone.register(sleeper, 0)
            assert gone.poll(300_000)
    wait_until(lambda: handlers(app) == before)


def test_closing_the_server_ends_streams(client, app, server, run):
    before = handlers(app)
    with client.events() as events:
        next(events)
        run(server.__aexit__(None, None, None))
        assert list(events) == []
    assert handlers(app) == before


def test_stats_say_first_that_they_are_there_and_end_with_the_client(client, server):
    with client.events(method="admin.vm.Stats") as events:
        assert next(events).name == "connection-established"
    wait_until(lambda: not server.clients)


def test_stats_of_others_come_while_one_vm_does_not_answer(client, monkeypatch):
    async def usage(vm, at):
        if vm.name == "tiny":
            await asyncio.Event().wait()
        return Usage(1 << 20 if vm.name == "work" else 0, 1.0, at)

    monkeypatch.setattr(methods_events, "usage_of", usage)
    monkeypatch.setattr(methods_events, "STATS_INTERVAL", 0.01)
    with client.events(method="admin.vm.Stats") as events:
        heard = [next(events) for _ in range(5)]
    assert [event.subject for event in heard] == ["", *["work"] * 4]
