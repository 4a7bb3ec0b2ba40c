"""A kernel without bridges is told from a refusal."""

import pytest

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.host import bridge
from qubes_itests.host.exc import CommandError


@pytest.mark.parametrize(
    ("said", "raised"),
    [
        ("Error: Unknown device type.", EnvironmentNotReadyError),
        ("RTNETLINK answers: Operation not supported", EnvironmentNotReadyError),
        ("Error: TC classifier not found.", EnvironmentNotReadyError),
        ("RTNETLINK answers: Operation not permitted", CommandError),
    ],
)
def test_who_must_act(monkeypatch, said, raised):
    def fail(argv, **_):
        raise CommandError(argv, 2, said)

    monkeypatch.setattr(bridge, "run", fail)
    with pytest.raises(raised, match=said):
        bridge.Bridge.create()


def test_names_fit_the_kernel(monkeypatch):
    """Of a process with the highest number, after thousands of taps."""
    monkeypatch.setattr(bridge.os, "getpid", lambda: (1 << 22) - 1)
    monkeypatch.setattr(bridge, "_numbers", iter([65_000]))
    lines = []
    monkeypatch.setattr(bridge, "run", lambda argv, **_: lines.append(argv))
    assert len(bridge.Bridge.create().name) <= 15
