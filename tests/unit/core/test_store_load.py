"""What a store may hold, and what is refused, by its line; the past is understood."""

import logging
import random
import re
import textwrap

import pytest
from documented import blocks

from qubes_itests.core import exc
from qubes_itests.core.ext import Extension, handler
from qubes_itests.core.store.file import StoreFormatError
from qubes_itests.core.vm.standalonevm import StandaloneVM

UUID = "2fcfc1f4-b2fe-4361-931a-c5294b35edfa"

# as Qubes OS has written it: labels by reference, no volumes, no UUID of one VM
OLDER = """\
<?xml version="1.0" encoding="utf-8" ?>
<qubes version="3.0">
    <properties>
        <property name="default_netvm">sys-net</property>
        <property name="default_fw_netvm">sys-net</property>
        <property name="default_template">fedora</property>
    </properties>
    <labels>
        <label id="label-1" color="#cc0000">red</label>
        <label id="label-9" color="#ff00ff">pink</label>
    </labels>
    <pools>
        <pool driver="file" dir_path="{directory}" name="default"/>
    </pools>
    <domains>
        <domain class="TemplateVM" id="domain-2">
            <properties>
                <property name="name">fedora</property>
                <property name="label" ref="label-1" />
                <property name="netvm"></property>
            </properties>
        </domain>
        <domain class="StandaloneVM" id="domain-1">
            <properties>
                <property name="qid">1</property>
                <property name="name">sys-net</property>
                <property name="provides_network">True</property>
                <property name="label" ref="label-1" />
                <property name="netvm"></property>
                <property name="uuid">2FCFC1F4-B2FE-4361-931A-C5294B35EDFA</property>
                <property name="stubdom_mem">128</property>
            </properties>
            <services>
                <service>clocksync</service>
                <service enabled="False">cups</service>
            </services>
        </domain>
        <domain class="AppVM" id="domain-3">
            <properties>
                <property name="maxmem">8000</property>
                <property name="memory">2000</property>
                <property name="name">work</property>
                <property name="label" ref="label-1" />
                <property name="template">fedora</property>
                <property name="dispvm_allowed">True</property>
            </properties>
            <features>
                <feature name="gui">1</feature>
                <feature name="empty"></feature>
            </features>
            <tags><tag name="mine"/></tags>
        </domain>
    </domains>
</qubes>
"""


def document(*vms, app=""):
    """Return a store of VMs; an extra line of each is the last one of its properties.

    The lines of the first VM are 7 (domain), 9 (name), 10 (qid), 11 (extra).
    """
    head = (
        "<qubes>\n<pools><pool name='default' driver='file' dir_path='{directory}'/>"
        f"</pools>\n<properties>\n{app}\n</properties>\n<domains>\n"
    )
    return head + "".join(vms) + "</domains>\n</qubes>\n"


def vm(name, extra="", *, qid=1, klass="StandaloneVM", after=""):
    return textwrap.dedent(f"""\
        <domain class="{klass}">
        <properties>
        <property name="name">{name}</property>
        <property name="qid">{qid}</property>
        {extra}
        </properties>
        {after}
        </domain>
        """)


def prop(name, value):
    return f'<property name="{name}">{value}</property>'


def test_older_store(load, caplog):
    with caplog.at_level(logging.WARNING, "qubes.store"):
        app = load(OLDER)
    assert app.domains.keys() == ["dom0", "fedora", "sys-net", "work"]
    net, work = app.domains["sys-net"], app.domains["work"]
    assert str(net.uuid) == UUID
    assert net.provides_network is True
    assert net.netvm is None
    assert dict(net.features) == {"service.clocksync": "1", "service.cups": ""}
    assert work.qid == 3
    assert work.template is app.domains["fedora"] is app.default_template
    assert work.netvm is net
    assert work.property_is_default("netvm")
    assert (work.memory, work.maxmem) == (2000, 8000)
    assert work.template_for_dispvms is True
    assert dict(work.features) == {"gui": "1", "empty": ""}
    assert set(work.tags) == {"mine"}
    assert str(work.label) == "red"
    assert list(work.volumes) == ["root", "private", "volatile"]
    for ignored in ("label: 'pink'", "stubdom_mem"):
        assert f"{ignored}" in caplog.text
    assert "qubes.xml:10: no such label" in caplog.text


def test_older_store_is_saved_as_of_today(load, tmp_path):
    app = load(OLDER)
    app.save(lock=False)
    first = (tmp_path / "qubes.xml").read_bytes()
    assert b"ref=" not in first
    assert b"<service" not in first
    assert b'<volume name="private"' in first
    load().save(lock=False)
    assert (tmp_path / "qubes.xml").read_bytes() == first


