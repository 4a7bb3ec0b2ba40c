"""The policy against a naive one: both answer every generated question alike.

The naive one keeps no tokens and no classes: it writes down all the words by which a
rule may speak of a caller or of a request, and looks whether the rule's is among them.
"""

import types
import uuid

from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_itests.core.policy import Policy

NAMES = ("work", "vault", "dvm", "dvm2")
UUIDS = {
    name: f"{n}2345678-9abc-4def-8123-456789abcdef" for n, name in enumerate(NAMES)
}
VM_WORDS = [*NAMES, "gone", f"uuid:{UUIDS['vault']}", f"uuid:{UUIDS['dvm']}"]
DISPVM_WORDS = [f"@dispvm:{word}" for word in VM_WORDS]
GROUPS = ["*", "@anyvm", "@adminvm", "dom0", "@tag:a", "@tag:b", "@type:AppVM"]
GROUPS += ["@type:AdminVM", "@dispvm:@tag:a", "@dispvm:@tag:b", *DISPVM_WORDS]
REQUESTS = [*VM_WORDS, *DISPVM_WORDS, "dom0", "@adminvm", "@default", "@dispvm", ""]
REDIRECTS = [*VM_WORDS, *DISPVM_WORDS, "dom0", "@adminvm", "@dispvm"]


class Apps(dict):
    """The VMs of a pretended app, found by name or UUID as in `VMCollection`."""

    def get(self, key, default=None):
        found = [vm for vm in self.values() if key in (vm.name, vm.uuid)]
        return found[0] if found else default

    def __iter__(self):
        return iter(self.values())


@st.composite
def apps(draw):
    domains = Apps()
    for name in NAMES:
        domains[name] = types.SimpleNamespace(
            name=name,
            uuid=uuid.UUID(UUIDS[name]),
            klass=draw(st.sampled_from(["AppVM", "TemplateVM"])),
            tags=draw(st.sets(st.sampled_from(["a", "b"]))),
            makes_disposables=name.startswith("dvm") and draw(st.booleans()),
            state=draw(st.sampled_from(["Running", "Halted"])),
        )
        vm = domains[name]
        vm.get_power_state = lambda vm=vm: vm.state
    for vm in domains.values():
        vm.default_dispvm_or_none = domains.get(
            draw(st.sampled_from(["dvm", "dvm2", None]))
        )
    domains["dom0"] = types.SimpleNamespace(
        name="dom0",
        uuid=uuid.UUID(int=0),
        klass="AdminVM",
        tags={"a"},
        makes_disposables=False,
        default_dispvm_or_none=None,
    )
    return types.SimpleNamespace(domains=domains)


@st.composite
def lines(draw):
    service = draw(st.sampled_from(["*", "s", "t"]))
    argument = "*" if service == "*" else draw(st.sampled_from(["*", "+", "+a"]))
    action = draw(st.sampled_from(["allow", "allow", "deny", "ask"]))
    source = draw(st.sampled_from([*VM_WORDS, *GROUPS]))
    target = draw(st.sampled_from([*VM_WORDS, *GROUPS, "@default", "@dispvm"]))
    words = [service, argument, source, target, action]
    redirect = draw(st.sampled_from([None, *REDIRECTS]))
    if action == "allow" and target == "@default":
        redirect = redirect or "vault"
    if action != "deny" and redirect:
        words.append(f"target={redirect}")
    if action != "deny" and draw(st.booleans()):
        words.append("autostart=no")
    return " ".join(words)


def find(app, word):
    """Return the VM of a name or ``uuid:…``, None for none, dom0 left out."""
    for vm in app.domains.values():
        if word in (vm.name, f"uuid:{vm.uuid}") and vm.name != "dom0":
            return vm
    return None


