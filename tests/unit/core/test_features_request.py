"""What becomes of the features that guests ask for."""

from __future__ import annotations

import asyncio

import pytest

MODES = {
    "boot-mode.kernelopts.quiet": "quiet loglevel=0",
    "boot-mode.name.quiet": "Without words",
    "boot-mode.kernelopts.loud": "debug",
    "boot-mode.default-user.loud": "tester",
}
USES = {"boot-mode.active": "quiet", "boot-mode.appvm-default": "loud"}


def ask(vm, **features):
    """Have a VM ask, and return what it has of the features then."""
    asked = {name.replace("__", "-"): value for name, value in features.items()}
    asking = vm.fire_event_async("features-request", untrusted_features=asked)
    asyncio.run(asking)
    return dict(vm.features)


def test_what_a_template_says_of_itself(template):
    said = {
        "os": "Linux",
        "os-distribution": "debian",
        "os-version": "13.1",
        "os-eol": "2030-06-30",
        "qubes-agent-version": "4.3",
        "anon-timezone": "1",
    }
    assert ask(template, **said, other="1") == said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("os", "a b"),
        ("os-distribution", ""),
        ("os-version", "v13"),
        ("os-version", ""),
        ("os-eol", "2030-13-01"),
        ("os-eol", "20300630"),
        ("qubes-agent-version", "4.3.1"),
        ("anon-timezone", "0"),
        ("vmexec", "yes"),
    ],
)
def test_what_has_another_form_is_passed_over(template, name, value):
    template.features[name] = "before"
    assert ask(template, **{name: value}) == {name: "before"}


def test_qrexec_is_taken_at_the_first_word_and_vmexec_at_the_last(template):
    told = []
    template.add_handler("template-postinstall", lambda *_, **__: told.append(1))
    first = ask(template, qrexec="1", gui="0", vmexec="1")
    assert (first, told) == ({"qrexec": "1", "gui": "", "vmexec": "1"}, [1])
    last = ask(template, qrexec="0", gui="1", vmexec="0")
    assert (last, told) == ({"qrexec": "1", "gui": "", "vmexec": ""}, [1])


@pytest.mark.parametrize("prefix", ["feature", "service", "rpc"])
def test_what_is_not_listed_any_more_it_cannot_do_any_more(template, prefix):
    one, two, three = (f"supported-{prefix}.{name}" for name in ("one", "two", "three"))
    assert ask(template, **{one: "1", two: "1", three: "0"}) == {one: "1", two: "1"}
    assert ask(template, qrexec="1").keys() == {one, two, "qrexec"}
    assert ask(template, **{two: "1"}).keys() == {two, "qrexec"}


def test_boot_modes_are_replaced_by_those_that_are_offered(template):
    assert ask(template, **MODES, **USES) == MODES | USES
    assert (template.bootmode, template.appvm_default_bootmode) == ("quiet", "loud")
    one = {"boot-mode.kernelopts.one": "a=b", "boot-mode.name.default": "As it was"}
    assert ask(template, **one) == one | USES
    assert template.bootmode == "default", "the mode that it used is gone"
    assert ask(template, **{"boot-mode.active": "none"}) == one | USES


@pytest.mark.parametrize(
    "modes",
    [
        {"boot-mode.name.none": "without options"},
        {"boot-mode.kernelopts.default": "x"},
        {"boot-mode.kernelopts.": "x"},
        {"boot-mode.kernelopts.a.b": "x"},
        {"boot-mode.default-user.default": "x"},
        {f"boot-mode.kernelopts.m{number}": "x" for number in range(65)},
        {
            **{f"boot-mode.kernelopts.{name}": "x" for name in "ab"},
            **{f"boot-mode.name.{name}": "the same" for name in "ab"},
        },
    ],
    ids=["no options", "default", "no name", "dots", "user", "too many", "same name"],
)
def test_what_is_no_boot_mode_changes_none(template, modes):
    before = ask(template, **MODES)
    assert ask(template, **modes) == before


def test_a_vm_that_starts_from_a_template_says_its_services_alone(app, template):
    work = app.add_new_vm("AppVM", name="work", label="red", template=template)
    asked = {"qrexec": "1", "supported-feature.x": "1", "supported-rpc.own.X": "1"}
    assert ask(work, **asked, **MODES) == {"supported-rpc.own.X": "1"}
    alone = app.add_new_vm("StandaloneVM", name="alone", label="red")
    assert ask(alone, **USES, **MODES).keys() == MODES.keys() | {"boot-mode.active"}
