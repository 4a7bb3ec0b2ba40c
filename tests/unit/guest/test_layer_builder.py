"""The process that makes layers, as its caller sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qubes_itests.guest.image.layer import sandboxed
from qubes_itests.guest.image.layer.request import Layers
from qubes_itests.host.cache import Cache


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Return a function that has a shell script for the builder."""
    monkeypatch.setattr(sandboxed, "find_layers", lambda *_: None)
    monkeypatch.setattr(sandboxed, "_END_TIMEOUT", 0.2)
    monkeypatch.setattr(Layers, "to_json", lambda _layers: "{}")
    layers = Layers.__new__(Layers)

    def built(script):
        monkeypatch.setattr(
            sandboxed.sandbox, "command", lambda _: ["sh", "-c", script]
        )
        cache, log = Cache(tmp_path / "cache"), tmp_path / "log"
        return sandboxed.build_layers(cache, layers, log, print)

    return built


def test_one_that_has_said_its_last_word_is_not_waited_for(build):
    said = """echo '{"say": "a step"}'; echo '{"image": "/root.img"}'"""
    script = f"cat >/dev/null; {said}; exec >&- 2>&-; sleep 600"
    assert build(script) == Path("/root.img")
