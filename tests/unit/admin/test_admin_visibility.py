"""What a VM that may call the Admin API gets to see: what policy lets it ask for."""

import asyncio
import logging

import pytest

from qubes_itests.admin.dispatch import METHODS, Dispatcher
from qubes_itests.admin.protocol import Request
from qubes_itests.admin.streams import EventStream


class Heard(EventStream):
    """Keeps subjects and names of events."""

    def __init__(self):
        super().__init__()
        self.events = []
        self.established = asyncio.Event()

    def _write(self, data):
        _, subject, name, *_ = data.decode().split("\0")
        self.events.append((subject, name))
        self.established.set()

    def _backlog(self):
        return 0

    def _drop(self):
        raise AssertionError("nothing waits")


@pytest.fixture
def app(app):
    app.add_new_vm("AppVM", name="mgmt", label="red")
    return app


@pytest.fixture
def listed(app, run):
    """List VMs as `mgmt` does."""
    dispatcher = Dispatcher(app, METHODS)

    def call(destination="dom0"):
        request = Request("admin.vm.List", "", "mgmt", destination)
        content = run(dispatcher.answer(request)).removeprefix(b"0\0").decode()
        return [line.split()[0] for line in content.splitlines()]

    return call


@pytest.fixture
def heard(app, run):
    """Have `mgmt` hear of all that a function does, and return what it heard."""
    dispatcher = Dispatcher(app, METHODS)

    async def listen(function):
        stream = Heard()
        request = Request("admin.Events", "", "mgmt")
        listening = asyncio.create_task(dispatcher.answer(request, stream))
        await stream.established.wait()
        function()
        stream.close()
        assert await listening is None
        assert stream.events.pop(0) == ("", "connection-established")
        return stream.events

    return lambda function: run(listen(function))


def test_a_vm_finds_no_more_in_the_list_than_it_could_ask_for(app, listed):
    assert listed() == []
    app.policy.add_rule("admin.vm.List * mgmt @adminvm allow")
    assert listed() == ["dom0"]
    app.policy.add_rule("admin.vm.List * mgmt @tag:mine allow target=dom0")
    app.domains["work"].tags.add("mine")
    assert listed() == ["dom0", "work"]
    assert listed("work") == ["work"]
    app.policy.add_rule("admin.vm.List * mgmt work deny")
    assert listed() == ["dom0"]


def test_what_would_be_asked_is_not_listed_and_nobody_asked(app, listed, caplog):
    caplog.set_level(logging.INFO)
    app.policy.ask_handler = lambda question: pytest.fail(str(question))
    app.policy.add_rule("admin.vm.List * mgmt * ask target=dom0")
    assert listed() == []
    assert [r for r in caplog.records if r.name == "qubes.policy"] == []


def test_a_vm_hears_of_no_more_than_it_could_ask_for(app, heard):
    def change():
        app.domains["work"].features["os"] = "Linux"
        app.domains["work"].features["other"] = "x"
        app.domains["tiny"].features["os"] = "Linux"
        app.fire_event("something")

    assert heard(change) == []
    app.policy.add_rule(
        "admin.Events +domain-feature-set_os mgmt work allow target=dom0"
    )
    assert heard(change) == [("work", "domain-feature-set:os")]
    app.policy.add_rule("admin.Events +something mgmt @adminvm allow")
    assert ("", "something") in heard(change)


def test_new_and_removed_vms_are_heard_of_by_their_own_rules(app, heard):
    def add_and_remove():
        vm = app.add_new_vm("StandaloneVM", name="new", label="red")
        vm.tags.add("mine")
        del app.domains[vm]

    app.policy.add_rule("admin.Events * mgmt @adminvm allow")
    assert not {("", "domain-add"), ("", "domain-delete")} & set(heard(add_and_remove))
    app.policy.add_rule("admin.Events * mgmt new allow target=dom0")
    assert ("", "domain-add") in (events := heard(add_and_remove))
    assert ("new", "domain-tag-add:mine") in events
    assert ("", "domain-delete") not in events
    app.policy.add_rule("admin.Events * mgmt @default allow target=dom0")
    assert ("", "domain-delete") in heard(add_and_remove)


def test_what_is_forbidden_meanwhile_is_not_heard(app, heard, tmp_path):
    directory = tmp_path / "policy.d"
    directory.mkdir()
    rules = directory / "30-mgmt.policy"
    rules.write_text("admin.Events * mgmt work allow target=dom0\n")
    app.policy.load_directory(directory)

    def change():
        app.domains["work"].fire_event("first")
        rules.write_text("admin.Events * mgmt work deny\n")
        app.domains["work"].fire_event("second")

    assert heard(change) == [("work", "first")]
