"""Boot modes: kernel options and users that templates offer by names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from qubes_itests.core.exc import QubesPropertyValueError
from qubes_itests.core.vm.boot_data import domain_spec, identity, qubesdb_entries

OFFERED = {
    "boot-mode.kernelopts.quiet": "quiet loglevel=0",
    "boot-mode.kernelopts.loud": "debug",
    "boot-mode.default-user.loud": "tester",
}


FILES = SimpleNamespace(kernel=Path("k"), initramfs=Path("i"), kernel_options="quiet")


@pytest.fixture
def offering(app, template):
    app.kernels["6.1"] = FILES
    template.features.update(OFFERED)
    return template


@pytest.fixture
def work(app, offering):
    return app.add_new_vm("AppVM", name="work", label="red", template=offering)


def test_without_any_it_is_the_default_one(work, offering):
    assert work.bootmode == offering.bootmode == "default"
    assert work.bootmode_kernelopts == ""
    assert work.get_default_user() == "user"


def test_of_the_template_and_of_those_that_start_from_it(work, offering):
    told = []
    work.add_handler("property-reset:bootmode", lambda *_, **__: told.append(1))
    offering.features["boot-mode.active"] = "quiet"
    offering.features["boot-mode.appvm-default"] = "loud"
    assert told == [1]
    assert (offering.bootmode, work.bootmode) == ("quiet", "loud")
    assert offering.bootmode_kernelopts == "quiet loglevel=0"
    assert work.bootmode_kernelopts == "debug"
    assert (offering.get_default_user(), work.get_default_user()) == ("user", "tester")
    offering.appvm_default_bootmode = "quiet"
    assert told == [1, 1]
    assert work.bootmode == "quiet"
    work.bootmode = "loud"
    del offering.appvm_default_bootmode
    assert told == [1, 1]
    assert work.bootmode == "loud"


def test_its_own_comes_before_what_others_offer(work, offering):
    offering.features["boot-mode.appvm-default"] = "loud"
    work.features["boot-mode.active"] = "default"
    assert work.bootmode == "default"
    work.features["boot-mode.active"] = "none such"
    assert work.bootmode == "loud"


def test_one_that_is_not_there_stands_for_the_default(work, offering):
    offering.features["boot-mode.appvm-default"] = "quiet"
    work.bootmode = "none such"
    assert work.bootmode_kernelopts == "quiet loglevel=0"


def test_what_a_start_gets_of_it(app, work, offering):
    offering.features["boot-mode.appvm-default"] = "loud"
    spec = domain_spec(work, app.directory, FILES)
    assert spec.kernel_options == "quiet swiotlb=2048 debug"
    assert identity(work).default_user == "tester"
    assert qubesdb_entries(work)["/default-user"] == "tester"


def test_emulated_guests_have_one_cpu_unless_more_are_asked_for(app, work, offering):
    """Two of them get in each other's way; the property is that of Qubes OS."""

    def given():
        return domain_spec(work, app.directory, FILES).vcpus

    assert given() == work.vcpus == 2
    app.hypervisor.slowness = 3.0
    assert (given(), work.vcpus) == (1, 2)
    offering.vcpus = 2
    assert given() == 2
    work.vcpus = 3
    assert given() == 3
    del offering.vcpus
    assert given() == 3


def test_a_new_root_of_a_standalone_vm_brings_one(app):
    alone = app.add_new_vm("StandaloneVM", name="alone", label="red")
    alone.features.update(OFFERED | {"boot-mode.standalone-default": "quiet"})
    for name, expected in (("private", "default"), ("root", "quiet")):
        alone.fire_event("domain-import-volume", name=name, source=None)
        assert alone.bootmode == expected


def test_defaults_of_vms_are_those_of_qubes_os(app, work):
    dom0 = app.domains["dom0"]
    assert (work.vcpus, work.memory, work.kernelopts) == (2, 400, "swiotlb=2048")
    assert work.guivm is work.audiovm is app.default_guivm is dom0
    assert work.management_dispvm is app.clockvm is app.updatevm is None
    assert (work.keyboard_layout, dom0.keyboard_layout) == ("us++", "us++")
    assert (work.xid, dom0.xid) == (-1, 0)
    assert app.check_updates_vm is True
    dom0.keyboard_layout = "de+nodeadkeys+"
    assert work.keyboard_layout == "de+nodeadkeys+"
    with pytest.raises(QubesPropertyValueError, match="LAYOUT"):
        work.keyboard_layout = "de"
    with pytest.raises(QubesPropertyValueError, match="template_for_dispvms"):
        app.management_dispvm = work
    work.kernel = None
    assert work.kernelopts == ""


def test_the_machine(app):
    assert app.host.no_cpus >= 1
    assert app.host.memory_total > 1 << 17
    app.host.budget = 1 << 30
    assert app.host.memory_total == 1 << 20
