"""Properties: defaults, checks, events, cloning."""

import pytest

from qubes_itests.core.events import SharedHandlers
from qubes_itests.core.exc import QubesNoSuchPropertyError, QubesPropertyValueError
from qubes_itests.core.properties import Property, PropertyHolder, stateless_property


def _small(_holder, _prop, value):
    if int(value) > 100:
        raise ValueError("it takes at most 100")
    return int(value)


def _after_size(holder, _prop, value):
    if value > holder.size:
        raise ValueError("it takes at most size")
    return value


class Holder(PropertyHolder):
    size = Property("size", setter=_small, default=10, doc="How big it is.")
    flag = Property("flag", type=bool, default=False)
    double = Property("double", default=lambda holder: holder.size * 2)
    bare = Property("bare")
    once = Property("once", write_once=True, clone=False)
    count = Property("count", type=int, default=0, save_via=Property.dontsave)
    later = Property("later", setter=_after_size, default=0, order=1)

    @stateless_property(type=int)
    def sum(self) -> int:
        """All together."""
        return self.size + self.double

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
        ("property-pre-set:size", {"name": "size", "newvalue": 5, "oldvalue": 10}),
        ("property-set:size", {"name": "size", "newvalue": 5, "oldvalue": 10}),
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


def test_announcements_go_from_the_object_to_its_class(holder):
    """And what has happened the other way, as all events do."""
    told, shared = [], SharedHandlers()
    holder.share_handlers(shared)
    shared.add(Holder, "property-*", lambda *_, **__: told.append(0))
    holder.add_handler("property-*", lambda *_, **__: told.append(1))
    holder.size = 5
    assert told == [1, 0, 0, 1]
    told.clear()
    del holder.size
    assert told == [1, 0, 1, 0, 0, 1, 0, 1]


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
    with pytest.raises(QubesPropertyValueError, match="once and for all") as caught:
        holder.once = 2
    assert isinstance(caught.value, AttributeError)  # which is upstream's


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
    assert names == ["bare", "count", "double", "flag", "once", "size", "sum", "later"]


def test_default_is_the_old_value_of_what_was_never_set(holder):
    events = []
    holder.add_handler("property-*", lambda _, event, **kw: events.append((event, kw)))
    holder.bare = 1
    del holder.size
    assert events[0] == ("property-pre-set:bare", {"name": "bare", "newvalue": 1})
    assert events[2] == ("property-pre-reset:size", {"name": "size", "oldvalue": 10})


@pytest.mark.parametrize(
    "value", ["", "7.0", " 7", "+7", "1_000", 7.0, True, None, "\u0667"]
)
def test_what_is_no_whole_number(holder, value):
    with pytest.raises(QubesPropertyValueError, match="expected a whole number"):
        holder.count = value
    assert holder.count == 0


def test_whole_numbers_are_read_from_digits(holder):
    holder.count = "-12"
    assert holder.count == -12


def test_none_is_no_truth_value(holder):
    with pytest.raises(QubesPropertyValueError, match="truth value"):
        holder.flag = None


def test_setting_to_the_default_resets(holder):
    holder.size = 5
    holder.size = Property.DEFAULT
    assert holder.property_is_default("size")


def test_write_once_cannot_be_reset(holder):
    holder.once = 1
    with pytest.raises(QubesPropertyValueError, match="once and for all"):
        del holder.once


def test_stateless_property_is_read_and_nothing_else(holder):
    assert holder.sum == 30
    assert Holder.sum.__doc__ == "All together."
    with pytest.raises(QubesPropertyValueError, match=r"'sum' .* it cannot be set"):
        holder.sum = 5
    with pytest.raises(QubesPropertyValueError, match=r"'sum' .* it cannot be set"):
        del holder.sum
    with pytest.raises(Property.DontSave):
        Holder.sum.saved(holder)


def test_what_is_saved_sets_the_property_to_the_same(holder):
    for name, value in {"flag": True, "size": 12}.items():
        setattr(holder, name, value)
        text = holder.property_get_def(name).saved(holder)
        delattr(holder, name)
        setattr(holder, name, text)
        assert getattr(holder, name) == value
    with pytest.raises(Property.DontSave):
        Holder.count.saved(holder)


def test_order_of_first_values_and_of_cloning_is_that_of_the_definitions():
    """However they are given, those that others are checked against come first."""
    source = Holder(later=50, size=60)
    copy = Holder()
    copy.clone_properties(source)
    assert (copy.size, copy.later) == (60, 50)


def test_type_names():
    names = {prop.name: prop.type_name for prop in Holder.property_list()}
    assert (names["count"], names["sum"]) == ("int", "int")
    assert names["flag"] == "bool"
    assert names["bare"] == "str"


def test_property_that_a_subclass_replaces_by_an_attribute_is_none_of_its():
    class Fixed(Holder):
        size = 3

    assert "size" not in [prop.name for prop in Fixed.property_list()]


def test_requiring_a_property(holder, caplog):
    holder.property_require("size", hard=True)
    with pytest.raises(ValueError, match="holder needs its property 'bare' set"):
        holder.property_require("bare", allow_none=True, hard=True)
    holder.bare = None
    holder.property_require("bare", allow_none=True, hard=True)
    holder.property_require("bare")
    assert "holder needs its property 'bare' set" in caplog.text