def test_pool_that_cannot_be_set_up_is_a_problem_and_no_end(load):
    app = load(OLDER.replace("{directory}", "/proc/nonexistent"))
    assert "pool default is not ready" in app.problems[0]
    assert "default" in app.pools


def test_empty_store_has_dom0(load):
    assert load("<qubes/>").domains.keys() == ["dom0"]


class Note(Extension):
    def __init__(self):
        self.seen = []

    @handler("*", vm=StandaloneVM)
    def on_event(self, _vm, event, **_kwargs):
        self.seen.append(event)


def test_loaded_vms_are_told_and_nothing_is_new(load):
    try:
        note = Note()
        app = load(document(vm("one", prop("memory", 300))))
    finally:
        note.unregister()
    assert note.seen == ["domain-load"]
    assert app.events_enabled
    assert app.domains["dom0"].events_enabled
    assert not app.loading


DANGLING = "no such VM: 'gone'"
NET = prop("provides_network", "True")
REFUSED = {
    "root": ("<system/>", 1, "expected the element 'qubes', got 'system'"),
    "version": (
        "<qubes version='5.0'/>",
        1,
        "expected version 3 or 4 of the format, got '5.0'",
    ),
    "no driver": ("<qubes><pools>\n<pool name='x'/></pools></qubes>", 2, "'driver'"),
    "unknown driver": (
        "<qubes><pools>\n<pool name='x' driver='tape'/></pools></qubes>",
        2,
        "tape",
    ),
    "option of a pool": (
        "<qubes><pools>\n<pool name='x' driver='file' speed='9'/></pools></qubes>",
        2,
        "speed",
    ),
    "two pools": (
        "<qubes><pools>\n<pool name='x' driver='x'/>\n<pool name='x'/></pools></qubes>",
        3,
        "pool 'x' is in line 2 already",
    ),
    "two labels": (
        "<qubes><labels>\n<label id='x'/>\n<label id='x'/></labels></qubes>",
        3,
        "label 'x' is in line 2 already",
    ),
    "no class": (document(vm("one", klass="")), 7, "'domain' lacks the attribute"),
    "unknown class": (document(vm("one", klass="NetVM")), 7, "no VM class 'NetVM'"),
    "no name": (
        "<qubes><domains>\n<domain class='AppVM'/></domains></qubes>",
        2,
        "qid",
    ),
    "impossible name": (document(vm("../etc")), 9, "VM name '../etc'"),
    "impossible number": (document(vm("one", qid=70_000)), 10, "from 0 to 10000"),
    "no number": (document(vm("one", qid="x")), 10, "'qid'"),
    "impossible UUID": (document(vm("one", prop("uuid", "x"))), 11, "'uuid'"),
    "two names": (
        document(vm("one"), vm("one", qid=2)),
        17,
        "name 'one' belongs to the VM in line 9",
    ),
    "two numbers": (
        document(vm("one"), vm("two")),
        18,
        "qid '1' belongs to the VM in line 10",
    ),
    "two UUIDs": (
        document(
            vm("one", prop("uuid", UUID)), vm("two", prop("uuid", UUID.upper()), qid=2)
        ),
        19,
        "belongs to the VM in line 11",
    ),
    "dom0's number": (document(vm("one", qid=0)), 7, "there is a VM with qid 0"),
    "another dom0": (document(vm("dom1", qid=4, klass="AdminVM")), 7, "'dom0'"),
    "two of one property": (
        document(vm("one", prop("memory", 300) + prop("memory", 400))),
        11,
        "property 'memory' is in line 11 already",
    ),
    "unknown property": (
        document(vm("one", prop("memroy", 300))),
        11,
        "StandaloneVM has no property 'memroy'",
    ),
    "value": (document(vm("one", prop("memory", "much"))), 11, "'memory' of one"),
    "unknown label": (document(vm("one", prop("label", "pink"))), 11, "'pink'"),
    "dangling netvm": (document(vm("one", prop("netvm", "gone"))), 11, DANGLING),
    "dangling template": (
        document(vm("one", prop("template", "gone"), klass="AppVM")),
        11,
        DANGLING,
    ),
    "no template": (document(vm("one", klass="AppVM")), 7, "lacks a template"),
    "dangling default": (
        document(app=prop("default_netvm", "gone")),
        4,
        DANGLING,
    ),
    "netvm that is none": (
        document(vm("one"), vm("two", prop("netvm", "one"), qid=2)),
        19,
        "provides_network",
    ),
    "netvm loop": (
        document(
            vm("one", NET + prop("netvm", "two")),
            vm("two", NET + prop("netvm", "one"), qid=2),
        ),
        None,
        "netvm|net VM",
    ),
    "feature's name": (
        document(vm("one", after="<features><feature name='a b'/></features>")),
        13,
        "no name of a feature",
    ),
    "tag's name": (
        document(vm("one", after="<tags><tag name='a b'/></tags>")),
        13,
        "no tag",
    ),
    "tag without a name": (
        document(vm("one", after="<tags><tag/></tags>")),
        13,
        "'tag' lacks the attribute 'name'",
    ),
    "volume's pool": (
        document(
            vm(
                "one",
                after="<volume-config>\n<volume name='private' pool='gone'/>"
                "</volume-config>",
            )
        ),
        14,
        "'gone'",
    ),
    "volume's id": (
        document(
            vm(
                "one",
                after="<volume-config>\n<volume name='private' vid='../../etc'/>"
                "</volume-config>",
            )
        ),
        14,
        "etc",
    ),
    "volume's flag": (
        document(
            vm(
                "one",
                after="<volume-config>\n<volume name='x' rw='maybe'/></volume-config>",
            )
        ),
        14,
        "neither True nor False",
    ),
    "volume's size": (
        document(
            vm(
                "one",
                after="<volume-config>\n<volume name='x' size='1G'/></volume-config>",
            )
        ),
        14,
        "1G",
    ),
}


