"""What holds for all bytes that a guest may send, well formed or not."""

import itertools
import struct

from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.guest.exc import ProtocolViolation
from qubes_itests.guest.link.frames import (
    FIRST_GUEST_STREAM,
    HEADER,
    PAYLOAD_MAX,
    STREAMS_MAX,
    WINDOW,
    ExitKind,
    FrameType,
    Received,
    encode,
)
from qubes_itests.guest.link.protocol import HostProtocol

KINDS = [int(kind) for kind in FrameType]
STREAMS = [0, 1, 2, 3, 4, FIRST_GUEST_STREAM, FIRST_GUEST_STREAM + 1, 0xFFFFFFFF]


def connected(spawned=3):
    protocol = HostProtocol()
    hello = protocol.hello()
    list(protocol.receive(encode(FrameType.READY, payload=hello[HEADER.size :])))
    for _ in range(spawned):
        protocol.spawn("command", "", "cat", "")
    return protocol


payloads = st.one_of(
    st.just(b""),
    st.binary(max_size=40),
    st.integers(0, 2**32 - 1).map(lambda n: struct.pack("<I", n)),
    st.just(b"vm\0service\0user\0"),
    st.tuples(st.integers(0, 3), st.integers(0, 255)).map(bytes),
    st.integers(1, PAYLOAD_MAX).map(bytes),
)
frames = st.builds(
    lambda kind, channel, stream, payload: (
        HEADER.pack(kind, channel, len(payload), stream) + payload
    ),
    st.sampled_from(KINDS) | st.integers(0, 255),
    st.integers(0, 2) | st.integers(0, 255),
    st.sampled_from(STREAMS) | st.integers(0, 2**32 - 1),
    payloads,
)


def take(protocol, data):
    """Feed bytes; return the events, and whether the guest was cut off."""
    events = []
    try:
        for event in protocol.receive(data):
            # a view is only good until the next event
            kept = event._replace(data=bytes(event.data)) if is_data(event) else event
            events.append(kept)
    except ProtocolViolation:
        return events, True
    return events, False


def is_data(event):
    return isinstance(event, Received)


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_random_bytes_are_events_or_a_violation(pieces):
    """Nothing else is ever raised, and no more than a frame is kept."""
    protocol = connected()
    for piece in pieces:
        _, broken = take(protocol, piece)
        if broken:
            return
        assert len(protocol._rest) < HEADER.size + PAYLOAD_MAX


@given(st.lists(frames, max_size=30))
def test_random_frames_keep_every_bound(sent):
    """However frames follow each other, streams and unread bytes stay bounded."""
    protocol = connected()
    unread = {}
    for frame in sent:
        events, broken = take(protocol, frame)
        for event in filter(is_data, events):
            address = (event.stream, event.channel)
            unread[address] = unread.get(address, 0) + len(event.data)
            assert unread[address] <= WINDOW
        if broken:
            return
        assert len(protocol._streams) <= 2 * STREAMS_MAX


@given(st.lists(frames, max_size=10), st.lists(st.integers(0, 5000), max_size=10))
def test_where_bytes_are_cut_does_not_matter(sent, cuts):
    """Torn frames give the same events as whole ones, up to the same violation."""
    stream = b"".join(sent)
    whole, whole_broken = take(connected(), stream)
    protocol, torn, broken = connected(), [], False
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    for start, end in itertools.pairwise(edges):
        events, broken = take(protocol, stream[start:end])
        torn += events
        if broken:
            break
    assert (torn, broken) == (whole, whole_broken)


@given(st.data())
def test_credit_given_is_what_can_be_sent(data):
    """A guest may send exactly what it was given, however it was given."""
    protocol = connected(1)
    allowed = WINDOW
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            size = data.draw(st.integers(1, 2 * WINDOW))
            protocol.give_credit(1, 1, size)
            allowed += size
        size = data.draw(st.integers(1, PAYLOAD_MAX))
        _, broken = take(protocol, encode(FrameType.DATA, 1, 1, bytes(size)))
        assert broken == (size > allowed)
        if broken:
            return
        allowed -= size


@given(st.integers(1, 200), st.integers(0, 250))
def test_ended_calls_never_come_back(count, again):
    """Old numbers are breaches for ever, without a list of them being kept."""
    protocol = connected(0)
    payload = b"vm\0service\0user\0"
    for n in range(count):
        take(protocol, encode(FrameType.CALL, FIRST_GUEST_STREAM + n, payload=payload))
        protocol.exit(FIRST_GUEST_STREAM + n, ExitKind.EXITED, 0)
    assert not protocol._streams
    frame = encode(FrameType.CALL, FIRST_GUEST_STREAM + again, payload=payload)
    _, broken = take(protocol, frame)
    assert broken == (again != count)
