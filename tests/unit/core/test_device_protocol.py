"""Devices on the wire: what is written is read, and nothing else is."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.core.device import port as serialization
from qubes_itests.core.device.assignment import AssignmentMode, DeviceAssignment
from qubes_itests.core.device.info import (
    DeviceCategory,
    DeviceInfo,
    DeviceInterface,
    UnknownDevice,
)
from qubes_itests.core.device.port import Port, VirtualDevice
from qubes_itests.core.exc import (
    ProtocolError,
    QubesValueError,
    QubesVMNotFoundError,
)


class Domains(dict):
    """VMs by name, as far as devices look at them."""

    def __missing__(self, name):
        raise QubesVMNotFoundError(name)


class VM:
    def __init__(self, name, domains):
        self.name = name
        self.app = self
        self.domains = domains
        domains[name] = self


DOMAINS = Domains()
DOM0, WORK, USB = (VM(name, DOMAINS) for name in ("dom0", "work", "sys-usb"))

printable = "".join(chr(code) for code in range(32, 127))
keys = st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=20)
values = st.text(printable, max_size=30).filter(lambda text: not text.endswith("\\"))
names = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9._-]{0,20}\Z")
ports = st.builds(
    Port,
    st.sampled_from([DOM0, WORK, USB]),
    names,
    st.sampled_from(["block", "pci", "usb"]),
)
device_ids = st.text([c for c in printable if c not in " '\\"], min_size=1)
devices = st.builds(VirtualDevice, ports, st.none() | device_ids.map(lambda t: t[:99]))
interfaces = st.from_regex(r"\A[bpum?][0-9a-f*]{6}\Z").map(DeviceInterface)


def plain_keys(found):
    return {k: v for k, v in found.items() if not k.startswith("_")}


@given(st.dictionaries(keys, values).map(plain_keys), st.dictionaries(keys, values))
def test_what_is_packed_is_unpacked(properties, options):
    """Whatever is in the values: quotation marks, what looks like another pair."""
    packed = serialization.pack(properties, options)
    assert serialization.unpack(packed) == (properties, options)


@given(st.lists(st.sampled_from("a _='\\\"\n\x00é"), max_size=25).map("".join))
def test_what_unpacks_packs_to_the_same_but_for_spaces(text):
    """Nothing is taken that could also mean something else."""
    try:
        found = serialization.unpack(text.encode())
    except ProtocolError:
        return
    again = serialization.pack(*found).decode()
    assert sorted(again.replace(" ", "")) == sorted(text.replace(" ", ""))
    assert serialization.unpack(again.encode()) == found


@pytest.mark.parametrize(
    "sent",
    [
        b"a",
        b"a=b",
        b"a='b",
        b"a='b\\'",
        b"a='b'c='d'",
        b"a='b' a='c'",
        b"a='b\n'",
        b"='b'",
        b"a b='c'",
        b"a='\xe9'",
        b"a='b' x",
        b"a='b'' c='d'",
    ],
)
def test_what_is_not_written_is_not_read(sent):
    with pytest.raises(ProtocolError):
        serialization.unpack(sent)


@pytest.mark.parametrize("pair", [("a b", "c"), ("", "c"), ("a", "é"), ("a", "b\\")])
def test_what_cannot_be_sent(pair):
    with pytest.raises(ProtocolError):
        serialization.pack(dict([pair]))


def test_the_bytes_are_those_of_qubes():
    """As the client sends an assignment, and as it is answered about a device."""
    device = VirtualDevice(Port(DOM0, "data.img", "block"), "image:data.img")
    options = {"read-only": "yes"}
    assignment = DeviceAssignment(device, WORK, options, "auto-attach")
    assert assignment.serialize() == (
        b"device_id='image:data.img' port_id='data.img' devclass='block'"
        b" backend_domain='dom0' mode='auto-attach' frontend_domain='work'"
        b" _read-only='yes'"
    )
    info = DeviceInfo(
        Port(USB, "1-1.2", "usb"),
        vendor="it's",
        interfaces=[DeviceInterface("u030102")],
        attachment=WORK,
        parent=Port(USB, "1-1", "usb"),
        speed="480",
    )
    assert info.serialize() == (
        b"device_id='0000:0000::?******' port_id='1-1.2' devclass='usb'"
        b" backend_domain='sys-usb' vendor='it\\'s' attachment='work'"
        b" interfaces='u030102' parent_port_id='1-1' parent_devclass='usb'"
        b" _speed='480'"
    )


@given(
    devices,
    st.none() | st.just(WORK),
    st.dictionaries(keys, values),
    st.sampled_from(AssignmentMode),
)
def test_an_assignment_comes_back(device, frontend, options, mode):
    sent = DeviceAssignment(device, frontend, options, mode)
    for expected in (device, VirtualDevice(device.port)):
        read = DeviceAssignment.deserialize(sent.serialize(), expected)
        assert read == sent
        assert (read.options, read.mode) == (options, mode)
        assert read.frontend_domain is frontend


@given(devices, st.lists(interfaces, max_size=3), st.dictionaries(keys, values))
def test_what_is_known_of_a_device_comes_back(device, kinds, data):
    known = {"vendor": "A", "product": "it's b", "serial": "=' x='"}
    sent = DeviceInfo(
        device.port, device_id=device.device_id, interfaces=kinds, **known
    )
    sent.data = data
    read = DeviceInfo.deserialize(
        f"{device.port_id} ".encode() + sent.serialize(), device.backend_domain
    )
    assert read == sent
    assert read.devclass == device.devclass
    assert read.interfaces == sent.interfaces
    assert (read.vendor, read.product, read.serial) == tuple(known.values())
    assert (read.manufacturer, read.data) == ("unknown", data)


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"port_id='other'", "port_id of the device is 'other', not 'data'"),
        (b"devclass='pci'", "devclass of the device"),
        (b"backend_domain='work'", "backend_domain of the device"),
        (b"device_id='other'", "device_id of the device"),
    ],
)
def test_another_device_than_expected(sent, error):
    device = VirtualDevice(Port(DOM0, "data", "block"), "image:data")
    with pytest.raises(ProtocolError, match=error):
        DeviceAssignment.deserialize(sent, device)


@pytest.mark.parametrize(
    "sent",
    [
        b"mode='sometimes'",
        b"frontend_domain='nobody'",
        b"colour='red'",
        b"device_id='a b'",
        b"device_id='a\\b'",
        b"device_id=''",
    ],
)
def test_what_no_assignment_says(sent):
    with pytest.raises(ProtocolError):
        DeviceAssignment.deserialize(sent, VirtualDevice(Port(DOM0, "data", "block")))


@pytest.mark.parametrize(
    "said",
    [
        b"interfaces='b***'",
        b"interfaces='\t******'",
        b"attachment='x'",
        b"a='b'",
        b"it's",
        b"port_id='other'",
        b"devclass='pci'",
        b"backend_domain='work'",
        b"device_id='a b'",
    ],
)
def test_a_device_that_says_what_cannot_be_is_unknown(said):
    read = DeviceInfo.deserialize(b"data " + said, DOM0, "block")
    assert isinstance(read, UnknownDevice)
    assert read.port == Port(DOM0, "data", "block")
    assert read.name == "unknown"


def test_a_device_at_no_port_is_refused():
    with pytest.raises(QubesValueError, match="no name of a port"):
        DeviceInfo.deserialize(b"../x name='a'", DOM0, "block")


@given(devices)
def test_the_argument_of_a_device_names_it(device):
    written = device.repr_for_qarg
    assert not set(written) & set("*:")
    ambiguous = set("+_*") if device.device_id != "*" else set()
    if not set(device.device_id) & ambiguous and device.port_id != "_":
        read = VirtualDevice.from_qarg(written, device.devclass, DOMAINS)
        assert read == device


@given(devices)
def test_a_device_is_read_from_an_argument_and_from_what_users_write(device):
    argument, text = repr(device), str(device)
    assert VirtualDevice.from_qarg(argument, device.devclass, DOMAINS) == device
    assert VirtualDevice.from_str(text, device.devclass, DOMAINS) == device
    assert Port.from_qarg(argument, device.devclass, DOMAINS) == device.port


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("dom0+data+image+data", ("dom0", "data", "image:data")),
        ("dom0+data+_", ("dom0", "data", "*")),
        ("dom0+_+0000+0000++_______", ("dom0", "*", "0000:0000::?******")),
        ("_+data+_", ("*", "data", "*")),
        (
            "dom0+1-2.3+12ab+34cd+a_b+u030102",
            ("dom0", "1-2.3", "12ab:34cd:a_b:u030102"),
        ),
        ("dom0+_:_", ("dom0", "_", "_")),
    ],
)
def test_arguments_as_client_tools_send_them(argument, names):
    """In an argument there is neither a colon nor an asterisk; before, there was."""
    read = VirtualDevice.from_qarg(argument, "block", DOMAINS)
    assert (read.backend_name, read.port_id, read.device_id) == names


@pytest.mark.parametrize(
    "argument",
    [
        "dom0",
        "dom0+",
        "dom0+data:",
        "dom0++a",
        "dom0+a+",
        "dom0+a+b c",
        "dom0+a/b",
        "dom0+..",
        "dom0+a:b c",
        "+a",
        "x+a",
    ],
)
def test_arguments_that_name_no_device(argument):
    with pytest.raises((QubesValueError, QubesVMNotFoundError)):
        VirtualDevice.from_qarg(argument, "block", DOMAINS)


def test_the_most_specific_assignment_comes_last():
    port, anywhere = Port(DOM0, "a", "block"), Port(DOM0, None, "block")
    ordered = [
        DeviceAssignment(device)
        for device in (
            VirtualDevice(anywhere),
            VirtualDevice(anywhere, "id"),
            VirtualDevice(port),
            VirtualDevice(port, "id"),
        )
    ]
    assert sorted(ordered[i] for i in (2, 0, 3, 1)) == ordered


def test_what_an_assignment_matches():
    port = Port(DOM0, "a", "block")
    device = VirtualDevice(port, "id")
    matching = [
        device,
        VirtualDevice(port),
        VirtualDevice(Port(DOM0, None, "block"), "id"),
        VirtualDevice(Port(None, None, "block")),
    ]
    others = [
        VirtualDevice(port, "other"),
        VirtualDevice(Port(DOM0, "b", "block")),
        VirtualDevice(Port(WORK, "a", "block")),
        VirtualDevice(Port(DOM0, "a", "usb")),
    ]
    assert all(DeviceAssignment(one).matches(device) for one in matching)
    assert not any(DeviceAssignment(one).matches(device) for one in others)


def test_equality_is_by_name():
    port = Port(DOM0, "a", "block")
    assert VirtualDevice(port) == port
    assert VirtualDevice(port, "id") != port
    assert DeviceAssignment(VirtualDevice(port)) == VirtualDevice(port)
    assert VirtualDevice(port) == DeviceAssignment(VirtualDevice(port))
    assert len({port, Port(DOM0, "a", "block"), Port(DOM0, "a", "usb")}) == 2
    assert Port(DOM0, "a") < Port(DOM0, "b")
    assert UnknownDevice.from_device(VirtualDevice(port)).port == port


@pytest.mark.parametrize(
    ("encoding", "category"),
    [
        ("u030102", DeviceCategory.Mouse),
        ("u030000", DeviceCategory.Input),
        ("p0c0330", DeviceCategory.PCI_USB),
        ("p0c0100", DeviceCategory.PCI_Serial_Bus),
        ("b******", DeviceCategory.Block_Storage),
        ("u0e0102", DeviceCategory.Camera),
        ("m000000", DeviceCategory.Microphone),
        ("?******", DeviceCategory.Other),
    ],
)
def test_the_most_specific_category_is_found(encoding, category):
    assert DeviceInterface(encoding).category is category


def test_interfaces_match_patterns():
    assert DeviceInterface("u03****").matches(DeviceInterface("u030102"))
    assert not DeviceInterface("u030102").matches(DeviceInterface("u03****"))


def test_interfaces_of_a_class():
    assert repr(DeviceInterface("030102", devclass="usb")) == "u030102"
    assert repr(DeviceInterface("03", devclass="usb")) == "u03****"
    assert DeviceInterface("030102", devclass="usb").devclass == "usb"
    assert repr(DeviceInterface("030102")) == "?030102"
    assert DeviceInterface("b******") == DeviceInterface("", devclass="block")
    for wrong, devclass in (("03010z", "usb"), ("u030102", "usb"), ("u0301020", None)):
        with pytest.raises(QubesValueError, match="no interface"):
            DeviceInterface(wrong, devclass)
    both = DeviceInterface.from_str_bulk("u030102b******")
    assert both == [DeviceInterface("u030102"), DeviceInterface("b******")]
    assert DeviceInterface.from_str_bulk(None) == []
    with pytest.raises(QubesValueError, match="each has 7"):
        DeviceInterface.from_str_bulk("u03010")


def test_what_a_device_says_may_be_found_out_later():
    class Found(DeviceInfo):
        @property
        def name(self):
            return self._name or "looked up"

        @property
        def interfaces(self):
            return [DeviceInterface("02", devclass="usb"), DeviceInterface("030102")]

        @property
        def device_id(self):
            return "1a0a:badd"

    device = Found(Port(USB, "1", "usb"), serial="7")
    assert device.description == "Network: unknown vendor looked up"
    assert b"name='looked up'" in device.serialize()
    assert b"device_id='1a0a:badd'" in device.serialize()
    assert DeviceAssignment(device).device_id == "1a0a:badd"


def test_a_copy_of_a_device_has_what_is_changed():
    device = VirtualDevice(Port(USB, "1", "usb"), "1a0a:badd")
    assert device.clone() == device
    assert device.clone(device_id="*") == device.port
    anywhere = device.clone(port=Port(USB, "*", "usb"))
    assert (anywhere.port_id, anywhere.device_id) == ("*", "1a0a:badd")
    assert DeviceAssignment.new(USB, "1", "usb", "1a0a:badd") == device


def test_descriptions_for_users():
    port = Port(USB, "1", "usb")
    assert DeviceInfo(port).description == "?******: unknown vendor unknown usb device"
    mouse = DeviceInfo(
        port, vendor="A", product="B", interfaces=[DeviceInterface("u030102")]
    )
    assert mouse.description == "Mouse: A B"