@pytest.mark.parametrize(("text", "line", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_where_it_is_wrong(load, text, line, reason, tmp_path):
    """It is refused whole: not even the directories of its pools are made."""
    text = text.replace("{directory}", str(tmp_path / "pool"))
    with pytest.raises(StoreFormatError, match=reason) as caught:
        load(text)
    if line is not None:
        assert caught.value.line == line, caught.value
    assert re.match(
        rf"{re.escape(str(tmp_path))}/qubes.xml:\d+:\d+: ", str(caught.value)
    )
    assert (tmp_path / "qubes.xml").read_text() == text
    assert not (tmp_path / "pool").exists()


def test_refused_store_is_left_to_others(load, tmp_path):
    with pytest.raises(StoreFormatError):
        load("<system/>", lock=True)
    (tmp_path / "qubes.xml").write_text("<qubes/>")
    load(lock=True).store.release()


def test_order_of_vms_and_properties_does_not_matter(load):
    """A client before its net VM, and a net VM whose default would be a loop."""
    app = load(
        document(
            vm("client", prop("netvm", "firewall")),
            vm("net", NET + prop("netvm", "router"), qid=2),
            vm("firewall", NET + prop("netvm", "net"), qid=3),
            vm("router", prop("netvm", "") + NET, qid=4),
            app=prop("default_netvm", "net"),
        )
    )
    names = []
    found = app.domains["client"]
    while found is not None:
        names.append(found.name)
        found = found.netvm
    assert names == ["client", "firewall", "net", "router"]


def test_defaults_make_no_loop_of_net_vms(load):
    app = load(
        document(
            vm("net", NET),
            vm("firewall", NET + prop("netvm", "net"), qid=2),
            vm("client", qid=3),
            app=prop("default_netvm", "firewall")
            + prop("default_fw_netvm", "firewall"),
        )
    )
    net, firewall, client = (app.domains[n] for n in ("net", "firewall", "client"))
    assert (client.netvm, firewall.netvm, net.netvm) == (firewall, net, None)


def test_memory_that_was_lowered_after_maxmem(load):
    app = load(document(vm("one", prop("maxmem", 3000) + prop("memory", 100))))
    assert (app.domains["one"].memory, app.domains["one"].maxmem) == (100, 3000)
    with pytest.raises(exc.QubesPropertyValueError):
        app.domains["one"].maxmem = 3000


DEVICES = """\
<devices class="pci">
<device backend-domain="dom0" id="00_1f.3" required="yes">
<option name="no-strict-reset">True</option>
</device>
<device backend-domain="dom0" id="00_1f.4"/>
</devices>
<devices class="block">
<device backend-domain="*" id="*" identity="disk:*" mode="ask-to-attach"/>
</devices>
<devices class="usb"/>
"""


def test_devices(load):
    app = load(document(vm("one", after=DEVICES)))
    found = {
        (str(a.port), a.device_id, a.mode.value, tuple(a.options.items()))
        for devclass in ("pci", "block")
        for a in app.domains["one"].devices[devclass].get_assigned_devices()
    }
    assert found == {
        ("dom0:00_1f.3", "*", "required", (("no-strict-reset", "True"),)),
        ("dom0:00_1f.4", "*", "auto-attach", ()),
        ("*:*", "disk:*", "ask-to-attach", ()),
    }


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (DEVICES.replace("dom0", "gone", 1), 14),
        (DEVICES.replace("00_1f.3", "../x"), 14),
        (DEVICES.replace("00_1f.4", "00_1f.3"), 17),
        (DEVICES.replace("ask-to-attach", "perhaps"), 20),
        (DEVICES.replace('class="block"', 'class="B!"'), 20),
    ],
)
def test_devices_that_cannot_be(load, wrong, line):
    with pytest.raises(StoreFormatError) as caught:
        load(document(vm("one", after=wrong)))
    assert caught.value.line == line, caught.value


