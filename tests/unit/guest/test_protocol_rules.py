"""Every rule that a guest could break, broken once."""

import struct

import pytest

from qubes_itests.guest.exc import ProtocolViolation
from qubes_itests.guest.link.frames import (
    FIRST_GUEST_STREAM,
    HEADER,
    PAYLOAD_MAX,
    STREAMS_MAX,
    WINDOW,
    Called,
    Credited,
    DatabaseChanged,
    Done,
    Ended,
    ExitKind,
    Failed,
    FrameType,
    Logged,
    Ready,
    ReceivedEof,
    Stopped,
    encode,
)
from qubes_itests.guest.link.protocol import HostProtocol

F = FrameType
CALL = b"target\0qubes.Ping\0user\0"


def ready(protocol):
    hello = protocol.hello()
    return list(protocol.receive(encode(F.READY, payload=hello[HEADER.size :])))


@pytest.fixture
def protocol():
    protocol = HostProtocol()
    assert ready(protocol) == [Ready()]
    return protocol


@pytest.fixture
def stream(protocol):
    number, _ = protocol.spawn("command", "", "cat", "")
    return number


def u32(value):
    return struct.pack("<I", value)


def broken_by(protocol, *frames):
    with pytest.raises(ProtocolViolation) as caught:
        list(protocol.receive(b"".join(frames)))
    return caught.value.rule


def test_frames_mean_what_the_protocol_says(protocol, stream):
    protocol.request(F.ENTER, b"")
    frames = [
        encode(F.DONE),
        encode(F.LOG, payload="ü".encode()),
        encode(F.DB_CHANGED, payload=b"/a\0b\0"),
        encode(F.DB_CHANGED, payload=b"/a\0"),
        encode(F.CALL, FIRST_GUEST_STREAM, payload=CALL),
        encode(F.EOF, stream, 1),
        encode(F.STOP, stream, 0),
        encode(F.CREDIT, stream, 0, u32(7)),
        encode(F.EXIT, stream, payload=b"\x01\x09"),
    ]
    assert list(protocol.receive(b"".join(frames))) == [
        Done(),
        Logged("ü"),
        DatabaseChanged("/a", "b"),
        DatabaseChanged("/a", None),
        Called(FIRST_GUEST_STREAM, "target", "qubes.Ping", "user"),
        ReceivedEof(stream, 1),
        Stopped(stream, 0),
        Credited(stream, 0),
        Ended(stream, ExitKind.KILLED, 9, ""),
    ]


def test_bytes_may_be_cut_anywhere(protocol, stream):
    frames = encode(F.DATA, stream, 1, b"abc") + encode(F.EOF, stream, 1)
    events = []
    for byte in frames:
        for event in protocol.receive(bytes([byte])):
            data = getattr(event, "data", None)
            events.append(bytes(data) if data is not None else event)
    assert events == [b"abc", ReceivedEof(stream, 1)]


def test_failure_carries_the_reason_without_what_steers_a_terminal(protocol):
    protocol.request(F.ENTER, b"")
    frame = encode(F.FAILED, payload=b"no disk\x1b[2J\nFAKE: 1 passed")
    (event,) = protocol.receive(frame)
    assert event == Failed(r"no disk\x1b[2J\nFAKE: 1 passed")


@pytest.mark.parametrize("kind", [0, F.HELLO, F.SPAWN, F.SIGNAL, F.RESIZE, 0x55, 0xFF])
def test_unknown_types_and_those_of_the_host(protocol, kind):
    header = HEADER.pack(kind, 0, 0, 0)
    assert "types listed" in broken_by(protocol, header)


def test_a_length_is_refused_before_its_payload_comes(protocol):
    header = HEADER.pack(F.LOG, 0, PAYLOAD_MAX + 1, 0)
    assert "at most" in broken_by(protocol, header)


def test_nothing_comes_before_ready():
    protocol = HostProtocol()
    protocol.hello()
    assert "before READY" in broken_by(protocol, encode(F.LOG, payload=b"x"))


def test_ready_without_hello():
    assert "answers HELLO" in broken_by(
        HostProtocol(), encode(F.READY, payload=bytes(18))
    )


def test_ready_of_another_connection():
    """An old READY must not pass for the answer to this HELLO."""
    protocol = HostProtocol()
    protocol.hello()
    old = struct.pack("<H16s", 1, bytes(16))
    assert "bytes of HELLO" in broken_by(protocol, encode(F.READY, payload=old))


def test_ready_of_another_version():
    protocol = HostProtocol()
    hello = protocol.hello()
    answer = struct.pack("<H", 2) + hello[HEADER.size + 2 :]
    assert "version" in broken_by(protocol, encode(F.READY, payload=answer))


