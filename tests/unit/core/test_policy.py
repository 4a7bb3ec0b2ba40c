"""qrexec policy: the first rule that matches a call decides, and none denies."""

import logging
import re

import pytest

from qubes_itests import limited_log
from qubes_itests.core.policy import Policy, evaluate

UUID = "12345678-9abc-4def-8123-456789abcdef"


@pytest.fixture
def vms(app, template):
    """VMs to call: `work` is tagged, and has `dvm` as its default_dispvm."""
    for name in ("work", "vault", "other", "dvm", "dvm2"):
        app.add_new_vm(
            "AppVM",
            name=name,
            label="red",
            template=template,
            template_for_dispvms=name.startswith("dvm"),
            **({"uuid": UUID} if name == "vault" else {}),
        )
    app.domains["work"].tags.add("trusted")
    app.domains["vault"].tags.add("safe")
    app.domains["dvm"].tags.add("disposable")
    app.domains["work"].default_dispvm = app.domains["dvm"]
    return app.domains


def decide(vms, lines, service="test.Echo", source="work", target="vault"):
    return Policy(lines).evaluate(vms._app, service, vms[source], target)


def test_no_rule_denies(vms):
    decision = decide(vms, [])
    assert not decision.allowed
    assert "no rule" in decision.reason
    assert decision.notify


@pytest.mark.parametrize(
    ("head", "services"),
    [
        ("* *", {"test.Echo", "test.Echo+", "test.Echo+arg", "test.Other"}),
        ("test.Echo *", {"test.Echo", "test.Echo+", "test.Echo+arg"}),
        ("test.Echo +", {"test.Echo", "test.Echo+"}),
        ("test.Echo +arg", {"test.Echo+arg"}),
        ("test.Other *", {"test.Other"}),
        ("test.Echo +arg+more", set()),
        ("test *", set()),
    ],
)
def test_service_and_argument(vms, head, services):
    asked = ("test.Echo", "test.Echo+", "test.Echo+arg", "test.Other")
    lines = [f"{head} work vault allow"]
    assert {s for s in asked if decide(vms, lines, s).allowed} == services


@pytest.mark.parametrize(
    ("word", "callers"),
    [
        ("*", {"work", "tiny", "dom0"}),
        ("@anyvm", {"work", "tiny"}),
        ("@adminvm", {"dom0"}),
        ("dom0", {"dom0"}),
        ("work", {"work"}),
        ("vault", set()),
        ("@tag:trusted", {"work"}),
        ("@tag:safe", set()),
        ("@type:AppVM", {"work"}),
        ("@type:TemplateVM", {"tiny"}),
        ("@type:AdminVM", {"dom0"}),
        ("@dispvm:dvm", set()),
        ("@dispvm:@tag:disposable", set()),
        (f"uuid:{UUID}", set()),
    ],
)
def test_sources(vms, word, callers):
    """A rule matches these callers, and of no others."""
    lines = [f"* * {word} vault allow"]
    asked = ("work", "tiny", "dom0")
    assert {s for s in asked if decide(vms, lines, source=s).allowed} == callers


REQUESTED = (
    "vault",
    f"uuid:{UUID}",
    "gone",
    "dom0",
    "@adminvm",
    "@default",
    "",
    "@dispvm",
    "$dispvm",
    "@dispvm:dvm",
    "@dispvm:dvm2",
)
VAULT = {"vault", f"uuid:{UUID}"}
DOM0 = {"dom0", "@adminvm"}
DEFAULT = {"@default", "", "gone"}
DISPVM = {"@dispvm", "$dispvm"}
DVM = DISPVM | {"@dispvm:dvm"}


