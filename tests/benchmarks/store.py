"""How quick an app with many VMs is saved, loaded and looked up.

Run: ``.venv/bin/python tests/benchmarks/store.py``
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from bench import heading, row, seconds

from qubes_itests.core.app import Qubes
from qubes_storage.reflink import ReflinkPool

COUNTS = (10, 1000, 10_000)
#: Of the VMs, those that are templates; every tenth of the others provides network.
TEMPLATES = 5
LOOKUPS = 2000
ROUNDS = 7
LARGE = 5000


def filled(directory, count):
    """Return an app with that many VMs, with what VMs of a real system have."""
    app = Qubes(directory / "qubes.xml", load=False)
    pool = ReflinkPool(name="default", dir_path=directory / "pool", setup_check=False)
    asyncio.run(app.add_pool(pool))
    for number in range(count - len(app.domains)):
        fill(add(app, number), number)
    return app


def add(app, number):
    """Add a VM: first the templates, then VMs from them."""
    if number < TEMPLATES:
        return app.add_new_vm("TemplateVM", name=f"template-{number}", label="black")
    template = f"template-{number % TEMPLATES}"
    return app.add_new_vm(
        "AppVM", name=f"vm-{number}", label="red", template=template, netvm=None
    )


def fill(vm, number):
    """Give it settings, features and tags."""
    vm.memory, vm.maxmem, vm.vcpus = 400 + number % 100, 4000, 2
    if number % 10 == 0:
        vm.provides_network = True
    elif number > 2 * TEMPLATES + 10:
        vm.netvm = f"vm-{number - number % 10}"
    for feature in range(8):
        vm.features[f"service.name-{feature}"] = str(number % 2)
    vm.tags.update(("created-by-dom0", "audiovm-dom0"))


def load(app):
    """Load what an app has saved."""
    return asyncio.run(Qubes.open(app.store.path, hypervisor=None, directory=Path()))


def look_up(app, kind):
    """Return how long one lookup takes, in microseconds."""
    vms = list(app.domains)
    keys = [getattr(vm, kind) if kind else vm for vm in vms]
    keys = (keys * (LOOKUPS // len(keys) + 1))[:LOOKUPS]

    def all_of_them():
        for key in keys:
            app.domains[key]

    return [1e6 * seconds(all_of_them) / LOOKUPS for _ in range(ROUNDS)]


def new_number(app):
    """Return how long it takes to find a free number, in microseconds."""
    return [1e6 * seconds(app.domains.get_new_unused_qid) for _ in range(ROUNDS)]


def measure(directory, count):
    """Print the figures of an app of one size."""
    heading(f"{count} VMs")
    app = None

    def make():
        nonlocal app
        app = filled(directory, count)

    large = count > LARGE
    row("add them", [seconds(make)], bound="< 6 s" if large else "")
    rounds = 3 if large else ROUNDS
    bound = "< 0.5 s" if count == 1000 else ""
    row("save", [seconds(app.save) for _ in range(rounds)], bound=bound)
    bound = "< 1 s" if count == 1000 else ""
    row("load", [seconds(load, app) for _ in range(rounds)], bound=bound)
    for kind in ("name", "uuid", "qid", ""):
        row(f"lookup by {kind or 'itself'}", look_up(app, kind), unit="us")
    row("free number", new_number(app), unit="us")
    print(f"{app.store.path.stat().st_size} bytes")
    app.store.release()


def main():
    """Measure apps of several sizes."""
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as directory:
            measure(Path(directory), count)


if __name__ == "__main__":
    main()
