"""Properties: defaults, checks, events, cloning."""

import pytest

from qubes_itests.core.exc import QubesNoSuchPropertyError, QubesPropertyValueError
from qubes_itests.core.properties import Property, PropertyHolder, to_bool


def _small(_holder, _prop, value):
    if int(value) > 100:
        raise ValueError("it takes at most 100")
    return int(value)


class Holder(PropertyHolder):
    size = Property("size", setter=_small, default=10, doc="How big it is.")
    flag = Property("flag", type=to_bool, default=False)
    double = Property("double", default=lambda holder: holder.size * 2)
    bare = Property("bare")
    once = Property("once", write_once=True, clone=False)

    def __str__(self):
        return "holder"


@pytest.fixture
def holder():
    holder = Holder()
    holder.events_enabled = True
    return holder


def test_default_value_and_default_function(holder):
    assert (holder.size, holder.double) == (10, 20)
    holder.size = "21"
    assert (holder.size, holder.double) == (21, 42)
    assert not holder.property_is_default("size")
    assert holder.property_get_default("size") == 10


def test_reading_what_was_never_set_is_an_attribute_error(holder):
    with pytest.raises(AttributeError, match="'bare' of holder is not set"):
        _ = holder.bare


def test_refusal_names_holder_property_value_and_reason(holder):
    with pytest.raises(
        QubesPropertyValueError, match="'size' of holder cannot be 101: it takes at"
    ):
        holder.size = 101
    assert holder.size == 10


@pytest.mark.parametrize("value", ["yes", "1", "True", "on", 1, True])
def test_truth(holder, value):
    holder.flag = value
    assert holder.flag is True


def test_neither_true_nor_false(holder):
    with pytest.raises(QubesPropertyValueError, match="truth value"):
        holder.flag = "perhaps"


def test_setting_announces_before_and_after(holder):
    events = []
    holder.add_handler("property-*", lambda _, event, **kw: events.append((event, kw)))
    holder.size = 5
    holder.size = 6
    assert events == [
        ("property-pre-set:size", {"name": "size", "newvalue": 5}),
        ("property-set:size", {"name": "size", "newvalue": 5}),
        ("property-pre-set:size", {"name": "size", "newvalue": 6, "oldvalue": 5}),
        ("property-set:size", {"name": "size", "newvalue": 6, "oldvalue": 5}),
    ]


def test_veto_leaves_the_old_value(holder):
    def veto(*_, **__):
        raise PermissionError

    holder.size = 5
    holder.add_handler("property-pre-set:size", veto)
    with pytest.raises(PermissionError):
        holder.size = 6
    assert holder.size == 5


def test_deleting_resets(holder):
    events = []
    holder.size = 5
    holder.add_handler("property-*", lambda _, event, **__: events.append(event))
    del holder.size
    assert holder.size == 10
    assert holder.property_is_default("size")
    assert events == [
        "property-pre-reset:size",
        "property-pre-del:size",
        "property-reset:size",
        "property-del:size",
    ]


def test_write_once(holder):
    holder.once = 1
    with pytest.raises(QubesPropertyValueError, match="once and for all"):
        holder.once = 2


def test_cloning_copies_what_is_set_and_may_be_cloned(holder):
    holder.size, holder.once = 7, 1
    copy = Holder()
    copy.clone_properties(holder)
    assert copy.size == 7
    assert copy.property_is_default("once")
    assert copy.property_is_default("flag")


def test_unknown_property(holder):
    with pytest.raises(QubesNoSuchPropertyError, match="holder has no property 'no'"):
        holder.property_is_default("no")
    with pytest.raises(QubesNoSuchPropertyError):
        Holder(no=1)


def test_list_is_ordered_and_complete():
    names = [prop.name for prop in Holder.property_list()]
    assert names == ["bare", "double", "flag", "once", "size"]