@pytest.mark.parametrize(
    ("word", "requests"),
    [
        ("*", set(REQUESTED)),
        ("@anyvm", set(REQUESTED) - DOM0),
        ("@adminvm", DOM0),
        ("dom0", DOM0),
        ("uuid:" + "-".join("0" * n for n in (8, 4, 4, 4, 12)), DOM0),
        ("@default", DEFAULT),
        ("vault", VAULT),
        (f"uuid:{UUID}", VAULT),
        (f"uuid:{UUID.upper()}", VAULT),
        ("work", set()),
        ("gone", set()),
        ("@tag:safe", VAULT),
        ("@tag:disposable", set()),
        ("@type:AppVM", VAULT),
        ("@type:AdminVM", set()),
        ("@dispvm", DISPVM),
        ("@dispvm:dvm", DVM),
        ("@dispvm:dvm2", {"@dispvm:dvm2"}),
        ("@dispvm:@tag:disposable", DVM),
        ("@dispvm:@tag:safe", set()),
    ],
)
def test_targets(vms, word, requests):
    """A rule matches these requests, and of no others."""
    lines = [f"* * work {word} deny"]
    assert {t for t in REQUESTED if decide(vms, lines, target=t).rule} == requests


@pytest.mark.parametrize(
    ("line", "target", "answers"),
    [
        ("* * * vault allow", f"uuid:{UUID}", "vault"),
        ("* * * * allow", "dom0", "@adminvm"),
        ("* * * * allow", "@dispvm", "@dispvm:dvm"),
        ("* * * * allow", "@dispvm:dvm2", "@dispvm:dvm2"),
        ("* * * @default allow target=other", "@default", "other"),
        ("* * * @default allow target=other", "no-such", "other"),
        (f"* * * @anyvm allow target=uuid:{UUID}", "other", "vault"),
        ("* * * @anyvm allow target=dom0", "vault", "@adminvm"),
        ("* * * @anyvm allow target=@adminvm", "vault", "@adminvm"),
        ("* * * @anyvm allow target=@dispvm", "vault", "@dispvm:dvm"),
        ("* * * @anyvm allow target=@dispvm:dvm2", "vault", "@dispvm:dvm2"),
        ("* * * dom0 allow target=vault", "dom0", "vault"),
    ],
)
def test_who_answers(vms, line, target, answers):
    decision = decide(vms, [line], target=target)
    assert (decision.allowed, decision.target) == (True, answers)


@pytest.mark.parametrize(
    ("line", "target", "reason"),
    [
        ("* * * @anyvm allow", "@default", "neither the caller nor the rule names"),
        ("* * * @anyvm allow", "gone", "neither the caller nor the rule names"),
        ("* * * @anyvm allow target=gone", "vault", "there is no VM 'gone'"),
        ("* * * @anyvm allow target=@dispvm:work", "vault", "work is no template for"),
        ("* * * @anyvm allow", "@dispvm:gone", "gone is no template for disposable"),
        ("* * * @anyvm allow", "work", "a VM cannot call itself"),
        ("* * * @anyvm allow target=work", "vault", "a VM cannot call itself"),
        ("* * * * ask", "vault", "there is no handler that could ask a user"),
        ("* * * * ask target=gone", "vault", "no target to choose from"),
        ("* * * * deny", "vault", r"added: \* \* \* \* deny"),
        ("* * * * allow", "@anyvm", "@anyvm is no target of a call"),
        ("* * * * allow", "*", r"'\*' is no target of a call"),
        ("* * * * allow", "@tag:safe", "@tag:safe is no target of a call"),
        ("* * * * allow", "@dispvm:@tag:x", "is no target of a call"),
        ("* * * * allow", "../../etc", "'../../etc' is no target"),
        ("* * * * allow", "a\nb", r"'a\\nb' is no target"),
        ("* * * * allow", "a" * 64, "is too long"),
    ],
)
def test_why_a_call_is_denied(vms, line, target, reason):
    decision = decide(vms, [line], target=target)
    assert (decision.allowed, decision.target) == (False, "")
    assert re.search(reason, decision.reason), decision.reason


@pytest.mark.parametrize(
    ("target", "requested"),
    [
        ("vault", "vault"),
        (f"uuid:{UUID}", "vault"),
        ("gone", "@default"),
        ("", "@default"),
        ("dom0", "@adminvm"),
        ("$dispvm", "@dispvm"),
        ("@dispvm:dvm2", "@dispvm:dvm2"),
        ("no/name", ""),
    ],
)
def test_whom_the_caller_asked_for(vms, target, requested):
    """A decision says it whether it allows, denies or redirects to dom0."""
    for lines in (["* * * * allow target=dom0"], ["* * * * deny"], []):
        assert decide(vms, lines, target=target).requested == requested


