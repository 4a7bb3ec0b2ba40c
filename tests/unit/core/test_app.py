"""The app and its VMs, without guests."""

import pytest

from qubes_itests.core import exc
from qubes_itests.core.properties import Property
from qubes_itests.core.vm.appvm import AppVM
from qubes_itests.core.vm.boot_data import boot_files


@pytest.fixture
def work(app, template):
    return app.add_new_vm("AppVM", name="work", label="red", template=template)


def test_lookup_by_name_number_uuid_and_itself(app, work):
    for key in ("work", work.qid, work.uuid, work):
        assert app.domains[key] is work
        assert key in app.domains
    assert app.domains.keys() == ["dom0", "tiny", "work"]


def test_unknown_vm_names_itself(app):
    with pytest.raises(exc.QubesVMNotFoundError, match="no such VM: 'nobody'"):
        app.domains["nobody"]
    assert "nobody" not in app.domains
    assert app.domains.get("nobody") is None


@pytest.mark.parametrize(
    "name",
    [
        "with/slash",
        "..",
        "two\nlines",
        "line\n",
        "x" * 32,
        "",
        "1st",
        "none",
        "some-dm",
        "ümlaut",
        "nul\0",
        7,
    ],
)
def test_names_that_cannot_be(app, template, name):
    with pytest.raises(exc.QubesValueError, match="VM name"):
        app.add_new_vm("AppVM", name=name, label="red", template=template)
    assert app.domains.keys() == ["dom0", "tiny"]


def test_longest_name(app, template):
    vm = app.add_new_vm("AppVM", name="x" * 31, label="red", template=template)
    assert len(vm.name) == 31


def test_taken_name(app, work):
    with pytest.raises(exc.QubesValueError, match="there is a VM 'work' already"):
        app.add_new_vm(AppVM, name=work.name, label="red", template=work.template)


def test_appvm_needs_a_template(app):
    with pytest.raises(exc.QubesNoTemplateError, match="needs a template"):
        app.add_new_vm("AppVM", name="work", label="red")


def test_default_template_is_used(app, template):
    app.default_template = template
    assert app.add_new_vm("AppVM", name="work", label="red").template is template


def test_template_must_be_one(app, work):
    with pytest.raises(exc.QubesPropertyValueError, match="is no TemplateVM"):
        app.add_new_vm("AppVM", name="two", label="red", template=work)


def test_unknown_class_and_label(app, template):
    with pytest.raises(exc.QubesValueError, match="no VM class 'Nope'"):
        app.add_new_vm("Nope", name="work", label="red")
    with pytest.raises(exc.QubesLabelNotFoundError, match="no such label: 'pink'"):
        app.add_new_vm("AppVM", name="work", label="pink", template=template)


@pytest.mark.parametrize("name", ["template", "label"])
def test_what_a_vm_needs_is_not_reset(app, work, name):
    """It would have none, and its app could be saved, but not loaded."""
    before = getattr(work, name)
    with pytest.raises(exc.QubesValueError, match=f"'{name}' of work has no default"):
        delattr(work, name)
    with pytest.raises(exc.QubesValueError, match="set it to another value"):
        setattr(work, name, Property.DEFAULT)
    assert getattr(work, name) is before
    dom0 = app.domains["dom0"]
    dom0.label = "red"
    del dom0.label
    assert dom0.label.name == "black"


def test_removal_refused_while_in_use(app, template, work):
    with pytest.raises(exc.QubesVMInUseError, match=r"used by work \(template\)"):
        del app.domains[template]
    app.default_dispvm = None
    del app.domains[work]
    app.default_template = template
    with pytest.raises(exc.QubesVMInUseError, match=r"the app \(default_template\)"):
        del app.domains[template]


def test_dispvm_template_must_be_allowed(app, work):
    with pytest.raises(exc.QubesPropertyValueError, match="template_for_dispvms"):
        app.default_dispvm = work
    work.template_for_dispvms = True
    app.default_dispvm = work
    assert work.default_dispvm is work


