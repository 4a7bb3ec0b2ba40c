"""The VMs of an app: found, numbered and forgotten, however many there are."""

import sys
import uuid

import pytest

from qubes_itests.core import config, exc
from qubes_itests.core.store.document import to_bytes
from qubes_itests.core.store.saving import state_of


def add(app, name, **properties):
    return app.add_new_vm("TemplateVM", name=name, label="black", **properties)


def test_removed_vm_is_found_by_none_of_its_keys(app):
    vm = add(app, "one")
    keys = (vm, vm.name, vm.qid, vm.uuid)
    del app.domains["one"]
    assert not any(key in app.domains for key in keys)
    assert add(app, "one") is not vm


def test_what_is_no_key_is_not_found(app):
    add(app, "one")
    for key in (None, "1", 1.5, b"one", ["one"], uuid.uuid4()):
        assert key not in app.domains


@pytest.mark.parametrize(
    ("taken", "said"),
    [("qid", "with qid 7"), ("uuid", "with UUID"), ("name", "a VM 'one'")],
)
def test_taken_identity_is_refused_and_leaves_the_first(app, taken, said):
    one = add(app, "one", qid=7)
    other = {"name": "two", "qid": 8} | {taken: getattr(one, taken)}
    with pytest.raises(exc.QubesValueError, match=said):
        add(app, **other)
    assert app.domains.keys() == ["dom0", "one"]
    assert app.domains[7] is one


def test_lowest_free_number_is_given_again(app):
    vms = [add(app, f"vm{n}") for n in range(5)]
    assert [vm.qid for vm in vms] == [1, 2, 3, 4, 5]
    del app.domains["vm3"], app.domains["vm1"]
    assert [add(app, name).qid for name in "abc"] == [2, 4, 6]


def test_numbers_that_were_chosen_are_passed_over(app):
    add(app, "first", qid=1)
    add(app, "third", qid=3)
    assert [add(app, name).qid for name in "ab"] == [2, 4]


def test_all_numbers_taken(app, monkeypatch):
    monkeypatch.setattr(config, "max_qid", 2)
    add(app, "a")
    add(app, "b")
    with pytest.raises(LookupError, match="all 2 numbers"):
        app.domains.get_new_unused_qid()


@pytest.mark.parametrize("qid", [-1, config.max_qid + 1, "x"])
def test_number_out_of_range(app, qid):
    with pytest.raises(exc.QubesPropertyValueError, match="qid"):
        add(app, "one", qid=qid)


def test_name_and_number_stay(app):
    vm = add(app, "one")
    for name, value in (("name", "two"), ("qid", 77)):
        with pytest.raises(exc.QubesPropertyValueError, match="once and for all"):
            setattr(vm, name, value)


def test_refused_vm_does_not_take_the_volumes_of_the_one_that_is_there(app):
    one = add(app, "one")
    with pytest.raises(exc.QubesValueError, match="a VM 'one' already"):
        add(app, "one", qid=5)
    for volume in one.volumes.values():
        assert volume.pool.get_volume(volume.vid) is volume


def test_default_pool_is_one_that_there_is(app):
    with pytest.raises(exc.QubesPropertyValueError, match="there are: default"):
        app.default_pool = "none such"
    app.default_pool = app.get_pool("default")
    assert app.default_pool is app.pools["default"]
    assert app.default_pool == "default"
    assert app.default_pool_private == app.pools.default_of("root") == "default"
    app.default_pool = None
    assert app.default_pool is None


def calls_of(function, *args):
    """Count the Python functions that a call calls: its cost without a clock."""
    count = 0

    def profile(_frame, event, _arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return count


def test_a_vm_is_made_at_the_same_cost_among_many(app, template):
    def make(name):
        vm = app.add_new_vm("AppVM", name=name, label="red", template=template)
        vm.memory, vm.maxmem, vm.vcpus = 500, 4000, 2
        vm.virt_mode, vm.kernelopts, vm.default_user = "hvm", "quiet", "user"
        vm.label, vm.provides_network = "blue", True
        vm.netvm = None
        vm.features["service.a"] = "1"
        vm.tags.add("a")
        del vm.memory

    make("warm-up")
    among_few = calls_of(make, "few")
    for number in range(100):
        make(f"vm-{number}")
    # Each look at all VMs is at least one call for each of the hundred.
    assert calls_of(make, "many") < among_few + 100


def test_a_save_looks_only_at_what_was_set(app, template):
    """Each VM that is made saves all of them, so what one takes counts."""

    def cost():
        return calls_of(lambda: to_bytes(state_of(app)))

    def make(name):
        app.add_new_vm("AppVM", name=name, label="red", template=template)

    make("first")
    before = cost()
    for number in range(10):
        make(f"vm-{number}")
    # Five for each of forty properties were as many again.
    assert cost() - before < 10 * 300
