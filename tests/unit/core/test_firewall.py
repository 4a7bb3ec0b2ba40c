"""Firewall rules are read strictly, and written in one form."""

import time

import pytest

from qubes_itests.core.network.firewall import FirewallRuleError, Rule, parse_rule


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("action=accept", "action=accept"),
        (
            "proto=tcp action=drop dstports=443",
            "action=drop proto=tcp dstports=443-443",
        ),
        ("action=accept dst4=10.0.0.1", "action=accept dst4=10.0.0.1/32"),
        ("action=accept dsthost=10.0.0.0/8", "action=accept dst4=10.0.0.0/8"),
        ("action=accept dsthost=fd00::1", "action=accept dst6=fd00::1/128"),
        ("action=accept dsthost=example.com", "action=accept dsthost=example.com"),
        (
            "action=accept proto=icmp icmptype=8",
            "action=accept proto=icmp icmptype=8",
        ),
        ("action=accept specialtarget=dns", "action=accept specialtarget=dns"),
        (
            "action=accept expire=1900000000 comment=for a while",
            "action=accept expire=1900000000 comment=for a while",
        ),
    ],
)
def test_a_rule_is_written_in_one_form(text, canonical):
    assert parse_rule(text) == canonical
    assert parse_rule(canonical) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "",
        "proto=tcp",
        "action=reject",
        "action=accept action=drop",
        "action=accept nonsense",
        "action=accept colour=red",
        "action=accept dstports=80",
        "action=accept proto=icmp dstports=80",
        "action=accept proto=tcp dstports=90-80",
        "action=accept proto=tcp dstports=65536",
        "action=accept proto=tcp dstports=-1",
        "action=accept proto=tcp dstports=1-2-3",
        "action=accept icmptype=8",
        "action=accept proto=icmp icmptype=256",
        "action=accept dst4=10.0.0.0/33",
        "action=accept dst4=fd00::1",
        "action=accept dst6=10.0.0.1",
        "action=accept dst4=10.0.0.1 dsthost=example.com",
        "action=accept dsthost=EXAMPLE",
        "action=accept dsthost=$(reboot)",
        "action=accept specialtarget=all",
        "action=accept expire=tomorrow",
        "action=accept comment=a\nb",
        "action=accept comment=`x`",
    ],
)
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(FirewallRuleError):
        parse_rule(text)


@pytest.fixture
def vm(app):
    return app.add_new_vm("StandaloneVM", name="work", label="red")


@pytest.fixture
def firewall(vm):
    return vm.firewall


def test_a_rule_is_put_together_from_its_parts():
    rule = Rule(None, action="accept", dsthost="10.0.0.1", proto="tcp", dstports=443)
    assert rule == "action=accept proto=tcp dst4=10.0.0.1/32 dstports=443-443"
    assert (rule.action, rule.proto, rule.dsthost) == ("accept", "tcp", "10.0.0.1/32")
    assert (rule.dstports, rule.icmptype, rule.comment) == ("443-443", None, None)
    assert rule.rule == rule.api_rule == rule
    end = int(time.time()) + 1000
    rule = Rule(comment="for a while", action="drop", expire=end)
    assert rule.api_rule == f"action=drop expire={end} comment=for a while"
    assert (rule.rule, rule.comment, rule.expire) == (
        "action=drop",
        "for a while",
        str(end),
    )
    rule = Rule.from_api_string("action=drop expire=1")
    assert (rule.rule, rule.api_rule) == (None, None)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"proto": "tcp"},
        {"action": "accept", "proto": "tcp dstports=1"},
        {"action": "accept", "colour": "red"},
        {"action": "accept", "dstports": 80},
        {"action": "accept", "comment": "a\nb"},
    ],
)
def test_parts_of_no_rule_are_refused(parts):
    with pytest.raises(ValueError, match="firewall rule"):
        Rule(**parts)


def test_rules_are_a_list_that_is_saved(vm, firewall):
    seen = []
    vm.add_handler("firewall-changed", lambda *_args: seen.append(list(firewall.rules)))
    firewall.rules.insert(0, Rule(action="drop", proto="icmp"))
    firewall.save()
    assert seen == [["action=drop proto=icmp", "action=accept"]]
    firewall.load_defaults()
    assert (firewall.rules, firewall.policy) == (["action=accept"], "drop")
    firewall.rules.append("action=nonsense")
    with pytest.raises(FirewallRuleError):
        _ = firewall.rules


def test_one_bad_rule_leaves_all_as_they_were(firewall):
    firewall.rules = ["action=drop"]
    with pytest.raises(FirewallRuleError):
        firewall.rules = ["action=accept", "action=nonsense"]
    assert firewall.rules == ["action=drop"]


def test_a_rule_that_has_expired_is_gone(firewall):
    """When it is set, and later."""
    now = int(time.time())
    kept = f"action=accept expire={now + 1000} comment=expire 5"
    firewall.rules = ["action=drop expire=1", kept]
    assert firewall.rules == [kept]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "time", lambda: float(now + 1000))
        assert firewall.rules == []
    assert firewall.rules == []