def test_ready_twice(protocol):
    again = encode(F.READY, payload=bytes(18))
    assert "once" in broken_by(protocol, again)


def test_hello_may_be_repeated_and_each_is_answered_once():
    """Late answers mean nothing more; one too many is a breach."""
    protocol = HostProtocol()
    hello = protocol.hello()
    assert protocol.hello() == hello
    answer = encode(F.READY, payload=hello[HEADER.size :])
    assert list(protocol.receive(answer + answer)) == [Ready(), None]
    assert "once" in broken_by(protocol, answer)


@pytest.mark.parametrize("kind", [F.DONE, F.FAILED])
def test_an_answer_that_nobody_asked_for(protocol, kind):
    assert "follows a request" in broken_by(protocol, encode(kind))


def test_done_with_a_payload(protocol):
    protocol.request(F.ENTER, b"")
    assert "empty" in broken_by(protocol, encode(F.DONE, payload=b"x"))


@pytest.mark.parametrize("payload", [b"", b"/a", b"/a\0b", b"/a\0b\0c\0", b"\xff\0"])
def test_bad_entries_of_a_database(protocol, payload):
    assert broken_by(protocol, encode(F.DB_CHANGED, payload=payload))


@pytest.mark.parametrize("text", [b"x" * 1025, b"\xff"])
def test_bad_text(protocol, text):
    assert broken_by(protocol, encode(F.LOG, payload=text))


@pytest.mark.parametrize(
    ("kind", "stream", "channel"),
    [
        (F.LOG, 0, 1),  # a channel that means nothing
        (F.DATA, 1, 3),  # no such channel
        (F.LOG, 1, 0),  # control, not on stream 0
        (F.DATA, 0, 1),  # a stream's, on stream 0
        (F.EXIT, 1, 1),
    ],
)
def test_stream_and_channel_fit_the_type(protocol, stream, kind, channel):
    assert broken_by(protocol, encode(kind, stream and 1, channel, b"x"))


@pytest.mark.parametrize("number", [1, 0x7FFFFFFF, FIRST_GUEST_STREAM, 0xFFFFFFFF])
@pytest.mark.parametrize("kind", [F.DATA, F.EOF, F.STOP, F.CREDIT, F.EXIT])
def test_streams_that_were_never_opened(protocol, kind, number):
    payload = {F.DATA: b"x", F.CREDIT: u32(1), F.EXIT: b"\0\0"}.get(kind, b"")
    assert broken_by(protocol, encode(kind, number, 0, payload))


@pytest.mark.parametrize("channel", [0])
@pytest.mark.parametrize("kind", [F.DATA, F.EOF])
def test_writing_to_a_channel_of_the_host(protocol, stream, kind, channel):
    payload = b"x" if kind == F.DATA else b""
    assert "does not write" in broken_by(
        protocol, encode(kind, stream, channel, payload)
    )


@pytest.mark.parametrize("channel", [1, 2])
@pytest.mark.parametrize("kind", [F.STOP, F.CREDIT])
def test_reading_a_channel_of_the_guest(protocol, stream, kind, channel):
    payload = u32(1) if kind == F.CREDIT else b""
    assert "guest writes" in broken_by(protocol, encode(kind, stream, channel, payload))


def test_data_without_bytes(protocol, stream):
    assert "at least 1" in broken_by(protocol, encode(F.DATA, stream, 1))


@pytest.mark.parametrize("kind", [F.DATA, F.EOF])
def test_anything_after_eof(protocol, stream, kind):
    more = encode(kind, stream, 1, b"x" if kind == F.DATA else b"")
    assert broken_by(protocol, encode(F.EOF, stream, 1), more)


def fill(stream, size, channel=1):
    full, rest = divmod(size, PAYLOAD_MAX)
    frames = [encode(F.DATA, stream, channel, bytes(PAYLOAD_MAX))] * full
    return b"".join([*frames, encode(F.DATA, stream, channel, bytes(rest))])


def test_data_up_to_the_credit_and_not_beyond(protocol, stream):
    """The window of one channel is its own, and is exact to the byte."""
    list(protocol.receive(fill(stream, WINDOW)))
    list(protocol.receive(fill(stream, WINDOW, channel=2)))
    protocol.give_credit(stream, 1, 5)
    list(protocol.receive(encode(F.DATA, stream, 1, b"12345")))
    rule = broken_by(protocol, encode(F.DATA, stream, 1, b"x"))
    assert "within the credit" in rule


def test_credit_beyond_the_limit(protocol, stream):
    list(protocol.receive(encode(F.CREDIT, stream, 0, u32(3 * WINDOW))))
    rule = broken_by(protocol, encode(F.CREDIT, stream, 0, u32(1)))
    assert f"at most {4 * WINDOW} bytes" in rule


