"""Features and tags: values, events, and whose counts when a VM has none."""

import pytest

from qubes_itests.core import exc


@pytest.fixture
def work(app, template):
    return app.add_new_vm("AppVM", name="work", label="red", template=template)


@pytest.fixture
def events(work):
    seen = []
    work.add_handler("domain-*", lambda _, event, **kw: seen.append((event, kw)))
    return seen


@pytest.mark.parametrize(
    ("value", "stored"),
    [(True, "1"), (False, ""), (None, ""), (0, "0"), ("", ""), ("x y", "x y")],
)
def test_values_are_strings_of_which_the_empty_one_is_false(work, value, stored):
    work.features["x"] = value
    assert work.features["x"] == stored


def test_events_carry_name_value_and_old_value(work, events):
    work.features["x"] = 1
    work.features["x"] = 2
    del work.features["x"]
    first = {"feature": "x", "value": "1"}
    second = {"feature": "x", "value": "2", "oldvalue": "1"}
    assert events == [
        ("domain-feature-pre-set:x", first),
        ("domain-feature-set:x", first),
        ("domain-feature-pre-set:x", second),
        ("domain-feature-set:x", second),
        ("domain-feature-pre-delete:x", {"feature": "x"}),
        ("domain-feature-delete:x", {"feature": "x"}),
    ]


def test_updating_clearing_and_popping_fire_as_well(work, events):
    work.features.update({"a": "1"}, b=True)
    assert work.features.pop("a") == "1"
    work.features.clear()
    assert not work.features
    assert [event for event, _ in events if "pre" not in event] == [
        "domain-feature-set:a",
        "domain-feature-set:b",
        "domain-feature-delete:a",
        "domain-feature-delete:b",
    ]


def test_vetoes_leave_all_as_it_was(work):
    def veto(*_, **__):
        raise PermissionError

    work.features["x"] = "1"
    work.add_handler("domain-feature-pre-*", veto)
    with pytest.raises(PermissionError):
        work.features["x"] = "2"
    with pytest.raises(PermissionError):
        del work.features["x"]
    assert dict(work.features) == {"x": "1"}


def test_announcements_go_from_the_vm_to_its_class(work):
    """And what has happened the other way, as all events do."""
    told, event = [], "domain-feature-*"
    shared = work.app.extensions.handlers
    shared.add(type(work), event, lambda *_, **__: told.append(0))
    work.add_handler(event, lambda *_, **__: told.append(1))
    work.features["x"] = "1"
    del work.features["x"]
    assert told == [1, 0, 0, 1] * 2


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ä", "a\n", 7, None])
def test_names_that_cannot_be(work, name):
    with pytest.raises(exc.QubesValueError, match="no name of a feature"):
        work.features[name] = "1"


def test_whose_feature_counts(app, template, work):
    """The VM's own first, also when it is empty; then in the order of the name."""
    net, far = (
        app.add_new_vm(
            "AppVM", name=name, label="red", template=template, provides_network=True
        )
        for name in ("net", "far")
    )
    net.netvm, work.netvm = far, net
    app.domains["dom0"].features["x"] = "dom0"
    far.features["x"] = "far"
    template.features["x"] = "template"
    features = work.features
    checks = {
        features.check_with_template: "template",
        features.check_with_netvm: "far",
        features.check_with_adminvm: "dom0",
        features.check_with_template_and_adminvm: "template",
    }
    for check, found in checks.items():
        assert check("x") == found
        assert check("y", None) is None
        with pytest.raises(exc.QubesFeatureNotFoundError, match="no such feature: 'y'"):
            check("y")
    del template.features["x"]
    assert features.check_with_template("x", "default") == "default"
    assert features.check_with_template_and_adminvm("x") == "dom0"
    assert app.domains["dom0"].features.check_with_adminvm("x") == "dom0"
    features["x"] = False
    assert [check("x") for check in checks] == ["", "", "", ""]


def test_tags_fire_once_and_only_when_something_changes(work, events):
    work.tags.update(["a", "b", "a"])
    work.tags |= {"c"}
    work.tags.discard("nothing")
    with pytest.raises(exc.QubesTagNotFoundError, match="no such tag: 'nothing'"):
        work.tags.remove("nothing")
    work.tags.remove("a")
    work.tags.clear()
    assert [event for event, _ in events] == [
        *(f"domain-tag-add:{tag}" for tag in "abc"),
        *(f"domain-tag-delete:{tag}" for tag in "abc"),
    ]
    assert all(kwargs == {"tag": event[-1]} for event, kwargs in events)


def test_tags_are_combined_as_sets_are(work, events):
    """What comes of that is a plain set; the VM's tags stay as they are."""
    work.tags.update(["a"], {"b"})
    events.clear()
    assert work.tags & {"a", "c"} == {"a"}
    assert work.tags | {"c"} == {"c"} | work.tags == {"a", "b", "c"}
    assert work.tags - {"a"} == {"b"}
    assert {"a", "c"} - work.tags == {"c"}
    assert work.tags ^ {"a", "c"} == {"b", "c"}
    assert set(work.tags) == {"a", "b"}
    assert events == []


def test_what_is_no_tag(work):
    for value in ("a b", 7, None, "created-by-\n"):
        with pytest.raises(exc.QubesValueError, match="is no tag"):
            work.tags.add(value)


@pytest.mark.parametrize("method", ["Set", "Remove"])
@pytest.mark.parametrize("tag", ["created-by-work", "disp-created-by-work"])
def test_who_made_a_vm_is_not_changed_over_the_admin_api(app, work, method, tag):
    """Policy goes by these tags; others may be changed."""
    event = f"admin-permission:admin.vm.tag.{method}"
    dom0 = app.domains["dom0"]
    with pytest.raises(exc.PermissionDenied, match="is set when a VM is made"):
        dom0.fire_event(event, pre_event=True, dest=work, arg=tag)
    assert dom0.fire_event(event, pre_event=True, dest=work, arg="mine") == []
