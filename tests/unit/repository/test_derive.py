"""How the wishes of several apps become one template."""

import pytest

from qubes_itests.host.kernel import Kernel
from qubes_itests.repository import SpecError, TemplateSpec, derive


def spec(app, name="deb", base="deb", **values):
    return TemplateSpec(
        app=app, source=f"{app}/setup.cfg", name=name, base=base, **values
    )


def test_apps_are_layered_in_their_order_over_all_packages():
    derived = derive(
        [
            spec("one", packages=("b", "a"), script="1", init="systemd"),
            spec("two", packages=("a", "c"), script="2", timeout=5),
            spec("three", packages=("d",)),
        ]
    )["deb"]
    assert derived.base == "deb"
    assert derived.packages == ("b", "a", "c", "d")
    steps = [(step.name, step.script, step.timeout) for step in derived.steps]
    assert steps == [("one", "1", 600), ("two", "2", 5)]
    assert derived.init == "systemd"


def test_a_template_may_lie_over_one_that_is_derived_too():
    wanted = derive(
        [
            spec("high", "top", "mid", script="3", packages=("z",)),
            spec("low", "mid", "deb", script="1", init="systemd", packages=("y",)),
            spec("same", "deb", "deb", script="0"),
        ]
    )
    top = wanted["top"]
    assert [step.script for step in top.steps] == ["0", "1", "3"]
    assert (top.base, top.packages, top.init) == ("deb", ("y", "z"), "systemd")
    assert [step.script for step in wanted["deb"].steps] == ["0"]


def test_the_generic_kernel_comes_with_its_modules_below_all_steps(tmp_path):
    derived = derive([spec("one", script="1"), spec("two", kernel="generic")])["deb"]
    assert (derived.kernel, derived.packages) == ("generic", ("kmod",))
    entry = tmp_path / "generic-kernel/linux-image-6.1_6.1.2-3"
    kernel = Kernel("6.1", entry / "boot/vmlinuz-6.1", entry / "lib/modules/6.1")
    steps = derived.layers(tmp_path / "root.img", None, kernel).steps
    (copy,) = steps[0].copies
    assert (copy.source, copy.target) == (kernel.modules, "/usr/lib/modules/6.1")
    assert copy.key == "generic-kernel/linux-image-6.1_6.1.2-3/lib/modules/6.1"
    assert [step.script for step in steps] == ["depmod 6.1", "1"]


def test_modules_come_with_what_loads_them(tmp_path):
    """Of a kernel outside of the cache they are read: its name says nothing of them."""
    kernel = Kernel("6.1", tmp_path / "boot/vmlinuz-6.1", tmp_path / "lib/modules/6.1")
    specs = [spec("one", script="1"), spec("two", packages=("kmod",))]
    for number, scripts in ((2, ["depmod 6.1", "1"]), (1, ["1"])):
        derived = derive(specs[:number])["deb"]
        steps = derived.layers(tmp_path / "root.img", None, kernel).steps
        assert [step.script for step in steps] == scripts
    assert derive(specs)["deb"].kernel is None
    (copy,) = derive(specs)["deb"].layers(tmp_path, None, kernel).steps[0].copies
    assert copy.key == ""


def test_a_template_over_one_with_the_generic_kernel_has_it_too():
    specs = [spec("a", "mid", "deb", kernel="generic"), spec("b", "top", "mid")]
    assert derive(specs)["top"].kernel == "generic"
    specs[1] = spec("b", "top", "mid", kernel="default")
    assert (derive(specs)["top"].kernel, derive(specs)["top"].packages) == (
        "default",
        (),
    )


def test_the_highest_wish_for_an_init_wins():
    specs = [
        spec("a", "mid", "deb", init="systemd"),
        spec("b", "top", "mid", init="agent"),
    ]
    assert derive(specs)["top"].init == "agent"


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        (
            [spec("a"), spec("b", base="other")],
            "b/setup.cfg: base is other, but deb in a/",
        ),
        (
            [spec("a", init="agent"), spec("b", init="systemd")],
            "b/setup.cfg: init is systemd, but agent in a/setup.cfg",
        ),
        (
            [spec("a"), spec("b", kernel="generic"), spec("c", kernel="default")],
            "c/setup.cfg: kernel is default, but generic in b/setup.cfg",
        ),
        (
            [spec("a", "x", "y"), spec("b", "y", "z"), spec("c", "z", "x")],
            "it is a base of itself: x -> y -> z -> x",
        ),
    ],
)
def test_wishes_that_contradict_each_other_are_a_problem(specs, said):
    problem = derive(specs)[specs[0].name]
    assert isinstance(problem, SpecError)
    assert said in str(problem)


def test_a_problem_of_one_template_leaves_the_others():
    wanted = derive([spec("a", "x", "x"), spec("b", "x", "y"), spec("c")])
    assert isinstance(wanted["x"], SpecError)
    assert wanted["deb"].name == "deb"