def test_credit_of_two_gigabytes(protocol, stream):
    assert "of credit" in broken_by(
        protocol, encode(F.CREDIT, stream, 0, u32(2**31 - WINDOW))
    )


def test_credit_of_another_size(protocol, stream):
    assert broken_by(protocol, encode(F.CREDIT, stream, 0, b"123"))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0",
        b"\x01\x00",  # no signal
        b"\x01\x41",
        b"\x02\x00",  # did not start, with another status
        b"\x03\x00",  # no such kind
        b"\x00\x00" + b"x" * 513,
    ],
)
def test_bad_exits(protocol, stream, payload):
    assert broken_by(protocol, encode(F.EXIT, stream, payload=payload))


def test_exit_twice(protocol, stream):
    end = encode(F.EXIT, stream, payload=b"\0\0")
    assert "once" in broken_by(protocol, end, end)


def test_exit_of_a_call_is_the_hosts(protocol):
    call = encode(F.CALL, FIRST_GUEST_STREAM, payload=CALL)
    end = encode(F.EXIT, FIRST_GUEST_STREAM, payload=b"\0\0")
    assert broken_by(protocol, call, end)


def test_late_frames_of_an_ended_stream_are_dropped(protocol, stream):
    list(protocol.receive(encode(F.EXIT, stream, payload=b"\0\0")))
    late = [
        encode(F.DATA, stream, 1, b"x"),
        encode(F.EOF, stream, 1),
        encode(F.STOP, stream, 0),
        encode(F.CREDIT, stream, 0, u32(1)),
    ]
    assert list(protocol.receive(b"".join(late))) == [None] * 4


@pytest.mark.parametrize("step", [-1, 0, 2])
def test_calls_are_numbered_one_by_one(protocol, step):
    """Neither an old number again, nor one skipped."""
    first = encode(F.CALL, FIRST_GUEST_STREAM, payload=CALL)
    other = encode(F.CALL, FIRST_GUEST_STREAM + step, payload=CALL)
    assert broken_by(protocol, first, other)


def test_a_call_with_the_number_of_an_ended_one(protocol):
    first = encode(F.CALL, FIRST_GUEST_STREAM, payload=CALL)
    list(protocol.receive(first))
    protocol.exit(FIRST_GUEST_STREAM, ExitKind.EXITED, 0)
    assert "one by one" in broken_by(protocol, first)


def test_too_many_calls_at_once(protocol):
    calls = [
        encode(F.CALL, FIRST_GUEST_STREAM + n, payload=CALL)
        for n in range(STREAMS_MAX + 1)
    ]
    assert len(list(protocol.receive(b"".join(calls[:-1])))) == STREAMS_MAX
    assert "at most" in broken_by(protocol, calls[-1])


@pytest.mark.parametrize("payload", [b"", b"a\0b\0", b"a\0b\0c", b"a\0b\0c\0d\0"])
def test_a_call_has_three_strings(protocol, payload):
    frame = encode(F.CALL, FIRST_GUEST_STREAM, payload=payload)
    assert "3 strings" in broken_by(protocol, frame)


def test_a_terminal_has_one_output(protocol):
    stream, _ = protocol.spawn("terminal", "", "", "80x24")
    (event,) = protocol.receive(encode(F.DATA, stream, 1, b"x"))
    assert event.channel == 1
    frame = encode(F.DATA, stream, 2, b"x")
    assert "does not write this channel" in broken_by(protocol, frame)


def test_the_host_keeps_the_rules_too(protocol, stream):
    with pytest.raises(ValueError, match="credit"):
        protocol.data(stream, 0, memoryview(bytes(WINDOW + 1)))
    with pytest.raises(ValueError, match="NUL"):
        protocol.spawn("command", "", "echo \0", "")
    with pytest.raises(ValueError, match="expected at most"):
        protocol.spawn("command", "", "x" * PAYLOAD_MAX, "")
    for size in [(0, 24), (80, 0), (0x10000, 24), (80, 0x10000), (-1, 24)]:
        with pytest.raises(ValueError, match="expected 1 to 65535"):
            protocol.resize(stream, *size)
    protocol.eof(stream, 0)
    with pytest.raises(ValueError, match="EOF"):
        protocol.data(stream, 0, memoryview(b"x"))


def test_a_refused_spawn_uses_up_no_number(protocol):
    with pytest.raises(ValueError, match="expected at most"):
        protocol.spawn("command", "", "x" * PAYLOAD_MAX, "")
    assert protocol.spawn("command", "", "true", "")[0] == 1