def test_netvm_loops_are_refused(app, template):
    one, two = (
        app.add_new_vm(
            "AppVM", name=name, label="red", template=template, provides_network=True
        )
        for name in ("one", "two")
    )
    one.netvm = two
    with pytest.raises(exc.QubesPropertyValueError, match="its own net VM"):
        two.netvm = one
    with pytest.raises(exc.QubesPropertyValueError, match="its own net VM"):
        two.netvm = two


def test_maxmem_is_bounded_by_memory(work):
    work.memory, work.maxmem = 200, 2000
    with pytest.raises(exc.QubesPropertyValueError, match="from 0"):
        work.maxmem = 2001


def test_virt_mode_ignores_case(work):
    work.virt_mode = "HVM"
    assert work.virt_mode == "hvm"


def test_no_kernel_says_what_to_set(work):
    work.kernel = None
    with pytest.raises(exc.QubesVMError, match="set its property kernel"):
        boot_files(work)
    work.virt_mode = "hvm"
    assert boot_files(work) is None


@pytest.mark.parametrize("name", ["kernel", "default_kernel"])
def test_kernel_is_one_that_there_is(app, work, name):
    app.kernels["5.4"] = None
    holder = app if name == "default_kernel" else work
    with pytest.raises(exc.QubesPropertyValueError, match=r"that kernel: it has 5\.4"):
        setattr(holder, name, "6.1")
    setattr(holder, name, "5.4")
    assert work.kernel == "5.4"
    del app.kernels["5.4"]
    with pytest.raises(exc.QubesVMError, match=r"'5\.4', which the app does not have"):
        boot_files(work)


@pytest.mark.asyncio
async def test_calls_on_a_halted_vm(work):
    for call in (
        work.shutdown(),
        work.kill(),
        work.pause(),
        work.run("true"),
    ):
        with pytest.raises(exc.QubesVMNotStartedError, match="VM work is not running"):
            await call
    with pytest.raises(exc.QubesVMNotPausedError, match="VM work is not paused"):
        await work.unpause()


@pytest.mark.asyncio
async def test_failed_start_names_its_step_and_undoes_itself(work):
    failures = []
    work.add_handler("domain-start-failed", lambda *_, reason: failures.append(reason))
    with pytest.raises(exc.QubesVMError, match=r"find its kernel: .* set its"):
        await work.start()
    assert work.get_power_state() == "Halted"
    assert len(failures) == 1


def test_features_and_tags_announce_their_names(work):
    events = []
    work.add_handler("domain-*", lambda _, event, **kw: events.append((event, kw)))
    work.features["service.x"] = True
    work.features["gui"] = False
    del work.features["gui"]
    work.tags.add("a")
    work.tags.remove("a")
    assert [event for event, _ in events] == [
        "domain-feature-pre-set:service.x",
        "domain-feature-set:service.x",
        "domain-feature-pre-set:gui",
        "domain-feature-set:gui",
        "domain-feature-pre-delete:gui",
        "domain-feature-delete:gui",
        "domain-tag-add:a",
        "domain-tag-delete:a",
    ]
    assert dict(work.features) == {"service.x": "1"}


def test_feature_falls_back_to_the_template(template, work):
    template.features["os"] = "Linux"
    assert work.features.check_with_template("os") == "Linux"
    assert work.features.check_with_template("none", "default") == "default"
    with pytest.raises(exc.QubesFeatureNotFoundError, match="no such feature"):
        work.features.check_with_template("none")


@pytest.mark.parametrize("value", ["a b", "", "x/y", "ä"])
def test_bad_tags(work, value):
    with pytest.raises(exc.QubesValueError, match="is no tag"):
        work.tags.add(value)


def test_disk_names(work):
    work.storage.init_volume("extra", {"size": 4096, "rw": True})
    work.storage.init_volume("more", {"size": 4096, "rw": True})
    names = {n: work.storage.disk_name(n) for n in work.volumes}
    assert names == {
        "root": "xvda",
        "private": "xvdb",
        "volatile": "xvdc",
        "extra": "xvde",
        "more": "xvdf",
    }


def test_vm_is_hashable_ordered_and_shows_its_name(template, work):
    assert {work: 1}[work] == 1
    assert sorted([work, template]) == [template, work]
    assert str(work) == "work"
    assert repr(work) == "<AppVM work>"
