"""An app whose VMs run on the scripted hypervisor, with real volumes."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from scripted_hypervisor import ScriptedHypervisor

from qubes_itests.core.app import Qubes
from qubes_itests.guest.image.template import Template
from qubes_storage.reflink import ReflinkPool

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1024**2


async def make_app(directory: Path) -> Qubes:
    """Return an app with a TemplateVM `tiny`, its default."""
    app = Qubes(
        hypervisor=ScriptedHypervisor(Random(1)),  # noqa: S311 - to be repeated
        directory=directory,
        kernels={"tiny": Template("tiny", directory, directory, directory)},
    )
    pool = ReflinkPool(name="default", dir_path=directory / "pool", setup_check=False)
    await app.add_pool(pool)
    app.default_template = await make_vm(app, "TemplateVM", "tiny")
    return app


async def make_vm(app: Qubes, cls: str, name: str, **properties: Any) -> Any:
    """Return a VM with small volumes, made on disk."""
    small = {"size": MIB}
    volumes = {"private": small, "volatile": small}
    if cls != "AppVM":
        volumes["root"] = small
    vm = app.add_new_vm(
        cls, name=name, label="red", volume_config=volumes, **properties
    )
    await vm.create_on_disk()
    return vm
