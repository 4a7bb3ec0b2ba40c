"""What saved states are told apart by, and what their guests know of disks."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from scripted_hypervisor import ScriptedHypervisor

from qubes_itests.core.config import defaults
from qubes_itests.guest.link.agent import Identity
from qubes_itests.guest.start import warm
from qubes_itests.hypervisor.contract import Disk, DomainSpec

IDENTITY = Identity(name="", root="xvda", private="xvdb", volatile="xvdc")


@pytest.fixture
def disk(tmp_path):
    """Return a disk of so many bytes."""

    def make(name, size, *, read_only=False):
        path = tmp_path / name
        path.write_bytes(bytes(size))
        return Disk(name, path, read_only=read_only)

    return make


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "root.img"
    path.write_bytes(bytes(5))
    return path


@pytest.fixture
def starts(root):
    hypervisor = ScriptedHypervisor(Random(1))  # noqa: S311 - to be repeated
    made = warm.WarmStarts(None, hypervisor)
    made.add_root(root, "content")
    return made


@pytest.fixture
def state():
    sizes = {"xvda": 1, "xvdb": 2, "xvdc": 3}
    return warm.WarmState("root", "key", Path("state"), sizes, Path("root"))


def test_disks_as_large_as_those_of_the_state(state, disk):
    disks = [disk("xvda", 1), disk("xvdb", 2), disk("xvdc", 4), disk("xvdi", 3)]
    assert state.unchanged(disks) == ("xvda", "xvdb")


def test_what_cannot_be_written_or_opened_is_looked_at(state, disk, tmp_path):
    gone = [Disk(name, tmp_path / "gone") for name in ("xvdb", "xvdi")]
    disks = [disk("xvda", 1, read_only=True), *gone]
    assert state.unchanged(disks) == ()


def test_saved_disks_are_as_large_as_those_of_a_vm_by_default(starts, root):
    assert starts._sizes(IDENTITY, root) == {
        "xvda": 5,
        "xvdb": defaults["private_img_size"],
        "xvdc": defaults["volatile_img_size"],
    }


@pytest.mark.asyncio
async def test_a_state_is_of_one_init(starts, root, tmp_path, monkeypatch):
    """What is made, and clones ahead, are told from others by its key alone."""

    async def same(*_args, **_options):
        return "machine"

    monkeypatch.setattr(ScriptedHypervisor, "state_key", same)
    spec = DomainSpec("work", uuid.uuid4(), tmp_path, 100, 100, None, None)
    identities = [replace(IDENTITY, init=init) for init in ("agent", "systemd")]
    keys = {await starts._key(spec, identity, root) for identity in identities}
    assert len(keys) == 2
    assert len({await starts._key(spec, each, None) for each in identities}) == 1