def test_firewall_and_notes(load):
    rules = "<firewall><rule>action=drop dst4=10.0.0.0/8</rule></firewall>"
    app = load(document(vm("one", after=rules + "<notes>a\nb</notes>")))
    assert app.domains["one"].firewall.rules == ["action=drop dst4=10.0.0.0/8"]
    assert app.domains["one"].notes == "a\nb"
    with pytest.raises(StoreFormatError, match="firewall rule 'action=no'"):
        load(
            document(
                vm("one", after="<firewall><rule>action=no</rule></firewall>"),
            )
        )


def test_notes_with_what_cannot_be_stored_do_not_keep_the_app_from_being_saved(load):
    app = load(document(vm("one")))
    app.domains["one"].notes = "a\0b\ud800"
    app.save(lock=False)
    assert load().domains["one"].notes == "a_b_"


def test_disposable_vms_of_the_last_run_are_gone(load, caplog):
    template = vm("tiny", qid=9, klass="TemplateVM")
    base = vm(
        "base",
        prop("template", "tiny") + prop("template_for_dispvms", "True"),
        qid=8,
        klass="AppVM",
    )
    disposables = [
        vm(
            f"disp{number}",
            prop("template", "base")
            + prop("dispid", number)
            + prop("auto_cleanup", number > 1)
            + prop("provides_network", "True"),
            qid=number,
            klass="DispVM",
        )
        for number in (1, 2, 3)
    ]
    client = vm("client", prop("netvm", "disp3"), qid=7)
    with caplog.at_level(logging.INFO, "qubes.store"):
        app = load(document(*disposables, client, base, template))
    # one is no longer needed, one has no auto_cleanup, one is in use
    names = {"dom0", "tiny", "base", "client", "disp1", "disp3"}
    assert set(app.domains.keys()) == names
    assert "disposable VM disp3 is kept: VM disp3 is used by client" in caplog.text
    assert "disposable VM disp2 is gone" in caplog.text


def test_example_of_the_documents_can_be_loaded(load, tmp_path):
    (example,) = blocks("docs/store.md", "xml")
    app = load(example.replace("/var/lib/itests/pool", str(tmp_path / "pool")))
    work = app.domains["work"]
    assert work.template is app.default_template
    assert work.notes == "what its user wrote"
    assert next(work.devices["pci"].get_assigned_devices()).required


MUTATIONS = 400


def mutated(text, chance):
    """Return a document with a word replaced, or a line lost or twice."""
    words = [w for w in re.split(r"""[<>"=\s]+""", text) if w] + ["", "0", "-1", "\x85"]
    lines = text.splitlines(keepends=True)
    number = chance.randrange(len(lines))
    if "dir_path" in lines[number]:
        return text  # or a load would make directories anywhere
    kind = chance.random()
    if kind < 0.15:
        lines[number] *= 2
    elif kind < 0.3:
        lines[number] = ""
    else:
        word = chance.choice(words[:-4])
        lines[number] = lines[number].replace(word, chance.choice(words))
    return "".join(lines)


def test_mutated_stores_are_loaded_or_refused(load):
    """Whatever is wrong, it is said as a StoreFormatError; what is loaded is saved."""
    chance = random.Random(8)  # noqa: S311 - repeatable, not secret
    whole = OLDER.replace("<tags>", DEVICES + "<tags>", 1)
    refused = 0
    for _ in range(MUTATIONS):
        text = whole
        for _ in range(chance.randrange(1, 6)):
            text = mutated(text, chance)
        try:
            app = load(text)
        except StoreFormatError:
            refused += 1
        else:
            app.save(lock=False)
    assert MUTATIONS / 4 < refused < MUTATIONS
