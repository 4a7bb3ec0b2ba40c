"""Lines of a policy: what is a rule, and what is said of what is none."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.core.policy import Origin, PolicySyntaxError, Rule


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("test.Echo * work vault", "expected SERVICE ARGUMENT"),
        ("test.Echo arg work vault allow", "the argument is"),
        ("test.Echo +a/b work vault allow", "the argument is"),
        ("test+Echo * work vault allow", "'test\\+Echo' is no name of a service"),
        ("../Echo * work vault allow", "no name of a service"),
        ("* + work vault allow", "goes with argument \\* only"),
        ("test.Echo * work vault permit", "the action is one of allow, deny, ask"),
        ("test.Echo * work vault allow colour=red", "takes no parameter"),
        ("test.Echo * work vault allow target", "takes no parameter"),
        ("test.Echo * work vault allow default_target=x", "takes no parameter"),
        ("test.Echo * work vault deny target=x", "takes no parameter"),
        ("test.Echo * work vault deny autostart=no", "takes no parameter"),
        ("test.Echo * work vault allow user=a user=b", "given twice"),
        ("test.Echo * work vault allow user=", "no name of a user"),
        ("test.Echo * work vault allow user=a;b", "no name of a user"),
        ("test.Echo * work vault allow notify=1", "notify is yes or no, not '1'"),
        ("test.Echo * work vault allow autostart=", "autostart is yes or no"),
        ("test.Echo * @anything vault allow", "no keyword '@anything'"),
        ("test.Echo * @default vault allow", "'@default' cannot stand here"),
        ("test.Echo * @dispvm vault allow", "'@dispvm' cannot stand here"),
        ("test.Echo * $anyvm vault allow", "keywords begin with @"),
        ("test.Echo * work @tag: allow", "lacks a valid name"),
        ("test.Echo * work @dispvm:@type:x allow", "lacks a valid name"),
        ("test.Echo * work @dispvm: allow", "lacks a valid name"),
        ("test.Echo * work a/b allow", "'a/b' is no name of a VM"),
        ("test.Echo * work uuid:12 allow", "'uuid:12' is no name of a VM"),
        ("test.Echo * work @default allow", "allow for @default needs target="),
        ("test.Echo * work x allow target=@default", "cannot stand here"),
        ("test.Echo * work x allow target=@anyvm", "cannot stand here"),
        ("test.Echo * work x allow target=*", "cannot stand here"),
        ("test.Echo * work x ask default_target=@tag:a", "cannot stand here"),
        ("test.Echo * work x allow target=@dispvm:@tag:a", "cannot stand here"),
    ],
)
def test_bad_lines(line, reason):
    with pytest.raises(PolicySyntaxError, match=reason) as caught:
        Rule.parse(line, Origin("30-user.policy", 7))
    assert str(caught.value).startswith("30-user.policy:7: ")
    assert caught.value.line == line


def test_rule_prints_in_one_form():
    line = " test.Echo  +a dom0\tvault ask autostart=no user=u notify=no target=dom0"
    assert str(Rule.parse(line)) == (
        "test.Echo +a @adminvm vault ask target=@adminvm user=u notify=no autostart=no"
    )
    assert str(Rule.parse("a * b c allow autostart=yes")) == "a * b c allow"


WORDS = st.sampled_from(
    [
        *("*", "+", "+a", "@anyvm", "@adminvm", "@default", "@dispvm", "@dispvm:a"),
        *(
            "@dispvm:@tag:a",
            "@tag:a",
            "@type:A",
            "a",
            "dom0",
            "=",
            "@",
            "$a",
            "ä",
            "\0",
        ),
        *("uuid:00000000-0000-0000-0000-000000000001", "test.Echo", "allow", "deny"),
        *("ask", "target=a", "default_target=@dispvm", "user=a", "notify=yes"),
    ]
)


@given(
    st.one_of(
        st.text(),
        st.text(alphabet=string.ascii_letters + string.digits + " @$*+=:.-_\n\0ä"),
        st.lists(WORDS, min_size=4, max_size=8).map(" ".join),
    )
)
def test_any_line_is_a_rule_or_a_syntax_error(line):
    """A rule that was parsed prints as a line that parses to the same rule."""
    try:
        rule = Rule.parse(line)
    except PolicySyntaxError as error:
        assert error.line == line  # noqa: PT017
    else:
        assert Rule.parse(str(rule)) == rule


NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,30}", fullmatch=True)
VALUES = NAMES.filter(lambda name: name != "dom0")
SOURCES = st.one_of(
    st.sampled_from(["*", "@anyvm", "@adminvm"]),
    VALUES,
    st.uuids(version=4).map("uuid:{}".format),
    NAMES.map("@tag:{}".format),
    NAMES.map("@type:{}".format),
    VALUES.map("@dispvm:{}".format),
    NAMES.map("@dispvm:@tag:{}".format),
)
REDIRECTS = st.one_of(
    st.sampled_from(["@adminvm", "@dispvm"]), VALUES, VALUES.map("@dispvm:{}".format)
)
YES_NO = st.sampled_from(["yes", "no"])
PARAMETERS = {
    "target": REDIRECTS,
    "default_target": REDIRECTS,
    "user": NAMES,
    "notify": YES_NO,
    "autostart": st.just("no"),
}
TAKES = {
    "allow": ["target", "user", "notify", "autostart"],
    "deny": ["notify"],
    "ask": list(PARAMETERS),
}


@st.composite
def rules(draw):
    service = draw(st.from_regex(r"\*|[A-Za-z0-9_.-]{1,20}", fullmatch=True))
    argument = "*"
    if service != "*":
        argument = draw(st.from_regex(r"\*|\+[A-Za-z0-9_.+-]{0,20}", fullmatch=True))
    action = draw(st.sampled_from(list(TAKES)))
    target = draw(st.one_of(SOURCES, st.sampled_from(["@dispvm", "@default"])))
    if target == "@default" and action == "allow":
        target = "@anyvm"
    parameters = [
        f"{name}={draw(PARAMETERS[name])}"
        for name in PARAMETERS
        if name in TAKES[action] and draw(st.booleans())
    ]
    return " ".join([service, argument, draw(SOURCES), target, action, *parameters])


@given(rules())
def test_every_rule_of_the_language_prints_as_it_was_written(line):
    assert str(Rule.parse(line)) == line
