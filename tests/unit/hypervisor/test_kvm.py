"""The KVM probe judges by what QEMU does, soon, and once per boot of the host."""

from __future__ import annotations

import time

import pytest

from qubes_itests.host.cache import Cache
from qubes_itests.hypervisor import kvm

HANGS = "exec sleep 9000"
ABORTS = "echo 'Assertion failed.' >&2; kill -ABRT $$"
BOOTS = "echo 'VFS: Unable to mount root fs on unknown-block(0,0)'"


@pytest.fixture
def kernel(tmp_path):
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"a kernel")
    return path


@pytest.fixture
def probe(tmp_path, monkeypatch, kernel):
    """Return a function that probes with a QEMU that does as it is told."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.delenv("QUBES_ITESTS_KVM", raising=False)
    monkeypatch.setattr(kvm, "_DEVICE", tmp_path)

    def run(script, deadline=300.0):
        qemu = programs / "qemu-system-x86_64"
        qemu.write_text(f"#!/bin/sh\n{script}\n")
        qemu.chmod(0o755)
        cache = Cache(tmp_path / "cache")
        return kvm.kvm_usable(cache, kernel, deadline=deadline)

    return run


def test_a_guest_that_boots(probe):
    assert probe(BOOTS).usable


def test_a_guest_that_aborts(probe):
    verdict = probe(ABORTS)
    assert not verdict.usable
    assert "Assertion failed." in verdict.reason


def test_a_guest_that_hangs(probe):
    before = time.monotonic()
    verdict = probe(HANGS, deadline=0.3)
    assert time.monotonic() - before < 300
    assert not verdict.usable
    assert "hung" in verdict.reason


def test_the_verdict_is_kept(probe):
    """A second probe would find another QEMU, and does not ask it."""
    assert probe(BOOTS).usable
    assert probe(HANGS).usable


@pytest.mark.parametrize(("value", "usable"), [("0", False), ("1", True)])
def test_the_environment_decides(probe, monkeypatch, value, usable):
    monkeypatch.setenv("QUBES_ITESTS_KVM", value)
    assert probe(HANGS, deadline=0).usable is usable


def test_without_the_device(probe, monkeypatch, tmp_path):
    monkeypatch.setattr(kvm, "_DEVICE", tmp_path / "missing")
    assert "missing" in probe(BOOTS).reason
