"""An app as another one was: all of it but where that one had its disks."""

import asyncio
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qubes_itests.core.app import Qubes
from qubes_itests.core.exc import QubesException
from qubes_itests.core.store.document import to_bytes
from qubes_itests.core.store.opening import open_copy
from qubes_itests.core.store.saving import state_of
from qubes_storage.file import FilePool

#: What is put in the place of a value.
ODD = (
    *("", "../../../etc", "/etc", "a/../../b/c", "vm/x/y", "x" * 5000, "-1", "9" * 30),
    *("dom0", "work", "None", "True", "file", "lvm_thin", "a b", "\t", "@adminvm"),
)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """Return the state of an app with a template, a VM and two pools, as bytes."""
    directory = tmp_path_factory.mktemp("original")
    app = Qubes(offline_mode=True, directory=directory)

    async def fill():
        for name in ("first", "second"):
            await app.add_pool(FilePool(name=name, dir_path=directory / name))
        base = app.add_new_vm("TemplateVM", name="base", label="black", kernel=None)
        work = app.add_new_vm("AppVM", name="work", label="red", template=base)
        work.tags.add("marked")
        work.features["service.x"] = "1"
        work.maxmem = 900

    asyncio.run(fill())
    return to_bytes(state_of(app)).decode()


def copied(document, directory):
    app = Qubes(offline_mode=True, directory=directory)
    path = directory / "app.xml"
    asyncio.run(open_copy(app, document.encode(), path, directory / "pools"))
    return app


def test_its_vms_are_as_they_were_and_its_pools_elsewhere(document, tmp_path):
    app = copied(document, tmp_path)
    work = app.domains["work"]
    assert (work.template.name, work.maxmem) == ("base", 900)
    assert "marked" in work.tags
    assert work.features["service.x"] == "1"
    assert {name: pool.dir_path for name, pool in app.pools.items()} == {
        "first": tmp_path / "pools" / "0",
        "second": tmp_path / "pools" / "1",
    }


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60)
def test_no_document_chooses_a_path(document, tmp_path_factory, data):
    """It is refused by an error of the core, or all is below the given directory."""
    found = re.finditer(r'(?<=")[^"]*(?=")|(?<=>)[^<\n]+(?=<)', document)
    values = [value.span() for value in found]
    spans = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=2))
    text = document
    for start, end in sorted(set(spans), reverse=True):
        text = text[:start] + data.draw(st.sampled_from(ODD)) + text[end:]
    directory = tmp_path_factory.mktemp("copy")
    try:
        app = copied(text, directory)
    except QubesException:
        return
    paths = [pool.dir_path for pool in app.pools.values()]
    for vm in app.domains.startable():
        paths += [vm.directory, *(volume.path for volume in vm.volumes.values())]
    assert all(Path(p).resolve().is_relative_to(directory.resolve()) for p in paths)
