"""Clones ahead of a test's own, made at once however busy the machine is."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path

from qubes_itests.guest.start import warm
from qubes_itests.guest.start.ahead import ClonesAhead, Recent
from qubes_itests.host import load


class _Eager(Recent):
    """Expects another start of what has started once."""

    def add(self, kind):
        self._known.add(kind)
        super().add(kind)


@contextlib.contextmanager
def own_clones(testbed, app, monkeypatch, most):
    """Have an app start from that many clones of its own; yield what makes them.

    Its own, as a worker has none where each CPU has one.
    """
    run = testbed.portal.run
    monkeypatch.setattr(warm, "_WORTH", 1)
    monkeypatch.setattr(load, "running", lambda: 0)
    # On a machine that is short of memory the first clone would be ended for a VM,
    # which would go on as the next: not the one that a test has done something to.
    monkeypatch.setattr(app.hypervisor, "memory_limit", 1 << 20)
    if (usual := app.warm_starts.ahead) is not None:
        monkeypatch.setattr(usual, "_recent", Recent(0))
        # one that it is about to make would be among ours
        run(asyncio.wait_for(usual.settled(), 600))
    places = (testbed.parts.run_directory, testbed.parts.pool_directory)
    sockets, disks = (Path(tempfile.mkdtemp(prefix="", dir=each)) for each in places)
    made = ClonesAhead(app.hypervisor, most, sockets, disks)
    monkeypatch.setattr(made, "_recent", _Eager(most))
    monkeypatch.setattr(app.warm_starts, "ahead", made)

    async def end_clones():
        spare = app.hypervisor.domains(spare=True)
        await asyncio.gather(*(domain.undefine() for domain in spare))

    async def end():
        making.cancel()
        await asyncio.wait([making])
        await end_clones()

    run(end_clones())  # those that other tests have left
    loop = testbed.portal.loop
    making = testbed.portal.call(lambda: loop.in_background(made.run()))
    try:
        yield made
    finally:
        run(end())
        for place in (sockets, disks):
            shutil.rmtree(place)