def test_no_default_dispvm(vms):
    vms["work"].default_dispvm = None
    decision = decide(vms, ["* * * @dispvm allow"], target="@dispvm")
    assert not decision.allowed
    assert "default_dispvm" in decision.reason
    assert not decide(vms, ["* * * @dispvm:dvm allow"], target="@dispvm").rule


@pytest.mark.parametrize(
    "service",
    ["", "+arg", "../x", "a/b", "a b", "a\0", "ä", "test.Echo+a/b", "a" * 256, "x+\n"],
)
def test_services_that_cannot_be(vms, service):
    decision = decide(vms, ["* * * * allow"], service)
    assert not decision.allowed
    assert "is no name of a service" in decision.reason


def test_first_match_wins(vms):
    rules = ["test.Echo * work vault deny", "test.Echo * work @anyvm allow"]
    assert not decide(vms, rules).allowed
    assert decide(vms, rules, target="other").allowed
    assert decide(vms, list(reversed(rules))).allowed


def test_user_and_notify(vms):
    decision = decide(vms, ["* * work vault allow user=root"])
    assert (decision.user, decision.notify) == ("root", False)
    assert decide(vms, ["* * work vault allow notify=yes"]).notify
    assert decide(vms, ["* * work vault deny"]).notify
    assert not decide(vms, ["* * work vault deny notify=no"]).notify


@pytest.mark.parametrize(
    ("state", "target", "allowed"),
    [
        ("Running", "vault", True),
        ("Halted", "vault", False),
        ("Paused", "vault", False),
        ("Halted", "dom0", True),
        ("Running", "@dispvm", False),
    ],
)
def test_autostart(vms, monkeypatch, state, target, allowed):
    """With autostart=no, a call is allowed to what runs already, and no other."""
    monkeypatch.setattr(type(vms["vault"]), "get_power_state", lambda _self: state)
    decision = decide(vms, ["* * * * allow autostart=no"], target=target)
    assert decision.allowed == allowed
    assert not (decision.allowed and decision.autostart)
    assert decide(vms, ["* * * * allow autostart=yes"], target=target).autostart


def ask(vms, lines, answer, target="vault"):
    questions = []

    def handler(question):
        questions.append(question)
        return answer

    policy = Policy(lines)
    policy.ask_handler = handler
    decision = policy.evaluate(vms._app, "test.Echo", vms["work"], target)
    return decision, questions


def test_answer_to_a_question(vms):
    lines = [
        "* * work other deny",
        "test.Echo * work @default ask default_target=vault user=root notify=yes",
        "test.Echo * @anyvm vault ask",
        "test.Echo * @anyvm other allow",
        "test.Echo * @anyvm @dispvm allow",
        "test.Echo * @anyvm work allow",
        "test.Echo * @anyvm dom0 ask",
    ]
    decision, (question,) = ask(vms, lines, "vault", "@default")
    assert question.targets == ("@adminvm", "@dispvm:dvm", "vault")
    assert question.default == "vault"
    assert (question.service, question.source) == ("test.Echo+", "work")
    assert question.requested == "@default"
    assert (decision.allowed, decision.target) == (True, "vault")
    assert (decision.user, decision.notify) == ("root", True)
    assert ask(vms, lines, "@dispvm:dvm", "@default")[0].target == "@dispvm:dvm"
    assert ask(vms, lines, "@adminvm", "@default")[0].target == "@adminvm"


@pytest.mark.parametrize("answer", [None, "other", "gone", "@default", ""])
def test_answers_that_deny(vms, answer):
    line = "* * work @default ask target=vault default_target=other"
    decision, (question,) = ask(vms, [line], answer, "")
    assert question.targets == ("vault",)
    assert question.default is None  # it is none of the targets
    assert not decision.allowed
    assert "asked" in decision.reason


def test_handler_that_fails_denies(vms):
    def handler(_question):
        raise RuntimeError("the screen is dark")

    policy = Policy(["* * * vault ask"])
    policy.ask_handler = handler
    decision = policy.evaluate(vms._app, "test.Echo", vms["work"], "vault")
    assert not decision.allowed
    assert "the screen is dark" in decision.reason


