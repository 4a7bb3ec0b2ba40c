"""Requests, replies, exceptions and events as bytes."""

import pytest
from admin_client import AdminError, parse

from qubes_itests.admin.protocol import (
    LONGEST_REQUEST,
    Request,
    encode_event,
    encode_exception,
    encode_reply,
    encode_request,
    parse_request,
)

REQUESTS = [
    (b"admin.vm.List+ dom0 name dom0\0", Request("admin.vm.List")),
    (b"admin.vm.List dom0 name dom0\0", Request("admin.vm.List")),
    (b"admin.vm.List+ dom0 keyword adminvm\0", Request("admin.vm.List")),
    (
        b"admin.vm.property.Set+netvm dom0 name work\0sys-net",
        Request("admin.vm.property.Set", "netvm", "dom0", "work", b"sys-net"),
    ),
    (
        b"admin.vm.Shutdown+force+wait dom0 name work\0",
        Request("admin.vm.Shutdown", "force+wait", "dom0", "work"),
    ),
    (
        b"admin.vm.notes.Set+ dom0 name work\0a\0b \xff",
        Request("admin.vm.notes.Set", "", "dom0", "work", b"a\0b \xff"),
    ),
]


@pytest.mark.parametrize(("data", "request_"), REQUESTS)
def test_a_request_is_read(data, request_):
    assert parse_request(data) == request_


def test_a_request_that_is_written_is_read_again():
    for _, request_ in REQUESTS:
        assert parse_request(encode_request(request_)) == request_


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"admin.vm.List+ dom0 name dom0",
        b"admin.vm.List+ dom0 dom0\0",
        b"admin.vm.List+ dom0 keyword dom0\0",
        b"admin.vm.List+ dom0 name \0",
        b"admin.vm.List+ dom0 name a b\0",
        b"admin.vm.List+  dom0 name dom0\0",
        b" admin.vm.List+ dom0 name dom0\0",
        b"+ dom0 name dom0\0",
        b"admin.vm.List+a b dom0 name dom0\0",
        b"admin.vm.List+\xc3\xa9 dom0 name dom0\0",
        b"admin/vm.List+ dom0 name dom0\0",
        b"admin.vm.List+ dom0 name dom0\n\0",
        b"dom0\0admin.vm.List\0dom0\0\0",
        b"admin.vm.List+ dom0 uuid dom0\0",
        b"admin.vm.List+ dom0 name dom0\0" + bytes(LONGEST_REQUEST),
    ],
)
def test_what_is_no_request_is_refused(data):
    with pytest.raises(ValueError, match="expected"):
        parse_request(data)


def test_the_longest_request_is_taken_and_one_byte_more_is_not():
    header = b"admin.vm.notes.Set+ dom0 name work\0"
    longest = header + b"x" * (LONGEST_REQUEST - len(header))
    assert parse_request(longest).payload.endswith(b"x")
    with pytest.raises(ValueError, match="expected"):
        parse_request(longest + b"x")


def test_a_reply_begins_with_0_and_is_never_empty():
    assert encode_reply("") == b"0\0"
    assert encode_reply("é\n") == b"0\0\xc3\xa9\n"


@pytest.mark.parametrize(
    "text", ["100% of %s, %%", "a\0b", "%(name)d", "no such VM: 'x'", "é"]
)
def test_a_client_that_formats_the_message_sees_it_as_it_was(text):
    with pytest.raises(AdminError) as caught:
        parse(encode_exception("QubesValueError", text))
    assert caught.value.text == text.replace("\0", "\\0")
    assert caught.value.kind == "QubesValueError"


def test_an_exception_has_type_traceback_and_format():
    assert encode_exception("QubesVMError", "is 5%", "tb") == (
        b"2\0QubesVMError\0tb\0is 5%%\0"
    )


def test_an_event_ends_in_an_empty_key():
    assert encode_event("", "connection-established", {}) == (
        b"1\0\0connection-established\0\0"
    )
    assert encode_event("work", "property-set:netvm", {"name": "netvm", "n": None}) == (
        b"1\0work\0property-set:netvm\0name\0netvm\0n\0None\0\0"
    )


def test_a_nul_in_a_value_begins_no_field():
    assert encode_event("a", "b", {"key": "x\0\0y"}).count(b"\0") == 6
