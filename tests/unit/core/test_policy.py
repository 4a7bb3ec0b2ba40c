"""qrexec policy: the first rule that matches decides, and none denies."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.core.policy import Policy, PolicySyntaxError, Rule


@pytest.fixture
def vms(app, template):
    for name in ("work", "vault", "other"):
        app.add_new_vm("AppVM", name=name, label="red", template=template)
    app.domains["work"].tags.add("trusted")
    return app.domains


def decide(vms, lines, service="test.Echo", source="work", target="vault"):
    return Policy(lines).evaluate(vms._app, service, vms[source], target)


def test_no_rule_denies(vms):
    decision = decide(vms, [])
    assert not decision.allowed
    assert "no rule" in decision.reason


@pytest.mark.parametrize(
    "line",
    [
        "test.Echo * work vault allow",
        "* * work vault allow",
        "test.Echo + work vault allow",
        "test.Echo * @anyvm @anyvm allow",
        "test.Echo * @tag:trusted @type:AppVM allow",
    ],
)
def test_rules_that_match(vms, line):
    decision = decide(vms, [line])
    assert decision.allowed
    assert decision.target == "vault"


@pytest.mark.parametrize(
    "line",
    [
        "test.Other * work vault allow",
        "test.Echo +arg work vault allow",
        "test.Echo * vault work allow",
        "test.Echo * @tag:other @anyvm allow",
        "test.Echo * @adminvm @anyvm allow",
        "test.Echo * work @adminvm allow",
        "test.Echo * work vault deny",
        "test.Echo * work vault ask",
    ],
)
def test_rules_that_do_not_allow(vms, line):
    assert not decide(vms, [line]).allowed


def test_first_match_wins(vms):
    rules = ["test.Echo * work vault deny", "test.Echo * work @anyvm allow"]
    assert not decide(vms, rules).allowed
    assert decide(vms, rules, target="other").allowed


def test_argument(vms):
    rule = ["test.Echo +one work vault allow"]
    assert decide(vms, rule, service="test.Echo+one").allowed
    assert not decide(vms, rule, service="test.Echo+two").allowed
    assert not decide(vms, rule).allowed


def test_default_needs_a_target(vms):
    assert not decide(vms, ["* * work @anyvm allow"], target="@default").allowed
    decision = decide(
        vms, ["* * work @default allow target=other user=root"], target="@default"
    )
    assert (decision.allowed, decision.target, decision.user) == (True, "other", "root")


def test_unknown_vm_is_default(vms):
    decision = decide(vms, ["* * work @default allow target=vault"], target="no-such")
    assert decision.target == "vault"


def test_redirection_to_a_vm_that_is_not_there_is_refused(vms):
    decision = decide(vms, ["* * @anyvm @anyvm allow target=gone"])
    assert not decision.allowed
    assert "'gone'" in decision.reason


def test_anyvm_is_not_dom0(vms):
    assert not decide(vms, ["* * @anyvm @anyvm allow"], target="dom0").allowed
    assert decide(vms, ["* * @anyvm dom0 allow"], target="@adminvm").allowed


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("test.Echo * work vault", "it needs SERVICE ARGUMENT"),
        ("test.Echo arg work vault allow", "the argument is"),
        ("test.Echo * work vault permit", "the action is one of"),
        ("test.Echo * work vault allow colour=red", "takes no parameter"),
        ("test.Echo * work vault deny target=x", "takes no parameter"),
        ("test.Echo * work vault allow user=a user=b", "given twice"),
        ("test.Echo * @anything vault allow", "no keyword"),
    ],
)
def test_bad_lines(line, reason):
    with pytest.raises(PolicySyntaxError, match=reason):
        Rule.parse(line)


@given(st.text(alphabet=string.ascii_letters + string.digits + " @$*+=:.-_\n\0ä"))
def test_any_line_is_a_rule_or_a_syntax_error(line):
    """A rule that was parsed prints as a line that parses to the same rule."""
    try:
        rule = Rule.parse(line)
    except PolicySyntaxError as error:
        assert error.line == line  # noqa: PT017
    else:
        assert Rule.parse(str(rule)) == rule


def test_rules_are_added_first_and_removed_by_identity():
    policy = Policy(["* * @anyvm @anyvm deny"])
    rule = policy.add_rule("test.Echo * work vault allow")
    twin = policy.add_rule("test.Echo * work vault allow")
    policy.remove_rule(rule)
    assert policy.rules[0] is twin
    with pytest.raises(ValueError, match="has no rule"):
        policy.remove_rule(rule)