def naive_target(app, source, word):
    """Return (what answers, the words that speak of it); None when it cannot be."""
    if word in ("dom0", "@adminvm"):
        return "@adminvm", {"*", "dom0", "@adminvm"}
    if word.startswith("@dispvm"):
        plain = word == "@dispvm"
        base = (
            source.default_dispvm_or_none
            if plain
            else find(app, word[len("@dispvm:") :])
        )
        spoken_of = {"*", "@anyvm"} | ({"@dispvm"} if plain else set())
        if base is None and plain:
            return "", spoken_of
        if base is None or (not plain and not base.makes_disposables):
            return None
        spoken_of |= {f"@dispvm:{base.name}", f"@dispvm:uuid:{base.uuid}"}
        if base.makes_disposables:
            spoken_of |= {f"@dispvm:@tag:{tag}" for tag in base.tags}
        return f"@dispvm:{base.name}", spoken_of
    vm = find(app, word)
    if vm is None:
        return "", {"*", "@anyvm", "@default"}
    return vm.name, {"*", "@anyvm", f"@type:{vm.klass}", vm.name} | {
        f"uuid:{vm.uuid}",
        *(f"@tag:{tag}" for tag in vm.tags),
    }


def naive_source(source):
    words = {"*", "@anyvm", source.name, f"uuid:{source.uuid}", f"@type:{source.klass}"}
    return words | {f"@tag:{tag}" for tag in source.tags}


def naive(app, rules, service, source, target):
    """Return the number of the rule that speaks, and who answers; "" if denied."""
    asked = naive_target(app, source, target)
    if asked is None:
        return None, ""
    name, _, argument = service.partition("+")
    for number, rule in enumerate(rules):
        words = rule.split()
        if words[0] not in ("*", name) or words[1] not in ("*", f"+{argument}"):
            continue
        if words[2] not in naive_source(source) or words[3] not in asked[1]:
            continue
        options = dict(word.split("=") for word in words[5:])
        if words[4] != "allow":
            return number, ""
        answers = asked[0]
        if "target" in options:
            redirected = naive_target(app, source, options["target"])
            answers = redirected[0] if redirected else ""
        if answers == source.name:
            return number, ""
        if options.get("autostart") == "no" and answers not in ("", "@adminvm"):
            vm = find(app, answers)
            answers = answers if vm is not None and vm.state == "Running" else ""
        return number, answers
    return None, ""


@settings(max_examples=200)
@given(
    apps(),
    st.lists(lines(), max_size=12),
    st.sampled_from(["s", "s+", "s+a", "t+a", "u"]),
    st.sampled_from(NAMES),
    st.sampled_from(REQUESTS),
)
def test_same_answer_as_the_naive_policy(app, rules, service, name, target):
    policy = Policy(rules)
    source = app.domains[name]
    decision = policy.evaluate(app, service, source, target)
    number, answers = naive(app, rules, service, source, target)
    assert (decision.allowed, decision.target) == (bool(answers), answers), decision
    expected = None if number is None else policy.rules[number]
    assert decision.rule is expected, decision


@given(st.text(), st.text())
def test_whatever_a_guest_says_is_answered(service, target):
    """No name makes `evaluate` fail, and none that is not valid is allowed."""
    source = types.SimpleNamespace(
        name="work",
        klass="AppVM",
        tags=(),
        uuid="0",
        makes_disposables=False,
        default_dispvm_or_none=None,
    )
    app = types.SimpleNamespace(domains=Apps(work=source))
    decision = Policy(["* * * * allow target=dom0"]).evaluate(
        app, service, source, target
    )
    if decision.allowed:
        assert decision.target == "@adminvm"
        assert (service + target).isascii()
        assert len(service) <= 255
    else:
        assert decision.reason.isprintable()
        assert len(decision.reason) < 1000


def test_naive_policy_can_tell():
    """The oracle itself: it denies, allows and redirects where that is plain."""
    pretended = types.SimpleNamespace(domains=Apps())
    for name in NAMES:
        pretended.domains[name] = types.SimpleNamespace(
            name=name, uuid=UUIDS[name], klass="AppVM", tags=(), state="Halted"
        )
    work = pretended.domains["work"]
    assert naive(pretended, [], "s", work, "vault") == (None, "")
    rules = ["s + vault vault allow", "s + work @anyvm allow"]
    assert naive(pretended, rules, "s", work, "vault") == (1, "vault")
    assert naive(pretended, rules, "s+a", work, "vault") == (None, "")
    assert naive(pretended, ["s * * * allow target=dom0"], "s", work, "dvm") == (
        0,
        "@adminvm",
    )
