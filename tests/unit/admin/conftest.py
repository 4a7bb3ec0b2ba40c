"""An app without guests, and the Admin API served on a socket."""

import asyncio
import threading

import pytest
from admin_client import Client

from qubes_itests.admin.server import AdminServer
from qubes_itests.core.app import Qubes
from qubes_storage.reflink import ReflinkPool


class NoHypervisor:
    """Fails the test that reaches it."""

    slowness = 1.0

    def __getattr__(self, name):
        raise AssertionError(f"the hypervisor was asked for {name}")


@pytest.fixture
def loop():
    """Give a loop that runs in a thread of its own, as the real one does."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def run(loop):
    """Run a coroutine on that loop."""

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(300)

    return run


class SavingQubes(Qubes):
    """Counts how often it is saved."""

    saved = 0

    async def save_async(self, **kwargs):
        self.saved += 1
        await super().save_async(**kwargs)


@pytest.fixture
def app(tmp_path, run):
    async def make():
        app = SavingQubes(tmp_path / "qubes.xml", load=False, hypervisor=NoHypervisor())
        pool = ReflinkPool(
            name="default", dir_path=tmp_path / "pool", setup_check=False
        )
        await app.add_pool(pool)
        small = {
            "root": {"size": 1 << 20},
            "private": {"size": 4 << 20},
            "volatile": {"size": 1 << 20},
        }
        tiny = app.add_new_vm(
            "TemplateVM", name="tiny", label="black", volume_config=small
        )
        await tiny.create_on_disk()
        app.default_template = tiny
        work = app.add_new_vm("AppVM", name="work", label="red", volume_config=small)
        await work.create_on_disk()
        return app

    app = run(make())

    async def destroy():
        for pool in app.pools.values():
            await pool.destroy()

    yield app
    run(destroy())


@pytest.fixture
def server(app, tmp_path, run):
    server = AdminServer(app, tmp_path / "qubesd.sock")
    run(server.__aenter__())
    yield server
    run(server.__aexit__(None, None, None))


@pytest.fixture
def client(server):
    return Client(server.path)