def test_choices_are_what_the_rules_reach(vms, monkeypatch):
    """A keyword stands for all VMs that it matches, the caller not among them."""
    expected = {
        "*": {"tiny", "vault", "other", "dvm", "dvm2", "@adminvm"}
        | {"@dispvm:dvm", "@dispvm:dvm2"},
        "@anyvm": {"tiny", "vault", "other", "dvm", "dvm2"}
        | {"@dispvm:dvm", "@dispvm:dvm2"},
        "@tag:safe": {"vault"},
        "@type:TemplateVM": {"tiny"},
        "@dispvm": {"@dispvm:dvm"},
        "@dispvm:dvm2": {"@dispvm:dvm2"},
        "@dispvm:@tag:disposable": {"@dispvm:dvm"},
    }
    for word, targets in expected.items():
        lines = ["* * work @default ask", f"* * work {word} ask"]
        _, (question,) = ask(vms, lines, None, "@default")
        assert set(question.targets) == targets, word
    monkeypatch.setattr(type(vms["vault"]), "get_power_state", lambda _self: "Halted")
    lines = ["* * work @default ask autostart=no", "* * work * ask"]
    _, (question,) = ask(vms, lines, None, "@default")
    assert question.targets == ("@adminvm",)


def test_admin_services_are_denied_by_default(vms):
    for lines in ([], ["test.Echo * @anyvm * allow"], ["* * @anyvm @anyvm allow"]):
        for target in ("dom0", "@default", "@adminvm"):
            assert not decide(vms, lines, "admin.vm.List", target=target).allowed


def test_every_decision_is_logged_with_its_rule(vms, caplog):
    caplog.set_level(logging.INFO, "qubes.policy")
    decide(vms, ["test.Echo * work @default allow target=vault"], target="")
    decide(vms, [], "bad\nname", target="\x1b[2J" + "x" * 500)
    first, second = (r.getMessage() for r in caplog.records)
    assert first == (
        "test.Echo: work -> @default: allowed to vault"
        " (added: test.Echo * work @default allow target=vault)"
    )
    assert second.startswith("'bad\\nname': work -> '\\x1b[2Jxxx")
    assert second.isascii()
    assert second.isprintable()
    assert len(second) < 500
    assert all(isinstance(a, str) for r in caplog.records for a in r.args)


def test_rules_are_added_first_and_removed_by_identity():
    policy = Policy(["* * @anyvm @anyvm deny"])
    rule = policy.add_rule("test.Echo * work vault allow")
    twin = policy.add_rule("test.Echo * work vault allow")
    last = policy.add_rule("test.Echo * vault work allow", first=False)
    assert policy.rules[-1] is last
    policy.remove_rule(rule)
    assert policy.rules[0] is twin
    with pytest.raises(ValueError, match="has no rule"):
        policy.remove_rule(rule)


@pytest.mark.asyncio
async def test_evaluate_reads_files_that_changed(app, vms, tmp_path):
    assert not (await evaluate(app, "test.Echo", vms["work"], "vault")).allowed
    directory = tmp_path / "policy.d"
    directory.mkdir()
    (directory / "30-user.policy").write_text("test.Echo * work vault allow\n")
    decision = await evaluate(app, "test.Echo", vms["work"], "vault")
    assert decision.allowed
    assert decision.reason == (
        f"{directory}/30-user.policy:1: test.Echo * work vault allow"
    )


def test_decisions_for_a_vm_that_calls_and_calls_fill_no_log(vms, caplog, monkeypatch):
    """Those for others are logged still."""
    # a slow machine has time for more than one of it
    monkeypatch.setattr(limited_log, "_INTERVAL", 1000)
    caplog.set_level(logging.INFO, "qubes.policy")
    policy = Policy()
    for _ in range(1000):
        policy.evaluate(vms._app, "test.Echo", vms["work"], "vault")
    policy.evaluate(vms._app, "test.Echo", vms["other"], "vault")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 32
    assert "others are left out" in messages[30]
    assert messages[31].startswith("test.Echo: other -> vault: denied")
